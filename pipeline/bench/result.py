"""What a run leaves: its settings, every request's times, and the figures made of them. Written as JSON."""

from pathlib import Path
from typing import Final, Literal

import msgspec

from pipeline.errors import ConfigError

FORMAT: Final = 1
"""Of the file. Fields are only added, with defaults."""
FILE_BYTES_MAX: Final = 512 * 1024 * 1024

Arrivals = Literal["closed", "poisson", "fixed", "trace"]
Unit = Literal["words", "tokens"]
Lengths = Literal["even", "sharegpt"]
Outcome = Literal["ok", "rejected", "failed"]


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count as good; None: no matter."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2e_ms))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. The same settings ask the same prompts, in an open loop at the same times."""

    target: Literal["nats", "http"] = "nats"
    url: str = ""  # without credentials
    model: str = ""
    arrivals: Arrivals = "closed"
    concurrency: int | None = None  # closed: so many at once
    rate_per_s: float | None = None  # poisson, fixed
    trace: str | None = None  # the file's name
    speedup: float = 1.0  # trace: its clock runs so much faster
    requests: int = 100
    issue_s_max: float = 300.0  # none is sent later
    lengths: Lengths = "even"  # drawn evenly between the limits; or as of ShareGPT's turns, cut at the limits
    input_min: int = 128  # words or tokens of a prompt
    input_max: int = 128
    output_min: int = 32
    output_max: int = 32
    unit: Unit = "words"
    shared_prefix: float = 0.0  # this share of a prompt is one of `prefixes`
    prefixes: int = 1
    block_tokens: int = 512  # trace: what a hash id stands for
    chat: bool = False
    ignore_eos: bool = True
    warmup: int = 8
    seed: int = 0
    deadline_s: float = 120.0
    slo: Slo = Slo()


class Seen(msgspec.Struct, kw_only=True):
    """What became of one request. Times in seconds since the run's start, taken when the bytes arrived."""

    index: int
    due_s: float  # when it was to be sent
    sent_s: float
    first_s: float | None = None  # the first piece with tokens
    last_s: float | None = None  # the last piece with tokens
    end_s: float = 0.0  # whatever ended it
    chunks: int = 0  # pieces with tokens
    prompt_tokens: int | None = None  # None: the server did not say
    cached_tokens: int | None = None
    output_tokens: int = 0  # as the server says, else `chunks`
    code: str = ""  # of its error; empty: it ended well
    status: int = 200  # as in HTTP


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Of one measure, in its unit. Percentiles are interpolated between neighbours."""

    count: int
    mean: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that kept the whole SLO. What was rejected, failed or never sent kept it not."""

    good: int
    of: int
    share: float
    requests_per_s: float
    output_tokens_per_s: float


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """How the load generator itself fared."""

    cpu_share: float  # of one core; at 1 it, not the server, is measured
    loop_lag_ms: Distribution | None = None  # how late its event loop came to a timer
    schedule_lag_ms: Distribution | None = None  # open loop: how late requests were sent
    in_flight_max: int = 0


class ProcessCpu(msgspec.Struct, frozen=True, kw_only=True):
    """What a process spent from the run's begin to its end, the second or so around it included."""

    name: str  # a worker's; or as --pid calls it
    role: str = ""
    cpu_s: float
    descendants_cpu_s: float = 0.0  # what it started: an engine's processes


class Transfers(msgspec.Struct, frozen=True, kw_only=True):
    """KV that prefill wrote to decode during the run, as the handshake's messages tell."""

    handshake_ms: Distribution | None = None  # from decode's sending of a transfer message to prefill's receiving
    write_ms: Distribution | None = None  # from handing a prompt's last KV to NIXL to the end of its write
    transfer_ms: Distribution | None = None  # from the transfer message to the end of the write: the forward pass too
    count: int = 0
    kv_bytes: int = 0


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a run. None: nothing was measured, or the server did not say."""

    duration_s: float  # from the first request's sending to the last one's end
    requests: int
    ok: int
    rejected: int  # turned away unserved: 429 and 503, without a token
    failed: int
    codes: dict[str, int]  # of all errors
    requests_per_s: float  # that ended well
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int | None = None
    prompt_tokens_per_s: float | None = None
    cached_share: float | None = None  # of the prompt tokens
    tokens_per_chunk: float | None = None
    ttft_ms: Distribution | None = None
    itl_ms: Distribution | None = None
    tpot_ms: Distribution | None = None
    e2e_ms: Distribution | None = None
    goodput: Goodput | None = None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the generator ran."""

    cpus: int
    system: str
    python: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    format: int = FORMAT
    label: str
    started_unix_s: float
    version: str  # of sglang-nats
    machine: Machine
    settings: Settings
    summary: Summary
    generator: Generator
    processes: tuple[ProcessCpu, ...] = ()
    transfers: Transfers | None = None
    warnings: tuple[str, ...] = ()
    requests: tuple[Seen, ...] = ()


def write(result: Result, path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", field="out") from None


def read(path: Path) -> Result:
    """Raises ConfigError where it is no result of a run."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is over {FILE_BYTES_MAX:,} bytes", field="file", limit=FILE_BYTES_MAX)
        found = msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="file") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no result of `bench`: {error}", field="file") from None
    if found.format > FORMAT:
        raise ConfigError(f"{path} is of a newer release (format {found.format})", field="file")
    return found
