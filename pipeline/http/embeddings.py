"""/v1/embeddings: OpenAI's embedding request over HTTP.

It goes on in MessagePack, whatever the client's format: vectors come back as bytes, from which base64 and numbers are
one step away.
"""

import asyncio
import time
import uuid
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from pipeline.config import GatewaySettings
from pipeline.embeddings import Embeddings
from pipeline.errors import InvalidRequest
from pipeline.http.accounts import Account, Accounts
from pipeline.http.asked import check_names, decoded, refuse_fields_of
from pipeline.http.bodies import REQUEST_ID, json_response, read_body
from pipeline.http.exchange import while_there
from pipeline.openai import inputs_of

FORMAT_DEFAULT: Final = "float"


class Embedder:
    """Answers the route."""

    def __init__(self, accounts: Accounts, settings: GatewaySettings) -> None:
        self._accounts, self._settings = accounts, settings

    async def embed(self, request: Request) -> Response:
        """A client that leaves cancels its request; a gateway that stops cancels nothing."""
        account = await self._accounts.of(request.headers.get("authorization"))
        fields = decoded(await read_body(request, self._settings.body_bytes_max))
        refuse_fields_of(fields, "messages", "prompt")
        check_names(fields, account.client.name)
        if fields.get("input") is None:
            raise InvalidRequest("input: is required: a text, a list of texts, or token ids", field="input")
        answer = Embeddings(fields.get("request_id") or uuid.uuid4().hex, fields["model"], inputs_of(fields["input"]))
        account.begin()
        try:
            await while_there(request, self._collect(account, answer, fields, request.headers.get("traceparent")))
        except ClientDisconnect:
            await account.client.cancel(answer.request_id)
            raise
        finally:
            account.end()
        return await asyncio.to_thread(_whole, answer, fields.get("encoding_format") or FORMAT_DEFAULT)

    async def _collect(
        self, account: Account, answer: Embeddings, fields: dict[str, Any], traceparent: str | None
    ) -> None:
        deadline, default_unix_s = fields.get("deadline"), time.time() + self._settings.request_s
        known = isinstance(deadline, int | float) and not isinstance(deadline, bool)
        own = {"request_id": answer.request_id, "deadline": default_unix_s if deadline is None else deadline}
        try:
            payload = msgspec.msgpack.encode(fields | own)
        except OverflowError:
            raise InvalidRequest("the body has a whole number of more than 64 bits") from None
        await account.client.collect(
            answer, payload, deadline_unix_s=deadline if known else default_unix_s, traceparent=traceparent
        )


def _whole(answer: Embeddings, encoding_format: str) -> Response:
    """The answer's body: megabytes for many inputs, so not on the event loop."""
    return json_response(answer.body(encoding_format), headers={REQUEST_ID: answer.request_id})
