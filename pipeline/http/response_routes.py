"""The routes of /v1/responses."""

import asyncio
import time
from typing import Any, Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeline.bus import Bucket, Bus
from pipeline.config import GatewaySettings
from pipeline.errors import (
    InvalidRequest,
    NotFound,
    OutputGone,
    Overloaded,
    PayloadTooLarge,
    from_failure,
)
from pipeline.follow import GRACE_S
from pipeline.http import visits
from pipeline.http.accounts import Account, Accounts
from pipeline.http.app import Gateway, ended_on_error
from pipeline.http.asked import Asked, parse_body
from pipeline.http.bodies import REQUEST_ID, json_response, read_body
from pipeline.http.exchange import EventStream, Exchange, events, first_frames, while_there
from pipeline.http.openapi import described
from pipeline.http.openapi.operations import Documented, Undocumented
from pipeline.http.pages import read_json
from pipeline.http.responses import (
    ID_PREFIX,
    Answer,
    ResponseEvents,
    ResponsesRequest,
    chat_fields,
    input_messages,
    parse_request,
    response_body,
)
from subjects import names
from subjects.codec import Format, decode, encode
from subjects.messages import StoredResponse

CANCEL_S_MAX: Final = 5.0
"""So long a cancellation is waited for before the response is told as it stands."""
FAILED: Final = "failed"
ABSENT: Final = {
    "compact": "conversations are not compacted here; send those messages that are to be kept",
    "input_tokens": "tokens are not counted apart here; every answer's usage has its input's",
}
"""Paths below /v1/responses that OpenAI has, and what to do instead."""

log = structlog.get_logger()


class ResponseRoutes:
    """What answers each route. What is kept of a response is in a KV bucket; its output so far in the log of frames."""

    def __init__(self, gateway: Gateway, accounts: Accounts, settings: GatewaySettings, bus: Bus, kept: Bucket) -> None:
        self._gateway, self._accounts, self._settings = gateway, accounts, settings
        self._bus, self._kept = bus, kept

    def routes(self) -> list[Route]:
        return [
            Documented("/v1/responses", self.create, described.RESPOND, methods=["POST"]),
            *(Undocumented(f"/v1/responses/{name}", self.absent, methods=["POST"]) for name in ABSENT),
            Documented("/v1/responses/{response_id}", self.retrieve, described.RESPONSE),
            Documented("/v1/responses/{response_id}", self.delete, described.DELETE_RESPONSE, methods=["DELETE"]),
            Documented("/v1/responses/{response_id}/cancel", self.cancel, described.CANCEL_RESPONSE, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        """Answer it, whole or as a stream. A client that leaves cancels it."""
        account = await self._account(request)
        fields = read_json(await read_body(request, self._settings.body_bytes_max), dict[str, Any])
        wanted, passed = parse_request(fields)
        messages = [*await self._conversation(account, wanted), *input_messages(wanted)]
        body = msgspec.json.encode(chat_fields(wanted, passed, messages))
        asked = parse_body(body, chat=True, client=account.client.name, request_s=self._settings.request_s)
        stored = StoredResponse(
            request_id=asked.request_id,
            model=asked.model,
            created_unix_s=time.time(),
            deadline_unix_s=asked.deadline_unix_s,
            settings=wanted.settings(passed, self._gateway.sampling(asked.model)),
            messages=tuple(messages),
        )
        visit = visits.current()
        visit.model, visit.request_id = asked.model, asked.request_id
        account.begin()
        exchange = self._gateway.begun(account, asked, request.headers.get("traceparent"))
        return await ended_on_error(exchange, self._answer(request, account, exchange, asked, stored))

    async def retrieve(self, request: Request) -> Response:
        """As it is now, or with `stream` its events behind `starting_after`, from the log."""
        account = await self._account(request)
        stream, after = _wanted(request)
        stored = await self._stored(account, request.path_params["response_id"])
        if not stream:
            return json_response(await self._now(account, stored))
        account.begin()
        exchange = Exchange(account.client.resume(stored.request_id), lambda _: account.end())
        told = ResponseEvents(stored, after)
        return await ended_on_error(exchange, self._streamed(request, exchange, told))

    async def absent(self, request: Request) -> Response:
        """A path of OpenAI's that is not served: without a route of its own it would be a response's id, and a 405."""
        await self._account(request)
        raise NotFound(f"{request.method} {request.url.path}: {ABSENT[request.url.path.rpartition('/')[2]]}")

    async def delete(self, request: Request) -> Response:
        account = await self._account(request)
        stored = await self._stored(account, request.path_params["response_id"])
        await self._kept.delete(names.owned_key(account.client.name, stored.request_id))
        return json_response({"id": ID_PREFIX + stored.request_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """End it, if it has not ended; then as it is."""
        account = await self._account(request)
        stored = await self._stored(account, request.path_params["response_id"])
        if (await self._now(account, stored))["status"] == "in_progress":
            await account.client.cancel(stored.request_id)
            await self._until_ended(account, stored.request_id)
        return json_response(await self._now(account, stored))

    async def _account(self, request: Request) -> Account:
        return await self._accounts.of(request.headers.get("authorization"))

    async def _answer(
        self, request: Request, account: Account, exchange: Exchange, asked: Asked, stored: StoredResponse
    ) -> Response:
        if stored.settings["store"] and not await self._keep(account, stored):
            stored = msgspec.structs.replace(stored, settings=stored.settings | {"store": False})
        told = ResponseEvents(stored, on_end=lambda answer: self._bus.spawn(self._end(account, answer)))
        if asked.stream:
            return await self._streamed(request, exchange, told)
        while frames := await while_there(request, exchange.take()):
            for frame in frames:
                told.answer.add(frame)
        await self._end(account, told.answer)
        if told.answer.failure is not None:
            raise from_failure(told.answer.failure)
        return json_response(told.answer.body(), headers={REQUEST_ID: stored.request_id})

    async def _streamed(self, request: Request, exchange: Exchange, told: ResponseEvents) -> Response:
        patience_s = self._settings.keep_alive_s
        frames = await while_there(request, first_frames(exchange, patience_s))
        begun = b"".join(map(told.event, frames or ()))
        headers = {REQUEST_ID: told.answer.stored.request_id}
        return EventStream(exchange, events(exchange, told, begun, frames, patience_s), headers)

    async def _conversation(self, account: Account, wanted: ResponsesRequest) -> list[dict[str, Any]]:
        """The messages before this request's own. Raises InvalidRequest, NotFound."""
        if wanted.previous_response_id is None:
            return []
        try:
            previous = await self._stored(account, wanted.previous_response_id)
        except NotFound as error:
            raise NotFound(f"previous_response_id: {error}", field="previous_response_id") from None
        body = await self._now(account, previous)
        if body["status"] not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"previous_response_id: that response is {body['status']}", field="previous_response_id"
            )
        said = "".join(part["text"] for item in body["output"] for part in item["content"])
        return [*previous.messages, {"role": "assistant", "content": said}]

    async def _stored(self, account: Account, response_id: str) -> StoredResponse:
        """What is kept of a response. Raises NotFound, BusUnavailable."""
        request_id = response_id.removeprefix(ID_PREFIX)
        known = response_id.startswith(ID_PREFIX) and names.is_token(request_id)
        found = await self._kept.get(names.owned_key(account.client.name, request_id)) if known else None
        if found is None:
            raise NotFound(f"there is no response {response_id[:72]!r}, or no longer", field="response_id")
        return decode(StoredResponse, found)

    async def _now(self, account: Account, stored: StoredResponse) -> dict[str, Any]:
        """A kept response's body as it is: from the log of frames where its end is not kept yet."""
        if stored.body is not None:
            return stored.body
        answer = Answer(stored)
        async for frame in account.client.stored(stored.request_id):
            answer.add(frame)
        if answer.ended:
            await self._end(account, answer)
        elif time.time() > stored.deadline_unix_s + GRACE_S:
            gone = OutputGone("its output is no longer kept")
            return response_body(stored, FAILED, [], failure=gone.failure())
        return answer.body()

    async def _until_ended(self, account: Account, request_id: str) -> None:
        """Wait until a request has ended, for a while."""
        try:
            async with asyncio.timeout(CANCEL_S_MAX):
                async for _ in account.client.resume(request_id):
                    pass
        except (TimeoutError, OutputGone):
            log.info("cancellation_not_seen", request_id=request_id, client=account.client.name)

    async def _end(self, account: Account, answer: Answer) -> None:
        """Keep the whole answer, if it is to be kept."""
        if answer.stored.settings["store"]:
            await self._keep(account, msgspec.structs.replace(answer.stored, body=answer.body()))

    async def _keep(self, account: Account, stored: StoredResponse) -> bool:
        """Whether it is kept. One that is too large, or finds the bucket full, is answered all the same."""
        key = names.owned_key(account.client.name, stored.request_id)
        try:
            await self._kept.put(key, encode(stored, Format.JSON))
        except (Overloaded, PayloadTooLarge) as error:
            log.warning("response_not_kept", request_id=stored.request_id, code=error.code, reason=str(error))
            return False
        return True


def _wanted(request: Request) -> tuple[bool, int]:
    """Whether a response is asked for as a stream, and behind which event. Raises InvalidRequest."""
    stream, text = request.query_params.get("stream", "false"), request.query_params.get("starting_after", "-1")
    if stream not in ("true", "false"):
        raise InvalidRequest("stream: must be true or false", field="stream")
    if text != "-1" and not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidRequest("starting_after: is no sequence number", field="starting_after")
    return stream == "true", int(text)
