"""The routes of /v1/files."""

from collections.abc import AsyncIterator
from typing import Final

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pipeline.errors import InvalidRequest, PayloadTooLarge
from pipeline.files import PURPOSES, Files
from pipeline.http.accounts import Accounts
from pipeline.http.bodies import DISCARDED_BYTES_MAX, json_response
from pipeline.http.openapi import described
from pipeline.http.openapi.operations import Documented
from pipeline.http.pages import page
from pipeline.refusals import clipped
from subjects import limits

FIELDS_MAX: Final = 8
FIELD_BYTES_MAX: Final = 4096
FORM_BYTES: Final = 64 * 1024
"""What a form has beside its file."""
READ_BYTES: Final = 256 * 1024
FILENAME_CHARS_MAX: Final = 256
ANCHOR: Final = "expires_after[anchor]"
SECONDS: Final = "expires_after[seconds]"


class FileRoutes:
    """What answers each route."""

    def __init__(self, accounts: Accounts, files: Files) -> None:
        self._accounts, self._files = accounts, files

    def routes(self) -> list[Documented]:
        return [
            Documented("/v1/files", self.upload, described.UPLOAD, methods=["POST"]),
            Documented("/v1/files", self.list, described.LIST_FILES),
            Documented("/v1/files/{file_id}", self.retrieve, described.FILE),
            Documented("/v1/files/{file_id}", self.delete, described.DELETE_FILE, methods=["DELETE"]),
            Documented("/v1/files/{file_id}/content", self.content, described.FILE_CONTENT),
        ]

    async def upload(self, request: Request) -> Response:
        client = await self._client(request)
        form = await _form(request)
        try:
            _check_names(form)
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise InvalidRequest("file: send the file as a part of this name", field="file")
            if purpose not in PURPOSES:
                raise InvalidRequest(f"purpose: must be one of {', '.join(PURPOSES)}", field="purpose")
            if not 1 <= (upload.size or 0) <= limits.FILE_BYTES_MAX:
                raise _size_error(upload.size or 0)
            filename, kept_s = (upload.filename or "file")[:FILENAME_CHARS_MAX], _kept_s(form)
            file = await self._files.put(client, _content(upload), filename=filename, purpose=purpose, kept_s=kept_s)
        finally:
            await form.close()
        return json_response(file.body())

    async def list(self, request: Request) -> Response:
        files = await self._files.list(await self._client(request))
        if (order := request.query_params.get("order", "desc")) not in ("asc", "desc"):
            raise InvalidRequest("order: must be asc or desc", field="order")
        purpose = request.query_params.get("purpose")
        bodies = [file.body() for file in files if purpose in (None, file.purpose)]
        return json_response(page(request, bodies[:: -1 if order == "desc" else 1], limit=10_000, limit_max=10_000))

    async def retrieve(self, request: Request) -> Response:
        file = await self._files.get(await self._client(request), request.path_params["file_id"])
        return json_response(file.body())

    async def delete(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await self._files.delete(await self._client(request), file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        client = await self._client(request)
        file = await self._files.get(client, request.path_params["file_id"])
        # A length, so that a download that breaks off cannot pass for a whole one.
        headers = {"Content-Length": str(file.size)}
        content = self._files.content(client, file.file_id)
        return StreamingResponse(content, headers=headers, media_type="application/octet-stream")

    async def _client(self, request: Request) -> str:
        return (await self._accounts.of(request.headers.get("authorization"))).client.name


async def _form(request: Request) -> FormData:
    """The form of an upload, its file on disk where it is large. Raises InvalidRequest, PayloadTooLarge."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequest("the body is no multipart/form-data", field="Content-Type")
    parser = MultiPartParser(
        request.headers, _bounded(request), max_files=1, max_fields=FIELDS_MAX, max_part_size=FIELD_BYTES_MAX
    )
    try:
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidRequest(f"the form cannot be read: {error}") from None


async def _bounded(request: Request) -> AsyncIterator[bytes]:
    """The body. Raises PayloadTooLarge, for a body that says its size before anything is kept of it."""
    size_max = limits.FILE_BYTES_MAX + FORM_BYTES
    said = request.headers.get("content-length", "0")
    if not said.isascii() or not said.isdecimal() or int(said) > size_max:
        await _discarded(request)
        raise _size_error(int(said) if said.isdecimal() else 0)
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > size_max:
            raise _size_error(size)
        yield part


async def _discarded(request: Request) -> None:
    """Read on for a while: a sender that is still sending does not hear an answer."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > DISCARDED_BYTES_MAX:
            return


async def _content(upload: UploadFile) -> AsyncIterator[bytes]:
    while part := await upload.read(READ_BYTES):
        yield part


def _check_names(form: FormData) -> None:
    """Raises InvalidRequest for a field that is none of ours, or is there twice: nothing is dropped in silence."""
    names = [name for name, _ in form.multi_items()]
    for name in names:
        if name not in ("file", "purpose", ANCHOR, SECONDS):
            raise InvalidRequest(f"{clipped(name)}: unknown field", field=clipped(name))
        if names.count(name) > 1:
            raise InvalidRequest(f"{name}: is there twice", field=name)


def _kept_s(form: FormData) -> float:
    """How long the file is to be kept. Raises InvalidRequest."""
    anchor, seconds = form.get(ANCHOR), form.get(SECONDS)
    if anchor is None and seconds is None:
        return limits.FILES_KEPT_S
    kept_s = int(seconds) if isinstance(seconds, str) and seconds.isdecimal() and len(seconds) <= 9 else 0
    if anchor != "created_at" or not limits.FILE_KEPT_S_MIN <= kept_s <= limits.FILES_KEPT_S:
        least, most = int(limits.FILE_KEPT_S_MIN), int(limits.FILES_KEPT_S)
        raise InvalidRequest(
            f"expires_after: needs the anchor created_at and {least} to {most} seconds", field="expires_after"
        )
    return kept_s


def _size_error(size: int) -> PayloadTooLarge | InvalidRequest:
    if not size:
        return InvalidRequest("file: is empty", field="file", size=0, limit=1)
    most = limits.FILE_BYTES_MAX
    return PayloadTooLarge(f"file: {size} bytes; a file has at most {most}", field="file", size=size, limit=most)
