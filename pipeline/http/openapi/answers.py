"""The gateway's answers, as types: their JSON schemas are made of them. What builds the answers stands elsewhere; the
tests hold every answer to its schema, and to have no field beside."""

from typing import Any, Final, Literal, NotRequired, TypedDict

from pipeline.files import Purpose
from subjects.messages import BatchStatus, FinishReason

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]


class ErrorBody(TypedDict):
    message: str
    type: ErrorType
    param: str | None  # the field's dotted path, a header or a path's part
    code: str  # stable; each status lists its own


class Error(TypedDict):
    """An error in OpenAI's shape."""

    error: ErrorBody


# --- text ---------------------------------------------------------------------------------------------


class PromptTokensDetails(TypedDict):
    cached_tokens: int  # whose KV was already there


class CompletionUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Token(TypedDict):
    token: str
    logprob: float | None
    bytes: list[int]


class Position(Token):
    top_logprobs: list[Token]


class ChatLogprobs(TypedDict):
    content: list[Position]


class TextLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class Function(TypedDict):
    name: str
    arguments: str  # a JSON object as text


class FunctionCall(TypedDict):
    id: str
    type: Literal["function"]
    function: Function


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[FunctionCall]]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class FunctionCallDelta(TypedDict):
    index: int
    id: NotRequired[str | None]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[FunctionCallDelta]]


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage | None]  # with `stream_options.include_usage`: null but in the last


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage


class TextChunkChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletionChunk(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: NotRequired[CompletionUsage | None]


# --- embeddings, models, health -----------------------------------------------------------------------


class EmbeddingItem(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # str: base64 of little-endian f32


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # tokens


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class HealthReason(TypedDict):
    code: str
    message: str


class Liveness(TypedDict):
    live: bool
    ready: bool
    reasons: list[HealthReason]


class Readiness(Liveness):
    models: list[str]


# --- files and batches --------------------------------------------------------------------------------


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(TypedDict):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class Batch(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    expires_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


# --- responses ----------------------------------------------------------------------------------------


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Position]


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class ResponseError(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: str


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseText(TypedDict):
    format: dict[str, Any]


class ResponseReasoning(TypedDict):
    effort: None
    summary: None


class Response(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: Literal["auto", "none"]
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    background: bool
    frequency_penalty: float
    max_tool_calls: int | None
    presence_penalty: float
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseEvent(TypedDict):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: Response


class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage


class _InPart(TypedDict):
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int


class PartEvent(_InPart):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDeltaEvent(_InPart):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[Position]


class TextDoneEvent(_InPart):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[Position]


RESPONSE_EVENTS: Final = (ResponseEvent, ItemEvent, PartEvent, TextDeltaEvent, TextDoneEvent)
"""Of a streamed response."""


# --- the console --------------------------------------------------------------------------------------


class Session(TypedDict):
    open: bool  # nobody needs a key


class Timeline(TypedDict):
    request_id: str
    client: str
    trace_id: str | None
    now_unix_s: float
    events: list[Any]
    phases: list[Any]
    missing: list[str]


class LetterSummary(TypedDict):
    seq: int
    died_unix_s: float
    stage: str
    subject: str
    request_id: str | None
    attempts: int
    code: str
    message: str


class Letters(TypedDict):
    letters: list[LetterSummary]


class Retried(TypedDict):
    client: str
    request_id: str


class Dropped(TypedDict):
    dropped: int
