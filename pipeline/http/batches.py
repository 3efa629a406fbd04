"""The routes of /v1/batches."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from pipeline.batches import Batches, BatchRequest, batch_body
from pipeline.errors import InvalidRequest
from pipeline.files import Files
from pipeline.http.accounts import Accounts
from pipeline.http.bodies import json_response, read_body
from pipeline.http.openapi import described
from pipeline.http.openapi.operations import Documented
from pipeline.http.pages import page, read_json

BODY_BYTES_MAX: Final = 64 * 1024


class BatchRoutes:
    """What answers each route. The work is `pipeline.batch_runner`'s, here or at another gateway."""

    def __init__(self, accounts: Accounts, files: Files, batches: Batches) -> None:
        self._accounts, self._files, self._batches = accounts, files, batches

    def routes(self) -> list[Documented]:
        return [
            Documented("/v1/batches", self.create, described.CREATE_BATCH, methods=["POST"]),
            Documented("/v1/batches", self.list, described.LIST_BATCHES),
            Documented("/v1/batches/{batch_id}", self.retrieve, described.BATCH),
            Documented("/v1/batches/{batch_id}/cancel", self.cancel, described.CANCEL_BATCH, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        client = await self._client(request)
        asked = read_json(await read_body(request, BODY_BYTES_MAX), BatchRequest)
        asked.check()
        file = await self._files.get(client, asked.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequest(
                "input_file_id: the file was not uploaded for the purpose batch", field="input_file_id"
            )
        return json_response(batch_body(await self._batches.create(client, asked)))

    async def list(self, request: Request) -> Response:
        states = await self._batches.list(await self._client(request))
        return json_response(page(request, [batch_body(state) for state in states], limit=20, limit_max=100))

    async def retrieve(self, request: Request) -> Response:
        state = await self._batches.get(await self._client(request), request.path_params["batch_id"])
        return json_response(batch_body(state))

    async def cancel(self, request: Request) -> Response:
        state = await self._batches.cancel(await self._client(request), request.path_params["batch_id"])
        return json_response(batch_body(state))

    async def _client(self, request: Request) -> str:
        return (await self._accounts.of(request.headers.get("authorization"))).client.name
