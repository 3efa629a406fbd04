"""Whom a load is sent to: models on NATS, or any server that speaks OpenAI's HTTP API."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from pipeline.bench.plan import Work
from pipeline.bench.result import Settings
from pipeline.client import Client
from pipeline.errors import BusUnavailable, ConfigError, PipelineError

if TYPE_CHECKING:
    import aiohttp

CONNECT_S_MAX: Final = 10.0
LINE_BYTES_MAX: Final = 1024 * 1024
EVENT: Final = b"data:"
LAST_EVENT: Final = b"[DONE]"


class Record:
    """What becomes of one request, as its target tells it. Times are of `time.perf_counter`."""

    def __init__(self) -> None:
        self.arrivals_s: list[float] = []  # of pieces with tokens
        self.tokens = 0
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.code, self.status = "", 200

    def piece(self, tokens: int) -> None:
        """Tokens have come just now."""
        self.arrivals_s.append(time.perf_counter())
        self.tokens += tokens

    def used(self, prompt_tokens: int, output_tokens: int, cached_tokens: int | None) -> None:
        """The server's own count, which is better than ours."""
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens
        self.tokens = output_tokens

    def failed(self, code: str, status: int) -> None:
        self.code, self.status = code, status


class Target(Protocol):
    """Something that answers."""

    async def ask(self, work: Work, record: Record) -> None:
        """Send one request and fill in its record, whatever comes: only cancellation is raised."""


class NatsTarget:
    """A model on NATS."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._client, self._settings = client, settings
        self._common = {"temperature": 0.0, "ignore_eos": settings.ignore_eos}

    async def ask(self, work: Work, record: Record) -> None:
        asked = {"messages": _messages(work)} if self._settings.chat else {"prompt": work.prompt}
        deadline_unix_s = time.time() + self._settings.deadline_s
        frames = self._client.generate(
            model=self._settings.model,
            max_tokens=work.output_tokens,
            deadline=deadline_unix_s,
            **asked,
            **self._common,
        )
        try:
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    if frame.token_ids:
                        record.piece(len(frame.token_ids))
                    if frame.usage is not None:
                        usage = frame.usage
                        record.used(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
                    if frame.error is not None:
                        record.failed(frame.error.code, frame.error.status)
        except PipelineError as error:
            record.failed(error.code, error.status)


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None  # of a completion
    delta: _Delta | None = None  # of a chat


class _Chunk(msgspec.Struct):
    """An event of a stream, as far as it matters here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_CHUNK: Final = msgspec.json.Decoder(_Chunk)


class HttpTarget:
    """A server that speaks OpenAI's API. A piece is an event whose text is not empty."""

    def __init__(self, session: "aiohttp.ClientSession", settings: Settings) -> None:
        import aiohttp

        self._session, self._settings = session, settings
        self._broken = (aiohttp.ClientError, TimeoutError, OSError)
        base = settings.url.removesuffix("/").removesuffix("/v1")
        self._url = f"{base}/v1/{'chat/completions' if settings.chat else 'completions'}"
        self._common = {
            "model": settings.model,
            "temperature": 0.0,
            "ignore_eos": settings.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def ask(self, work: Work, record: Record) -> None:
        asked = {"messages": _messages(work)} if self._settings.chat else {"prompt": work.prompt}
        body = msgspec.json.encode(self._common | asked | {"max_tokens": work.output_tokens})
        try:
            async with (
                asyncio.timeout(self._settings.deadline_s),
                self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as response,
            ):
                if response.status != 200:
                    record.failed(f"http_{response.status}", response.status)
                    return
                if not await self._read(response, record):
                    record.failed("broken_off", 502)
        except TimeoutError:
            record.failed("deadline_exceeded", 504)
        except self._broken as error:
            record.failed(type(error).__name__, 502)
        except (msgspec.MsgspecError, ValueError):
            record.failed("unreadable", 502)

    async def _read(self, response: "aiohttp.ClientResponse", record: Record) -> bool:
        """Take in a stream's events; whether it came to its end."""
        async for line in response.content:
            if not line.startswith(EVENT):
                continue
            event = line[len(EVENT) :].strip()
            if event == LAST_EVENT:
                return True
            chunk = _CHUNK.decode(event)
            if chunk.error is not None:
                record.failed(_code_of(chunk.error), 500)
                return True
            if any(map(_says, chunk.choices)):
                record.piece(1)
            if chunk.usage is not None:
                details = chunk.usage.prompt_tokens_details
                cached = None if details is None else details.cached_tokens
                record.used(chunk.usage.prompt_tokens, chunk.usage.completion_tokens, cached)
        return False


def _says(choice: _Choice) -> bool:
    delta = choice.delta
    return bool(choice.text or (delta and (delta.content or delta.reasoning_content or delta.tool_calls)))


def _code_of(error: Any) -> str:
    return str(error.get("code") or error.get("type") or "error") if isinstance(error, dict) else "error"


def _messages(work: Work) -> list[dict[str, str]]:
    assert isinstance(work.prompt, str), "settings do not allow tokens in a chat"
    return [{"role": "user", "content": work.prompt}]


@contextlib.asynccontextmanager
async def over_nats(url: str, settings: Settings) -> AsyncIterator[NatsTarget]:
    """Raises BusConnectError."""
    async with Client.connect(url) as client:
        yield NatsTarget(client, settings)


@contextlib.asynccontextmanager
async def http_session(url: str, key: str | None) -> AsyncIterator["aiohttp.ClientSession"]:
    """Connections to a server, as many as are asked for. Raises ConfigError without aiohttp."""
    try:
        import aiohttp
    except ImportError:
        raise ConfigError("a load over HTTP needs aiohttp: pip install 'sglang-nats[bench]'", field="url") from None
    about = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers=about, timeout=timeout, read_bufsize=LINE_BYTES_MAX
    ) as session:
        yield session


async def http_model(session: "aiohttp.ClientSession", url: str) -> str:
    """The model of a server that serves one. Raises ConfigError, BusUnavailable where the server cannot be asked."""
    import aiohttp

    address = f"{url.removesuffix('/').removesuffix('/v1')}/v1/models"
    try:
        async with asyncio.timeout(CONNECT_S_MAX), session.get(address) as response:
            response.raise_for_status()
            models = [model["id"] for model in msgspec.json.decode(await response.read())["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise BusUnavailable(f"{address} does not answer: {error or type(error).__name__}") from None
    except (msgspec.MsgspecError, KeyError, TypeError):
        raise ConfigError(f"{address} does not answer with OpenAI's list of models", field="url") from None
    if len(models) != 1:
        raise ConfigError(f"say which model with --model NAME: there are {', '.join(models) or 'none'}", field="model")
    return models[0]
