"""The models that a preprocess worker knows of: declared in its settings, or registered by a worker's card."""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from pipeline.chat import ChatTokenizer, LoadedModel
from pipeline.errors import DeadlineExceeded, InvalidRequest, SetupError, UnknownModel
from pipeline.models import prepare_model
from pipeline.presence import Presence
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


class ServedModels:
    """Gives a model's tokenizer and limits once a worker serves it; until then its requests wait here."""

    def __init__(self, presence: Presence, declared: Mapping[str, str]) -> None:
        """`declared`: the paths of models to expect, by name; their requests wait for a first worker."""
        self._presence = presence
        self._declared = {token(name): path for name, path in declared.items()}
        self._tokenizers: dict[str, asyncio.Future[ChatTokenizer]] = {}  # by path

    async def load_declared(self) -> None:
        """Load the tokenizers of the declared models. Raises EngineStartError."""
        for path in self._declared.values():
            await self._tokenizer(path)

    async def ready(self, model: str, until_unix_s: float, role: Role = GENERATES) -> LoadedModel:
        """The model, once a worker of the role that serves it has registered and takes work.

        Raises UnknownModel for a name that was neither declared nor registered, InvalidRequest for a model that only
        the other role serves, and DeadlineExceeded where no worker of a known model is there by `until_unix_s`.
        """
        if not self._presence.ready(model, role):
            await self._wait(model, until_unix_s, role)
        cards = self._cards(model, role)
        path = self._declared.get(model) or cards[0].model_path
        try:
            tokenizer = await self._tokenizer(path)
        except SetupError as error:
            raise UnknownModel(
                f"model: {model!r} is served, but its tokenizer cannot be read here: {error}", field="model"
            ) from None
        return LoadedModel(
            name=model,
            tokenizer=tokenizer,
            context_len_tokens=min(card.context_len_tokens for card in cards),
            chat_template=cards[0].chat_template,
            embedding=cards[0].embedding,
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

    async def _tokenizer(self, path: str) -> ChatTokenizer:
        """Loaded once, off the event loop; a failure is raised to all that wait, and tried again by the next."""
        loading = self._tokenizers.get(path)
        if loading is None or (loading.done() and loading.exception()):
            loading = asyncio.ensure_future(asyncio.to_thread(_load, path))
            self._tokenizers[path] = loading
        return await asyncio.shield(loading)


def _load(path: str) -> ChatTokenizer:
    return ChatTokenizer.load(prepare_model(path))
