"""`bench` without a server: its arithmetic, its plans, its files and its tables."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy
import pytest

from pipeline import process_cpu
from pipeline.bench import command, report, result
from pipeline.bench.measure import distribution, doubts, outcome, summarize, tpot_ms, ttft_ms
from pipeline.bench.plan import plan, warmup
from pipeline.bench.prompts import WORDS
from pipeline.bench.result import Generator, Machine, ProcessCpu, Result, Seen, Settings, Slo
from pipeline.bench.traces import parse
from pipeline.errors import ConfigError

SLO = Slo(ttft_ms=100, tpot_ms=20)


def seen(index: int = 0, *, first_s: float = 0.05, tokens: int = 11, **fields) -> Seen:
    """One that was sent at 1 s, began `first_s` later, took 100 ms from first to last and ended then."""
    about = {"prompt_tokens": 100, "cached_tokens": 25, "output_tokens": tokens, "chunks": tokens} | fields
    return Seen(
        index=index, due_s=1.0, sent_s=1.0, first_s=1 + first_s, last_s=1.1 + first_s, end_s=1.1 + first_s, **about
    )


def turned_away(status: int = 429) -> Seen:
    return Seen(index=9, due_s=1.0, sent_s=1.0, end_s=1.01, code="overloaded", status=status)


def run_of(label: str, seconds: float, **fields) -> Result:
    requests = (seen(first_s=seconds), turned_away())
    return Result(
        label=label, started_unix_s=0, version="0", machine=Machine(cpus=2, system="s", python="3"),
        settings=Settings(**fields), summary=summarize(requests, [0.01], SLO), generator=Generator(cpu_share=0.1),
        processes=(ProcessCpu(name="d0", role="decode", cpu_s=0.5, descendants_cpu_s=1.5),), requests=requests,
    )  # fmt: skip


def test_percentiles_are_numpys() -> None:
    numbers = numpy.random.default_rng(0).exponential(size=997)
    found = distribution(numbers.tolist())
    assert found is not None
    wanted = numpy.percentile(numbers, [50, 90, 95, 99])
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(wanted.tolist(), rel=1e-12)
    assert found.mean == pytest.approx(numbers.mean()) and (found.min, found.max) == (numbers.min(), numbers.max())
    assert distribution([]) is None


def test_times_of_one_request() -> None:
    one = seen()
    assert ttft_ms(one) == pytest.approx(50) and tpot_ms(one) == pytest.approx(10)
    assert tpot_ms(seen(tokens=1)) is None
    assert outcome(turned_away()) == "rejected" and outcome(turned_away(500)) == "failed"
    assert outcome(seen(code="engine_died", status=503)) == "failed", "it had begun to answer"


def test_goodput_counts_what_was_turned_away_against_it() -> None:
    all_seen = [seen(0), seen(1, first_s=0.15), seen(2, tokens=3), turned_away()]  # good, late, slow, rejected
    found = summarize(all_seen, [0.01, 0.03], SLO)
    assert found.goodput is not None
    assert (found.goodput.good, found.goodput.of, found.goodput.share) == (1, 4, 0.25)
    assert (found.ok, found.rejected, found.failed, found.codes) == (3, 1, 0, {"overloaded": 1})
    assert found.duration_s == pytest.approx(0.25) and found.requests_per_s == pytest.approx(3 / 0.25)
    assert found.cached_share == 0.25 and found.output_tokens == 25
    assert summarize(all_seen, [], Slo()).goodput is None


def test_the_same_seed_plans_the_same_and_warms_up_with_something_else() -> None:
    settings = Settings(requests=20, input_min=10, input_max=40, shared_prefix=0.5, prefixes=2, arrivals="poisson",
                        rate_per_s=10.0)  # fmt: skip
    works = plan(settings)
    assert works == plan(settings) != plan(msgspec.structs.replace(settings, seed=1))
    assert all(10 <= len(work.prompt.split()) <= 40 and set(work.prompt.split()) <= set(WORDS) for work in works)
    assert len({tuple(work.prompt.split()[:5]) for work in works}) == 2
    assert not {tuple(work.prompt.split()[:5]) for work in warmup(settings)} & {
        tuple(work.prompt.split()[:5]) for work in works
    }


def test_arrivals() -> None:
    fixed = plan(Settings(requests=100, arrivals="fixed", rate_per_s=4.0, issue_s_max=2.0))
    assert [work.due_s for work in fixed] == [number / 4 for number in range(9)]
    drawn = plan(
        Settings(requests=20_000, arrivals="poisson", rate_per_s=50.0, input_min=1, input_max=1, issue_s_max=1e6)
    )
    gaps = numpy.diff([work.due_s for work in drawn])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.05)


def test_lengths_like_sharegpts() -> None:
    settings = Settings(
        requests=3_000, lengths="sharegpt", input_min=1, input_max=4_096, output_min=1, output_max=4_096
    )
    works = plan(settings)
    assert numpy.mean([len(work.prompt.split()) for work in works]) == pytest.approx(161, rel=0.1)
    assert numpy.mean([work.output_tokens for work in works]) == pytest.approx(338, rel=0.1)


def test_a_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 9, "output_length": 5, "hash_ids": [1, 3]}\n'
        '{"timestamp": 1000, "input_length": 8, "output_length": 2, "hash_ids": [1, 2]}\n'
    )
    settings = Settings(requests=10, arrivals="trace", unit="tokens", block_tokens=4, speedup=2.0)
    first, second = plan(settings, path)
    assert (first.due_s, second.due_s, first.output_tokens, second.output_tokens) == (0, 1.0, 2, 5)
    assert (len(first.prompt), len(second.prompt)) == (8, 9)
    assert first.prompt[:4] == second.prompt[:4] and first.prompt[4:8] != second.prompt[4:8]
    with pytest.raises(ConfigError, match="line 2: a length below 1"):
        parse([b'{"timestamp": 0, "input_length": 1, "output_length": 1}'] * 1
              + [b'{"timestamp": 0, "input_length": 0, "output_length": 1}'], 9)  # fmt: skip


def test_a_generator_that_is_the_limit_says_so() -> None:
    assert doubts(Generator(cpu_share=0.5)) == ()
    lags = distribution([0.0, 50.0])
    assert len(doubts(Generator(cpu_share=0.9, loop_lag_ms=lags, schedule_lag_ms=lags))) == 3


def test_compare_prints_ratios_and_what_was_asked_otherwise(tmp_path: Path, capsys) -> None:
    files = []
    for label, seconds, concurrency in (("ours", 0.05, 4), ("theirs", 0.1, 8)):
        files.append(tmp_path / f"{label}.json")
        result.write(run_of(label, seconds, concurrency=concurrency), files[-1])
    assert command.compare(files, None) == 0
    said = capsys.readouterr().out
    assert "|  | ours | theirs | theirs / ours |" in said
    assert "| TTFT, ms, p50 | 50 | 100 | 2.00 |" in said
    assert "| CPU a request, ms: decode | 2,000 | 2,000 | 1.00 |" in said
    assert "| rejected | 1 | 1 | - |" in said
    assert "- concurrency: 4 | 8" in said and "KV" not in said
    with pytest.raises(ConfigError, match="no result"):
        (tmp_path / "x.json").write_text("{}")
        result.read(tmp_path / "x.json")


def test_differences_leave_out_what_is_alike() -> None:
    assert report.differences([Settings(url="a"), Settings(url="b")]) == {}


@pytest.mark.parametrize("text", ["0", "9:3", "a", "3:"])
def test_a_length_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--input takes a length"):
        command.span_of(text, "input")


def test_limits_of_an_slo() -> None:
    assert command.slo_of("ttft=200,e2e=2e3") == Slo(ttft_ms=200, e2e_ms=2000)
    for wrong in ("ttft", "x=1", "ttft=a"):
        with pytest.raises(ConfigError, match="--slo takes"):
            command.slo_of(wrong)


def test_cpu_of_a_child_counts_before_and_after_its_end() -> None:
    before_s = process_cpu.descendants_cpu_s(os.getpid())
    spend = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spend], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert process_cpu.own_cpu_s(child.pid) >= 0.28
        alive_s = process_cpu.descendants_cpu_s(os.getpid()) - before_s
        child.communicate(b"\n", timeout=10)
    ended_s = process_cpu.descendants_cpu_s(os.getpid()) - before_s
    assert 0.28 <= alive_s <= ended_s
