"""A reader of frames ends with the whole output, whatever the broker and dying workers make of its frames."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipeline.progress import Progress
from subjects.codec import TokenIds
from subjects.messages import Frame

OUTPUT = [100 + i for i in range(24)]


def frames(attempt: int, start: int, cuts: list[int]) -> list[Frame]:
    """The output from token `start` on, cut into frames; the last one is terminal."""
    edges = sorted({start, len(OUTPUT), *(start + cut % max(1, len(OUTPUT) - start) for cut in cuts)})
    made = []
    for begin, end in itertools.pairwise(edges):
        tokens = OUTPUT[begin:end]
        made.append(
            Frame(
                request_id="r",
                attempt=attempt,
                index=begin,
                token_ids=TokenIds.of(tokens),
                text="".join(f"<{token}>" for token in tokens),
                finish_reason="length" if end == len(OUTPUT) else None,
            )
        )
    return made


@given(
    cuts=st.lists(st.lists(st.integers(0, 23), max_size=8), min_size=1, max_size=4),
    died_after=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    data=st.data(),
)
def test_attempts_that_die_repeat_and_come_late_give_one_gapless_output(cuts, died_after, data):
    """Each attempt but the last dies after some frames; the next goes on from what the log has by then.

    Any frame may be heard twice, and a frame of a dead attempt may be heard after its successor's first.
    """
    log, reader, heard, late = Progress(), Progress(), [], []
    for attempt, attempt_cuts in enumerate(cuts, start=1):
        made = frames(attempt, len(log.token_ids), attempt_cuts)
        if attempt < len(cuts):
            made = made[: min(died_after[attempt - 1], len(made) - 1)]
        for position, frame in enumerate(made):
            log.add(frame)
            heard += [frame] * data.draw(st.integers(1, 2))
            if position == 0:
                heard += late
        late = data.draw(st.lists(st.sampled_from(made), max_size=3)) if made else late
    new = [frame for frame in heard if reader.add(frame)]

    assert reader.token_ids.tolist() == OUTPUT
    assert reader.text == "".join(f"<{token}>" for token in OUTPUT)
    assert reader.end is not None and reader.end.finish_reason == "length"
    assert sum(frame.finish_reason is not None for frame in new) == 1


def test_a_frame_behind_a_gap_is_not_taken():
    reader = Progress()
    assert reader.add(Frame(request_id="r", index=3, token_ids=TokenIds.of([1]), text="x")) is None
    assert len(reader.token_ids) == 0


def test_nothing_comes_after_the_end():
    reader = Progress()
    end = Frame(request_id="r", index=0, token_ids=TokenIds.of([1]), text="x", finish_reason="stop")
    assert reader.add(end) is end
    assert reader.add(end) is None
    assert reader.add(Frame(request_id="r", attempt=2, index=1, token_ids=TokenIds.of([2]), text="y")) is None
