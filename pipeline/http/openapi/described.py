"""What each of the gateway's routes takes and answers, for `Documented` routes; each stands where it is used."""

from typing import Any, Final

from pipeline import errors
from pipeline.files import PURPOSES
from pipeline.http.bodies import REQUEST_ID
from pipeline.http.openapi import answers
from pipeline.http.openapi.operations import FORM, Operation, Schema

_STORE: Final = (errors.NotPermitted, errors.BusUnavailable, errors.BrokerRefused)
"""Of whatever asks the broker."""
_BUSY: Final = (errors.Overloaded,)
_READ: Final = (errors.InvalidRequest, errors.PayloadTooLarge)
"""Of whatever has a body."""
_ANSWERED: Final = (
    errors.OutputGone,
    errors.DeadlineExceeded,
    errors.Cancelled,
    errors.EngineFailed,
    errors.AttemptsExhausted,
    errors.EngineSuspended,
    errors.EngineDied,
    errors.PrefillLost,
    errors.WorkerGone,
)
"""How a request can end that was accepted."""
_ASKED: Final = (
    *_READ,
    errors.PromptTooLong,
    errors.UnknownModel,
    errors.ModelUnavailable,
    *_BUSY,
    *_ANSWERED,
    *_STORE,
)


def _parameter(where: str, name: str, schema: Schema, about: str) -> Schema:
    return {"name": name, "in": where, "required": False, "schema": schema, "description": about}


def _page(limit: int, limit_max: int) -> tuple[Schema, ...]:
    number = {"type": "integer", "minimum": 1, "maximum": limit_max, "default": limit}
    return (
        _parameter("query", "after", {"type": "string"}, "The id behind which the page begins."),
        _parameter("query", "limit", number, "The most that a page has."),
    )


_TRACE: Final = _parameter("header", "traceparent", {"type": "string"}, "The caller's place in its trace (W3C).")
_CURSOR: Final = "An event's id, which says what the reader has; without one, from the first token."


def _asking(
    name: str, tag: str, summary: str, body: str, answer: Any, events: tuple[Any, ...], *raises: Any, **more: Any
) -> Operation:
    """A request for the engines."""
    return Operation(
        name=name,
        tag=tag,
        summary=summary,
        body=body,
        parameters=(_TRACE,),
        answer=answer,
        events=events,
        headers=(REQUEST_ID,),
        raises=(*_ASKED, *raises),
        **more,
    )


CHAT: Final = _asking(
    "createChatCompletion",
    "text",
    "Answer a conversation, whole or as a stream. A client that leaves cancels it.",
    "ChatCompletionRequest",
    answers.ChatCompletion,
    (answers.ChatCompletionChunk,),
)
COMPLETE: Final = _asking(
    "createCompletion",
    "text",
    "Go on from a prompt, or several, whole or as a stream. A client that leaves cancels it.",
    "CompletionRequest",
    answers.TextCompletion,
    (answers.TextCompletionChunk,),
)
EMBED: Final = _asking(
    "createEmbedding",
    "embeddings",
    "A vector for each input. A client that leaves cancels it.",
    "EmbeddingRequest",
    answers.EmbeddingList,
    (),
)
RESUME: Final = Operation(
    name="resumeStream",
    tag="text",
    summary="The rest of an answer's stream, whichever gateway began it. Leaving it does not cancel the request.",
    parameters=(
        _parameter("header", "Last-Event-ID", {"type": "string"}, _CURSOR),
        _parameter("query", "last_event_id", {"type": "string"}, "The same, for who cannot set a header."),
    ),
    events=(answers.ChatCompletionChunk, answers.TextCompletionChunk),
    headers=(REQUEST_ID,),
    raises=_ASKED,  # a request that was refused is answered so again
)
LIST_MODELS: Final = Operation(
    name="listModels", tag="models", summary="Every model that a worker serves.", answer=answers.ModelList
)
MODEL: Final = Operation(
    name="retrieveModel",
    tag="models",
    summary="One model, by its name, slashes and all, or by its name on NATS.",
    answer=answers.Model,
    raises=(errors.UnknownModel,),
)
LIVE: Final = Operation(
    name="health",
    tag="health",
    summary="Whether the gateway's process is well: 503 where it should be started again.",
    answer=answers.Liveness,
    statuses={200: "It is.", 503: "It is not."},
    keyed=False,
)
READY: Final = Operation(
    name="ready",
    tag="health",
    summary="Whether the gateway can serve now, and which models.",
    answer=answers.Readiness,
    statuses={200: "It can.", 503: "It cannot."},
    keyed=False,
)
DOCUMENT: Final = Operation(
    name="openapi",
    tag="health",
    summary="This document.",
    answer=dict[str, Any],
    keyed=False,
)

# --- files and batches --------------------------------------------------------------------------------

UPLOAD: Final = Operation(
    name="createFile",
    tag="files",
    summary="Keep a file.",
    body="FileUpload",
    body_media=FORM,
    answer=answers.FileObject,
    leads_to=tuple((name, "file_id") for name in ("retrieveFile", "downloadFile", "deleteFile")),
    raises=(*_READ, *_BUSY, *_STORE),
)
LIST_FILES: Final = Operation(
    name="listFiles",
    tag="files",
    summary="The client's files, the newest first.",
    parameters=(
        *_page(10_000, 10_000),
        _parameter("query", "order", {"enum": ["asc", "desc"], "default": "desc"}, "By their time."),
        _parameter("query", "purpose", {"type": "string"}, f"Only those for it, e.g. {PURPOSES[0]}."),
    ),
    answer=answers.FileList,
    raises=(errors.InvalidRequest, errors.NotFound, *_STORE),
)
FILE: Final = Operation(
    name="retrieveFile",
    tag="files",
    summary="What is known of a file.",
    answer=answers.FileObject,
    raises=(errors.NotFound, *_STORE),
)
DELETE_FILE: Final = Operation(
    name="deleteFile",
    tag="files",
    summary="Remove a file.",
    answer=answers.DeletedFile,
    raises=(errors.NotFound, *_STORE),
)
FILE_CONTENT: Final = Operation(
    name="downloadFile",
    tag="files",
    summary="A file's bytes.",
    media=("application/octet-stream",),
    raises=(errors.NotFound, errors.ObjectNotFound, errors.ObjectDamaged, *_STORE),
)
CREATE_BATCH: Final = Operation(
    name="createBatch",
    tag="batches",
    summary="Answer a file of requests, at whichever gateway has the time.",
    body="BatchRequest",
    answer=answers.Batch,
    leads_to=tuple((name, "batch_id") for name in ("retrieveBatch", "cancelBatch")),
    raises=(*_READ, errors.NotFound, *_BUSY, *_STORE),
)
LIST_BATCHES: Final = Operation(
    name="listBatches",
    tag="batches",
    summary="The client's batches, the newest first.",
    parameters=_page(20, 100),
    answer=answers.BatchList,
    raises=(errors.InvalidRequest, errors.NotFound, *_STORE),
)
BATCH: Final = Operation(
    name="retrieveBatch",
    tag="batches",
    summary="How far a batch is.",
    answer=answers.Batch,
    raises=(errors.NotFound, *_STORE),
)
CANCEL_BATCH: Final = Operation(
    name="cancelBatch",
    tag="batches",
    summary="Have a batch end; what is answered is kept.",
    answer=answers.Batch,
    raises=(errors.NotFound, errors.Busy, *_STORE),
)

# --- responses ----------------------------------------------------------------------------------------

RESPOND: Final = _asking(
    "createResponse",
    "responses",
    "Answer an input, whole or as a stream of typed events, and keep the answer unless `store` is false.",
    "ResponsesRequest",
    answers.Response,
    answers.RESPONSE_EVENTS,
    errors.NotFound,
    leads_to=tuple((name, "response_id") for name in ("getResponse", "cancelResponse", "deleteResponse")),
)
RESPONSE: Final = Operation(
    name="getResponse",
    tag="responses",
    summary="A response as it is now, or its events.",
    parameters=(
        _parameter("query", "stream", {"type": "boolean", "default": False}, "Its events instead of its body."),
        _parameter(
            "query",
            "starting_after",
            {"type": "integer", "minimum": -1, "maximum": 999_999_999},
            "With `stream`: only the events behind this sequence number.",
        ),
    ),
    answer=answers.Response,
    events=answers.RESPONSE_EVENTS,
    raises=(*_ASKED, errors.NotFound),
)
DELETE_RESPONSE: Final = Operation(
    name="deleteResponse",
    tag="responses",
    summary="Forget a response.",
    answer=answers.DeletedResponse,
    raises=(errors.NotFound, *_STORE),
)
CANCEL_RESPONSE: Final = Operation(
    name="cancelResponse",
    tag="responses",
    summary="End a response, if it has not ended; then as it is.",
    answer=answers.Response,
    raises=(errors.NotFound, *_STORE),
)

# --- the console, where it is on ----------------------------------------------------------------------


def _console(name: str, summary: str, answer: Any, *raises: Any, **more: Any) -> Operation:
    refusals = (errors.NotPermitted, *raises)
    return Operation(name=f"console{name}", tag="console", summary=summary, answer=answer, raises=refusals, **more)


_LOOK: Final = (errors.NotFound, errors.BusUnavailable, errors.BrokerRefused)
_JSON_ONLY: Final = (errors.InvalidRequest, errors.NotFound, *_BUSY, errors.PayloadTooLarge, *_STORE)
_CLIENT: Final = _parameter("query", "client", {"type": "string"}, "Where several clients have a request of this id.")

SESSION: Final = _console("Session", "Whether a key is good, or needed at all.", answers.Session)
STATES: Final = _console("States", "The pipeline, about once a second.", None, *_BUSY, events=(dict[str, Any],))
TIMELINE: Final = _console(
    "Trace", "A request's timeline.", answers.Timeline, errors.InvalidRequest, *_LOOK, parameters=(_CLIENT,)
)
LETTERS: Final = _console("Letters", "The newest dead letters.", answers.Letters, *_LOOK)
LETTER: Final = _console("Letter", "A dead letter.", dict[str, Any], *_LOOK)
RETRY: Final = _console("Retry", "Publish a letter's work again.", answers.Retried, *_JSON_ONLY, body="Nothing")
DROP: Final = _console("Drop", "Remove a letter.", answers.Dropped, *_JSON_ONLY, body="Nothing")
TO_THE_PAGES: Final = Operation(
    name="consoleRedirect", tag="console", summary="To the console's pages.", statuses={307: "Go there."}, keyed=False
)
PAGES: Final = Operation(
    name="consolePage",
    tag="console",
    summary="The console's pages and their parts.",
    media=("text/html", "text/css", "text/javascript", "image/svg+xml"),
    raises=(errors.NotFound,),
    keyed=False,
)
