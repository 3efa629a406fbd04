"""Batches, as /v1/batches has them: their state in a KV bucket, written only in the place of the state that was read.

So a batch has one owner at a time. A gateway that works on one writes it every `LEASE_RENEW_S`; one that finds a state
unchanged for `LEASE_S` takes the batch over, and the earlier owner's next write is refused.
"""

import re
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

import msgspec

from pipeline.batch import URLS
from pipeline.bucket import OnChange, Watch
from pipeline.bus import Bucket
from pipeline.checks import check_count
from pipeline.errors import Busy, InvalidRequest, NotFound
from subjects import limits, names
from subjects.codec import Format, decode, encode
from subjects.messages import BatchState

ENDED: Final = ("failed", "completed", "expired", "cancelled")
TRIES_MAX: Final = 16
"""Of a change that others' changes come before."""
WINDOW: Final = re.compile(r"([1-9]\d{0,4})([smh])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}

Change = Callable[[BatchState], BatchState]


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None

    def window_s(self) -> float:
        """How long the batch may take. Raises InvalidRequest."""
        found = WINDOW.fullmatch(self.completion_window)
        seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
        if not 0 < seconds <= limits.BATCH_S_MAX:
            raise InvalidRequest(
                "completion_window: say 24h, OpenAI's only one, or less in h, m or s", field="completion_window"
            )
        return seconds

    def check(self) -> None:
        """Raises InvalidRequest."""
        self.window_s()
        if self.endpoint not in URLS:
            raise InvalidRequest(f"endpoint: is none of {', '.join(URLS)}", field="endpoint")
        check_metadata(self.metadata)


class Batches:
    """All clients' batches; each sees its own."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def create(self, client: str, request: BatchRequest) -> BatchState:
        """Accept a batch that was checked: when this returns, some gateway will work on it. Raises Overloaded."""
        now_unix_s = time.time()
        state = BatchState(
            batch_id=f"batch_{uuid.uuid4().hex}",
            client=client,
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            created_unix_s=now_unix_s,
            expires_unix_s=now_unix_s + request.window_s(),
            metadata=request.metadata,
        )
        await self._bucket.put(names.owned_key(client, state.batch_id), encode(state, Format.JSON))
        return state

    async def get(self, client: str, batch_id: str) -> BatchState:
        """Raises NotFound, BusUnavailable."""
        return (await self._read(client, batch_id))[0]

    async def list(self, client: str) -> list[BatchState]:
        """A client's batches, the newest first."""
        mine = names.owned_key(client, "_").removesuffix("_")
        entries = await self._bucket.entries()
        found = [decode(BatchState, value) for key, value in entries.items() if key.startswith(mine)]
        return sorted(found, key=lambda state: (state.created_unix_s, state.batch_id), reverse=True)

    async def change(self, client: str, batch_id: str, change: Change) -> BatchState:
        """Write what `change` makes of the state, read again wherever someone else wrote first; the state then.

        What `change` raises ends it; a state that comes back as it is is not written. Raises NotFound, Busy.
        """
        for _ in range(TRIES_MAX):
            state, revision = await self._read(client, batch_id)
            changed = change(state)
            if changed is state:
                return state
            try:
                await self._bucket.replace(names.owned_key(client, batch_id), encode(changed, Format.JSON), revision)
            except Busy:
                continue
            return changed
        raise Busy(f"{batch_id} is written by others again and again")

    async def cancel(self, client: str, batch_id: str) -> BatchState:
        """Have its owner end it; one that has ended stays so. Raises NotFound."""

        def cancelled(state: BatchState) -> BatchState:
            if state.status in (*ENDED, "cancelling"):
                return state
            return msgspec.structs.replace(state, status="cancelling", cancelling_unix_s=time.time())

        return await self.change(client, batch_id, cancelled)

    async def watch(self, on_change: OnChange) -> Watch:
        """Call `on_change(key, value)` for each batch, and each change of one."""
        return await self._bucket.watch(on_change)

    async def _read(self, client: str, batch_id: str) -> tuple[BatchState, int]:
        found = await self._bucket.entry(names.owned_key(client, batch_id)) if names.is_token(batch_id) else None
        if found is None:
            raise NotFound(f"there is no batch {batch_id[: names.TOKEN_CHARS_MAX]!r}", field="batch_id")
        return decode(BatchState, found[0]), found[1]


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Within OpenAI's limits. Raises InvalidRequest."""
    check_count("metadata", len(metadata or {}), limits.METADATA_MAX)
    for key, value in (metadata or {}).items():
        field = f"metadata.{key[: limits.METADATA_KEY_CHARS_MAX]}"
        check_count(field, len(key), limits.METADATA_KEY_CHARS_MAX, least=1, of="characters")
        check_count(field, len(value), limits.METADATA_VALUE_CHARS_MAX, of="characters")


def batch_body(state: BatchState) -> dict[str, Any]:
    """A batch as OpenAI's API gives it."""
    errors = [
        {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
        for error in state.errors
    ]
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled", "expires")
    return {
        "id": state.batch_id,
        "object": "batch",
        "endpoint": state.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": state.input_file_id,
        "completion_window": state.completion_window,
        "status": state.status,
        "output_file_id": state.output_file_id,
        "error_file_id": state.error_file_id,
        "created_at": int(state.created_unix_s),
        **{f"{name}_at": _moment(msgspec.structs.asdict(state)[f"{name}_unix_s"]) for name in times},
        "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
        "metadata": state.metadata,
    }


def _moment(unix_s: float) -> int | None:
    return int(unix_s) if unix_s else None
