"""Traces of real traffic in Mooncake's form: a line of JSON a request, without its words. Pure but for the reading.

`timestamp` is in ms, `input_length` and `output_length` are in tokens, and each of `hash_ids` stands for a block of 512
prompt tokens: requests that begin with the same ids begin with the same text. Source: kvcache-ai/Mooncake,
FAST25-release.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from pipeline.bench.prompts import Prompt, draw, prompt_of
from pipeline.bench.result import Unit
from pipeline.errors import ConfigError

LINES_MAX: Final = 200_000
LINE_BYTES_MAX: Final = 1024 * 1024


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a trace; fields that we do not know are left out."""

    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read(path: Path, requests_max: int) -> list[Traced]:
    """The first requests of a trace, by time, the first at 0 ms. Raises ConfigError with the line that is wrong."""
    try:
        with path.open("rb") as lines:
            return parse(lines, requests_max, str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="trace") from None


def parse(lines: Iterable[bytes], requests_max: int, name: str = "the trace") -> list[Traced]:
    """See `read`."""
    decoder, found = msgspec.json.Decoder(Traced), []
    for number, line in enumerate(lines, 1):
        if number > LINES_MAX or len(found) >= requests_max:
            break
        if not line.strip():
            continue
        if len(line) > LINE_BYTES_MAX:
            raise ConfigError(f"{name}, line {number}: over {LINE_BYTES_MAX:,} bytes", field="trace")
        try:
            found.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}, line {number}: {error}", field="trace") from None
        if found[-1].input_length < 1 or found[-1].output_length < 1:
            raise ConfigError(f"{name}, line {number}: a length below 1", field="trace")
    if not found:
        raise ConfigError(f"{name} has no requests", field="trace")
    found.sort(key=lambda traced: traced.timestamp)
    began_ms = found[0].timestamp
    return [msgspec.structs.replace(traced, timestamp=traced.timestamp - began_ms) for traced in found]


def prompt(traced: Traced, index: int, *, block_tokens: int, unit: Unit, seed: int) -> Prompt:
    """A prompt of `input_length` units that begins as others do whose first ids are the same.

    What the ids do not cover is the request's own.
    """
    units: list[int] = []
    for hash_id in traced.hash_ids:
        if len(units) >= traced.input_length:
            break
        units += draw(f"{seed}/block/{hash_id}", block_tokens, unit)
    own = traced.input_length - len(units)
    units = units[: traced.input_length] + (draw(f"{seed}/rest/{index}", own, unit) if own > 0 else [])
    return prompt_of(units, unit)
