"""The models that a preprocess worker knows of: declared in its settings, or registered by a worker's card."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from pipeline.chat import ChatTokenizer, LoadedModel
from pipeline.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelUnavailable,
    PipelineError,
    SetupError,
    UnknownModel,
)
from pipeline.models import lies_here, prepare_model
from pipeline.presence import Presence
from pipeline.tokenizer_files import TokenizerCache
from subjects.messages import ModelCard, Role
from subjects.names import token

GENERATES: Final[Role] = "decode"
EMBEDS: Final[Role] = "embed"
"""Whose cards count: a model is ready when a worker of the role that a request needs has registered it."""
_OTHER: Final[dict[Role, Role]] = {GENERATES: EMBEDS, EMBEDS: GENERATES}
_REFUSED: Final[dict[Role, str]] = {
    GENERATES: "is served for embeddings alone: send `input`, to /v1/embeddings over HTTP",
    EMBEDS: "is served for text alone, and no worker embeds with it: send `messages` or `prompt`",
}
LOAD_S_MAX: Final = 60.0
RETRY_S: Final = 5.0
"""A tokenizer that could not be loaded is tried again by the first request after this time; until then its requests
get the same error at once."""
TOKENIZERS_MAX: Final = 64
"""Loaded at once; above that, the one that was not used for longest is dropped."""

Source = str | frozenset[tuple[str, str]]
"""Where a tokenizer comes from: a path on this machine, or files (name, SHA-256) of the object bucket."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Loading:
    tokenizer: asyncio.Task[ChatTokenizer]
    ended_s: float = 0.0

    def to_be_repeated(self) -> bool:
        done = self.tokenizer.done()
        failed = done and (self.tokenizer.cancelled() or self.tokenizer.exception() is not None)
        return failed and time.monotonic() - self.ended_s > RETRY_S


class ServedModels:
    """Gives a model's tokenizer and limits once a worker serves it; until then its requests wait here."""

    def __init__(self, presence: Presence, declared: Mapping[str, str], cache: TokenizerCache) -> None:
        """`declared`: the paths of models to expect, by name; their requests wait for a first worker.

        A path to something on this machine is where the tokenizer comes from. Else it comes from the files that the
        model's workers offer, by way of the `cache`.
        """
        self._presence = presence
        self._declared = {token(name): path for name, path in declared.items()}
        self._local = {name: path for name, path in self._declared.items() if lies_here(path)}
        self._cache = cache
        self._loaded: dict[Source, _Loading] = {}  # the last used last

    async def load_declared(self) -> None:
        """Load the declared models' tokenizers that are on this machine. Raises SetupError, ModelUnavailable."""
        for model, path in self._declared.items():
            if model in self._local:
                await self._tokenizer(path)
            else:
                log.info("model_not_here", model=model, reason=f"{path}: its tokenizer comes from its workers")

    async def ready(self, model: str, until_unix_s: float, role: Role = GENERATES) -> LoadedModel:
        """The model, once a worker of the role that serves it has registered and takes work.

        Raises UnknownModel for a name that was neither declared nor registered, InvalidRequest for a model that only
        the other role serves, DeadlineExceeded where no worker of a known model is there by `until_unix_s`, and
        ModelUnavailable where its tokenizer cannot be had.
        """
        if not self._presence.ready(model, role):
            await self._wait(model, until_unix_s, role)
        cards = self._cards(model, role)
        newest = max(cards, key=lambda card: card.started_unix_s)
        try:
            tokenizer = await self._tokenizer(self._source(model, newest))
        except (SetupError, ModelUnavailable) as error:
            raise ModelUnavailable(f"model: {model!r} is served, but {error}", field="model") from None
        return LoadedModel(
            name=model,
            tokenizer=tokenizer,
            context_len_tokens=min(card.context_len_tokens for card in cards),
            chat_template=newest.chat_template,
            embedding=newest.embedding,
        )

    async def _wait(self, model: str, until_unix_s: float, role: Role) -> None:
        presence, other = self._presence, _OTHER[role]
        if model not in self._declared and not presence.known(model, role) and not presence.known(model, other):
            names = ", ".join(sorted(self._declared.keys() | presence.models())) or "none"
            raise UnknownModel(f"model: no model {model!r} here; there are: {names}", field="model")

        def wrong() -> bool:
            return not presence.known(model, role) and presence.ready(model, other)

        timeout_s = until_unix_s - time.time()
        if not await presence.wait_for(lambda: presence.ready(model, role) or wrong(), timeout_s):
            raise DeadlineExceeded(f"deadline: no worker served {model!r} before it passed", field="deadline")
        if not presence.ready(model, role):
            raise InvalidRequest(f"model: {model!r} {_REFUSED[role]}", field="model")

    def _cards(self, model: str, role: Role) -> list[ModelCard]:
        return [state.card for state in self._presence.workers(role, model) if state.card and state.ready]

    def _source(self, model: str, card: ModelCard) -> Source:
        """What the settings say, where it is here; else what the card's worker offers, else what it has itself."""
        if path := self._local.get(model):
            return path
        return frozenset(card.tokenizer_files.items()) or self._declared.get(model) or card.model_path

    async def _tokenizer(self, source: Source) -> ChatTokenizer:
        """Loaded once for all that wait for it."""
        loading = self._loaded.pop(source, None)
        if loading is None or loading.to_be_repeated():
            loading = _Loading(asyncio.create_task(self._load(source), name="tokenizer"))
            loading.tokenizer.add_done_callback(lambda _, it=loading: _note_end(it))
        self._loaded[source] = loading
        if len(self._loaded) > TOKENIZERS_MAX:
            del self._loaded[next(iter(self._loaded))]
        return await asyncio.shield(loading.tokenizer)

    async def _load(self, source: Source) -> ChatTokenizer:
        """Off the event loop. Raises SetupError, ModelUnavailable, BusUnavailable."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(LOAD_S_MAX):
                if isinstance(source, str):
                    folder = await asyncio.to_thread(prepare_model, source)
                else:
                    folder = await self._cache.folder(dict(source))
                loaded = await asyncio.to_thread(ChatTokenizer.load, folder)
        except TimeoutError:
            raise ModelUnavailable(f"its tokenizer could not be loaded within {LOAD_S_MAX:g} s") from None
        log.info("tokenizer_loaded", reason=str(folder), duration_ms=round(1e3 * (time.monotonic() - began_s)))
        return loaded


def _note_end(loading: _Loading) -> None:
    """Say why a tokenizer could not be loaded, whether anyone still waits for it or not."""
    loading.ended_s = time.monotonic()
    error = None if loading.tokenizer.cancelled() else loading.tokenizer.exception()
    if error is not None:
        code = error.code if isinstance(error, PipelineError) else type(error).__name__
        log.warning("tokenizer_not_loaded", code=code, reason=str(error))
