"""The preprocess stage, called as the generator it is: one task for decode, or one error frame for each choice."""

import asyncio
import json
import threading
import time
from typing import Any

import msgpack
import pytest

from pipeline.chat import ChatTokenizer, LoadedModel
from pipeline.config import BUILTIN_MODEL
from pipeline.errors import AttemptsExhausted, Cancelled, DeadlineExceeded, Overloaded, Permanent, UnknownModel
from pipeline.models import prepare_model
from pipeline.stage import Emit, Task, terminal_msg_id
from stages.preprocess import INLINE_BYTES_MAX, preprocess
from subjects import headers, limits, names
from subjects.codec import Format, TokenIds, decode, format_of
from subjects.messages import Frame, PreprocessedRequest

CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(prepare_model(BUILTIN_MODEL))


class OneModel:
    """Serves "smollm2" at once; other names are unknown."""

    def __init__(self, tokenizer: ChatTokenizer, context_len_tokens: int = 8192) -> None:
        self.model = LoadedModel(name="smollm2", tokenizer=tokenizer, context_len_tokens=context_len_tokens)
        self.asked: list[float] = []

    async def ready(self, model: str, until_unix_s: float) -> LoadedModel:
        self.asked.append(until_unix_s)
        if model != self.model.name:
            raise UnknownModel(f"no model is called {model!r}", field="model")
        return self.model


class At:
    """Every prompt belongs to one worker, or to none."""

    def __init__(self, worker: str | None) -> None:
        self.worker = worker

    async def choose(self, model: str, token_ids: TokenIds, session: str | None = None, salt: str = "") -> str | None:
        return self.worker


ANYWHERE = At(None)


def task_of(payload: dict[str, Any] | bytes, model: str = "smollm2", **fields: Any) -> Task[bytes]:
    if not isinstance(payload, bytes):
        payload = json.dumps(payload).encode()
    defaults = {"stream_seq": 7, "stored_unix_s": time.time()}
    return Task(payload=payload, subject=names.REQUESTS.of(model=model), **(defaults | fields))


async def emits_of(task: Task[bytes], models: Any, places: Any = ANYWHERE) -> list[Emit]:
    async with asyncio.timeout(30):
        try:
            return [emit async for emit in preprocess.run(task, models=models, places=places)]
        except Permanent as error:
            return list(preprocess.answer(task, error))


def frames_of(emits: list[Emit]) -> list[Frame]:
    """The frames, after checking that each travels as a terminal frame must."""
    frames = [decode(Frame, emit.payload) for emit in emits]
    for emit, frame in zip(emits, frames, strict=True):
        assert emit.frame == frame
        client = names.RESPONSES.parse(emit.subject)["client"]
        assert emit.msg_id == terminal_msg_id(client, frame.request_id, frame.choice)
        assert frame.finish_reason
        assert frame.error
    return frames


@pytest.mark.parametrize(
    ("priority", "subject"), [(5, names.DECODE_HIGH), (0, names.DECODE_ANY), (-1, names.DECODE_LOW)]
)
async def test_a_priority_decides_the_queue(tokenizer, priority, subject):
    (emit,) = await emits_of(task_of(CHAT | {"priority": priority}), OneModel(tokenizer))
    assert emit.subject == subject.of(model="smollm2")
    assert decode(PreprocessedRequest, emit.payload).priority == priority


async def test_a_prompt_goes_to_the_worker_it_belongs_to_unless_it_has_a_priority(tokenizer):
    (emit,) = await emits_of(task_of(CHAT), OneModel(tokenizer), At("w1"))
    assert emit.subject == names.DECODE_WORKER.of(model="smollm2", worker="w1")
    (emit,) = await emits_of(task_of(CHAT | {"priority": 1}), OneModel(tokenizer), At("w1"))
    assert emit.subject == names.DECODE_HIGH.of(model="smollm2")


async def test_a_chat_becomes_one_task_for_decode(tokenizer):
    stored_unix_s = time.time() - 1
    task = task_of(CHAT | {"request_id": "r1", "client": "me", "max_tokens": 5}, stored_unix_s=stored_unix_s)
    (emit,) = await emits_of(task, OneModel(tokenizer))
    assert (emit.subject, emit.msg_id) == (names.DECODE_ANY.of(model="smollm2"), "me.r1")
    request = decode(PreprocessedRequest, emit.payload)
    assert (request.request_id, request.client, request.model) == ("r1", "me", "smollm2")
    assert (request.stop.max_tokens, request.choices, request.accepted_unix_s) == (5, 1, stored_unix_s)
    assert request.deadline_unix_s == stored_unix_s + limits.REQUEST_S_DEFAULT
    assert request.reply_format is Format.JSON
    assert "What is the capital of France?<|im_end|>" in tokenizer.decode(request.token_ids, skip_special_tokens=False)


async def test_a_redelivery_gives_the_same_task_again(tokenizer):
    payload, stored_unix_s = json.dumps(CHAT).encode(), time.time()
    tasks = [task_of(payload, stored_unix_s=stored_unix_s, attempt=attempt) for attempt in (1, 2)]
    first, second = [await emits_of(task, OneModel(tokenizer)) for task in tasks]
    assert first == second
    assert first[0].msg_id == "anonymous.7"


async def test_prompts_are_text_or_token_ids(tokenizer):
    (by_text,) = await emits_of(task_of({"prompt": "The capital of France is"}), OneModel(tokenizer))
    ids = decode(PreprocessedRequest, by_text.payload).token_ids
    assert ids == tokenizer.encode("The capital of France is", add_special_tokens=True)
    (by_ids,) = await emits_of(task_of({"prompt": ids.tolist()}), OneModel(tokenizer))
    assert decode(PreprocessedRequest, by_ids.payload).token_ids == ids


async def test_messagepack_is_answered_in_messagepack(tokenizer):
    (emit,) = await emits_of(task_of(msgpack.packb(CHAT | {"n": 0})), OneModel(tokenizer))
    assert format_of(emit.payload) is Format.MSGPACK
    (frame,) = frames_of([emit])
    assert frame.error.field == "n"


@pytest.mark.parametrize("choices", [1, 3, limits.CHOICES_MAX])
async def test_each_choice_of_a_wrong_request_ends_once(tokenizer, choices):
    task = task_of(CHAT | {"n": choices, "temperature": -1, "request_id": "r", "client": "me"})
    emits = await emits_of(task, OneModel(tokenizer))
    assert {emit.subject for emit in emits} == {names.RESPONSES.of(client="me", request_id="r")}
    frames = frames_of(emits)
    assert [frame.choice for frame in frames] == list(range(choices))
    assert {frame.error.field for frame in frames} == {"temperature"}
    assert {frame.finish_reason for frame in frames} == {"error"}


async def test_a_hopeless_payload_is_answered_where_its_headers_say(tokenizer):
    task = task_of(b"\x00\x01", headers={headers.MSG_ID: "h", headers.CLIENT: "c"})
    (emit,) = await emits_of(task, OneModel(tokenizer))
    assert emit.subject == names.RESPONSES.of(client="c", request_id="h")


async def test_a_hopeless_payload_without_headers_is_answered_by_its_sequence(tokenizer):
    (emit,) = await emits_of(task_of(b"hello"), OneModel(tokenizer))
    assert emit.subject == names.RESPONSES.of(client=names.ANONYMOUS_CLIENT, request_id="7")
    assert format_of(emit.payload) is Format.JSON


async def test_an_unknown_model_is_an_error_frame(tokenizer):
    (frame,) = frames_of(await emits_of(task_of(CHAT, model="other"), OneModel(tokenizer)))
    assert (frame.error.code, frame.error.status) == ("unknown_model", 404)


async def test_a_model_without_a_worker_is_an_error_at_the_deadline(tokenizer):
    class NoWorker:
        async def ready(self, model: str, until_unix_s: float) -> LoadedModel:
            raise DeadlineExceeded(f"no worker of {model!r} was ready by the deadline", field="deadline")

    (frame,) = frames_of(await emits_of(task_of(CHAT), NoWorker()))
    assert frame.error.code == "deadline_exceeded"
    assert "no worker" in frame.error.message


async def test_the_wait_for_a_worker_ends_at_the_requests_deadline(tokenizer):
    models, deadline_unix_s = OneModel(tokenizer), time.time() + 42
    await emits_of(task_of(CHAT | {"deadline": deadline_unix_s}), models)
    assert models.asked == [deadline_unix_s]


async def test_a_deadline_that_passed_in_the_queue_is_answered_without_work(tokenizer):
    models = OneModel(tokenizer)
    task = task_of(CHAT, stored_unix_s=time.time() - limits.REQUEST_S_DEFAULT - 1)
    (frame,) = frames_of(await emits_of(task, models))
    assert (frame.error.code, models.asked) == ("deadline_exceeded", [])


async def test_a_prompt_over_the_workers_context_is_refused(tokenizer):
    (frame,) = frames_of(await emits_of(task_of({"prompt": [5] * 100}), OneModel(tokenizer, context_len_tokens=100)))
    assert (frame.error.code, frame.error.size, frame.error.limit) == ("prompt_too_long", 100, 99)


async def test_a_task_larger_than_a_subject_carries_is_refused(tokenizer):
    prompt = [5] * (limits.PAYLOAD_BYTES_MAX // 4)
    (frame,) = frames_of(await emits_of(task_of({"prompt": prompt}), OneModel(tokenizer, context_len_tokens=10**6)))
    assert (frame.error.code, frame.error.limit) == ("payload_too_large", limits.PAYLOAD_BYTES_MAX)
    assert frame.error.size > limits.PAYLOAD_BYTES_MAX


async def test_a_two_megabyte_payload_is_refused(tokenizer):
    (frame,) = frames_of(await emits_of(task_of({"prompt": "x" * 2**21}), OneModel(tokenizer)))
    assert (frame.error.code, frame.error.limit) == ("payload_too_large", limits.PAYLOAD_BYTES_MAX)


async def test_what_may_succeed_later_is_left_to_the_runner(tokenizer):
    class Busy:
        async def ready(self, model: str, until_unix_s: float) -> LoadedModel:
            raise Overloaded("try again", retry_after_s=1)

    with pytest.raises(Overloaded):
        await emits_of(task_of(CHAT), Busy())


async def test_a_long_prompt_is_tokenized_beside_the_event_loop(tokenizer):
    threads = []

    class Watching(ChatTokenizer):
        def __init__(self) -> None:
            self.vocab_size, self.chat_template = tokenizer.vocab_size, tokenizer.chat_template

        def encode(self, text: str, add_special_tokens: bool):
            threads.append(threading.current_thread())
            return tokenizer.encode(text, add_special_tokens)

    short, long = "word", "word " * INLINE_BYTES_MAX
    for prompt in (short, long):
        (emit,) = await emits_of(task_of({"prompt": prompt}), OneModel(Watching()))
        assert decode(PreprocessedRequest, emit.payload).token_ids == tokenizer.encode(prompt, True)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize(
    ("error", "finish_reason"), [(AttemptsExhausted("gave up"), "error"), (Cancelled("by the client"), "abort")]
)
def test_the_runner_can_end_a_request_for_the_stage(error, finish_reason):
    task = task_of(CHAT | {"n": 3, "request_id": "r"}, ended={1})
    frames = frames_of(list(preprocess.answer(task, error)))
    assert [(frame.choice, frame.finish_reason) for frame in frames] == [(0, finish_reason), (2, finish_reason)]
    assert {frame.error.code for frame in frames} == {error.code}
