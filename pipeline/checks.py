"""Limits on numbers and counts: each error names the field, the value's size and the limit."""

from collections.abc import Sequence

from pipeline.errors import InvalidRequest


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest naming the first id outside [0, vocab_size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
        raise not_a_token(f"{field}.{index}", bad, vocab_size)


def not_a_token(field: str, value: int, vocab_size: int) -> InvalidRequest:
    return out_of_range(field, value, f"a token id below {vocab_size}", vocab_size - 1)


def check_range(field: str, value: float | None, low: float, high: float, *, above_low: bool = False) -> None:
    """Raises InvalidRequest for a number outside [low, high], or (low, high]; NaN is outside of any range."""
    if value is None or (low <= value <= high and not (above_low and value == low)):
        return
    bracket = "(" if above_low else "["
    limit = low if value < low or (above_low and value == low) else high
    raise out_of_range(field, value, f"in {bracket}{low:g}, {high:g}]", limit)


def check_count(field: str, count: int, most: int, *, least: int = 0, of: str = "entries") -> None:
    if not least <= count <= most:
        limit, word = (least, "at least") if count < least else (most, "at most")
        raise InvalidRequest(f"{field}: {count} {of}; {word} {limit} are allowed", field=field, size=count, limit=limit)


def out_of_range(field: str, value: float, allowed: str, limit: float) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {number_text(value)} is not allowed; it must be {allowed}",
        field=field,
        size=size_of(value),
        limit=size_of(limit),
    )


def number_text(value: float) -> str:
    """A number in an error; one of a thousand digits by its length, which Python would refuse to print."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return f"{value}"


def size_of(value: float) -> float | None:
    """A number as it can travel in an error: NaN, infinities and very large integers cannot."""
    return value if abs(value) < 2**63 else None
