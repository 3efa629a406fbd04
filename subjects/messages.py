"""Every message of the pipeline, in the order in which a request meets them.

Fields are only ever added, with defaults, and an unknown field is ignored, so that workers of two
releases can share one broker. Only what people write by hand, `Request` and `EmbeddingRequest`, refuses
unknown fields.
`tests/golden/` keeps one encoded sample of each message and release.
"""

from typing import Any, Literal

import msgspec

from subjects.codec import NO_TOKENS, BlockHashes, Format, TokenIds, Vector


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the messages between our own processes."""


# --- client -> preprocess ---------------------------------------------------------------------------


class TextContent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A text part of a chat message."""

    text: str


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    arguments: str  # a JSON object as text


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that the assistant made earlier in the conversation."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None  # as clients send back what a stream gave them


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn of a conversation. Only an assistant's that has `tool_calls` may go without content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextContent, ...] | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None  # the assistant's
    tool_call_id: str | None = None  # the call that a tool's message answers
    reasoning_content: str | None = None  # the assistant's, for templates that keep it


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None  # the engine's grammar holds the arguments to the schema, where its parser can


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model may call."""

    function: ToolFunction
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice of one tool, which the model must call."""

    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """OpenAI's structured output. `json_schema` is required with type "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Accepted as OpenAI's clients send it; the terminal frame carries the usage in any case."""

    include_usage: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user publishes: OpenAI's chat or completion request, with SGLang's further sampling fields.

    Give exactly one of `messages` and `prompt`. Limits stand in `subjects.limits`.
    """

    messages: tuple[ChatMessage, ...] | None = None
    # Text, or token ids int[num_prompt_tokens]; or several prompts, of one kind: each has its own `n` choices.
    prompt: str | tuple[int | str | tuple[int, ...], ...] | None = None
    model: str | None = None  # if given, must name the subject's model
    request_id: str | None = None  # [A-Za-z0-9_-]{1,64}; else Nats-Msg-Id, else the stream sequence
    client: str | None = None  # else the header, else "anonymous"
    deadline: float | None = None  # seconds since the Unix epoch; else the header
    priority: int = 0  # above 0: before all others of its model; below 0: after them. SGLang's field
    session: str | None = None  # [A-Za-z0-9_-]{1,64}: requests of one session go to one worker, while that costs little
    stream: bool = False  # False: one frame with the whole answer
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer name of max_tokens
    min_tokens: int = 0
    n: int = 1
    stop: str | tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | int | None = None  # chat: bool; completion: number of alternatives
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    json_schema: str | None = None  # SGLang's name: a JSON schema as text
    regex: str | None = None
    ebnf: str | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    user: str | None = None
    echo: bool = False  # `prompt` only: its text before the output; with logprobs, those of its tokens too
    best_of: int | None = None  # only as many as `n`: every output is given back
    lora_path: str | None = None  # name of an adapter that the workers have loaded; or `model` as "<model>:<adapter>"
    data_parallel_rank: int | None = None  # of the worker's ranks, the one that is to run it
    routed_dp_rank: int | None = None  # SGLang's newer name of data_parallel_rank
    cache_salt: str | None = None  # KV is shared only among requests with the same one
    max_thinking_tokens: int | None = None  # SGLang's field: after so many tokens of reasoning it is ended
    metadata: dict[str, str] | None = None  # this field and those below: OpenAI's, taken where they change nothing
    modalities: tuple[Literal["text"], ...] | None = None
    prompt_cache_key: str | None = None  # the session, where `session` gives none
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: ToolChoice | None = None  # "auto" where there are tools
    parallel_tool_calls: bool = True  # False: one call at most, where a grammar holds (required, named, strict)
    reasoning_effort: str | None = None  # for the chat template, e.g. "low"
    separate_reasoning: bool = True  # False: what the model thinks stays in the content
    stream_reasoning: bool = True  # False: it comes in one piece, when it is whole
    chat_template_kwargs: dict[str, Any] | None = None  # for the chat template, e.g. {"enable_thinking": false}


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user publishes for vectors in place of text: OpenAI's embedding request. It is told by its `input`.

    The answer has one frame for each input, whose number is the frame's `choice`.
    """

    input: str | tuple[str | int | tuple[int, ...], ...]  # a text, texts, token ids, or lists of token ids
    model: str | None = None  # if given, must name the subject's model
    request_id: str | None = None  # as in Request
    client: str | None = None
    deadline: float | None = None
    dimensions: int | None = None  # where the model was trained for shorter vectors (Matryoshka)
    encoding_format: Literal["float", "base64"] | None = None  # of the gateway's answer; frames do not depend on it
    user: str | None = None


# --- preprocess -> decode ---------------------------------------------------------------------------


class StopConditions(Message, frozen=True, kw_only=True):
    """When an output ends."""

    max_tokens: int  # resolved: never more than the context leaves
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class SamplingOptions(Message, frozen=True, kw_only=True):
    """How the next token is drawn. None leaves the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None  # a JSON schema as text
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None  # this field and those below: set by whoever owns the request, for its tools
    ebnf_full_assistant: bool = False  # the grammar covers the reasoning too
    require_reasoning: bool = False  # the output begins with reasoning; a grammar holds from its end on


class OutputOptions(Message, frozen=True, kw_only=True):
    """What the frames carry beside tokens and text."""

    stream: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    prompt_logprobs: bool = False  # on the first frame, with as many alternatives


class EngineOptions(Message, frozen=True, kw_only=True):
    """What else an engine must know of a request, prefill's and decode's alike."""

    lora_path: str | None = None  # name of a loaded adapter
    cache_salt: str | None = None
    max_thinking_tokens: int | None = None


class Failure(Message, frozen=True, kw_only=True):
    """Why a request ended in an error. `code` is stable; see `pipeline.errors` for the tree."""

    code: str
    message: str
    status: int  # the HTTP status a gateway answers with
    field: str | None = None
    size: float | None = None  # the offending value's size, in the unit of `limit`
    limit: float | None = None
    retry_after_s: float | None = None


class Work(Message, frozen=True, kw_only=True):
    """What every task for a worker says about the request it belongs to."""

    request_id: str
    deadline_unix_s: float | None = None


class FurtherPrompt(Message, frozen=True, kw_only=True):
    """A completion's prompt after its first."""

    token_ids: TokenIds  # u32[num_prompt_tokens]
    max_tokens: int
    echo: str | None = None


class ChatOptions(Message, frozen=True, kw_only=True):
    """What the parsers of a chat's output must know of it."""

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "none"  # resolved: "auto" where there are tools
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    calls_before: int = 0  # tool calls in the conversation so far: some models' ids count them


class OwnedTask(Work, frozen=True, kw_only=True):
    """What every task says whose worker, its owner, answers the client itself."""

    client: str
    model: str
    choices: int = 1  # so many terminal frames end it
    reply_format: Format = Format.MSGPACK
    accepted_unix_s: float = 0.0  # when the broker stored the request
    reader: str | None = None  # an inbox: when nobody answers on it any more, the request is cancelled


class PreprocessedRequest(OwnedTask, frozen=True, kw_only=True):
    """A request as the engines take it: tokenized, validated, every default resolved."""

    token_ids: TokenIds  # u32[num_prompt_tokens]
    stop: StopConditions
    sampling: SamplingOptions = SamplingOptions()
    output: OutputOptions = OutputOptions()
    priority: int = 0  # larger is sooner
    echo: str | None = None  # the prompt's text, for the first frame of each choice
    engine: EngineOptions = EngineOptions()
    dp_rank: int | None = None  # the decode worker's data-parallel rank that is to run it; None: any
    further: tuple[FurtherPrompt, ...] = ()  # the choices are the first prompt's, then as many for each of these
    chat: ChatOptions | None = None  # None: a completion


# --- preprocess -> embed ----------------------------------------------------------------------------


class EmbeddingTask(OwnedTask, frozen=True, kw_only=True):
    """An embedding request as the engines take it. Each input is a choice."""

    inputs: tuple[TokenIds, ...]  # each u32[num_tokens]
    dimensions: int | None = None  # of the vectors; None: all that the model has


# --- decode <-> prefill -----------------------------------------------------------------------------


class PrefillTask(Work, frozen=True, kw_only=True):
    """A prompt whose KV its owner, a decode worker, waits for in a bootstrap room."""

    room: int  # in [0, 2**63), new for every offer
    owner: str  # the decode worker
    model: str
    token_ids: TokenIds  # u32[num_prompt_tokens]
    stop: StopConditions
    sampling: SamplingOptions = SamplingOptions()  # prefill draws the first token
    output: OutputOptions = OutputOptions()
    priority: int = 0  # larger is sooner
    engine: EngineOptions = EngineOptions()


class Claim(Message, frozen=True, kw_only=True):
    """A prefill worker asks the owner of a room for leave to prefill it."""

    room: int
    worker: str
    incarnation: str


class Grant(Message, frozen=True, kw_only=True):
    """The owner's answer to a claim."""

    granted: bool
    reason: str | None = None  # why not


class Refusal(Message, frozen=True, kw_only=True):
    """A prefill worker gives a room back that it has claimed."""

    room: int
    failure: Failure
    permanent: bool  # no other prefill worker could do better


# --- decode, embed -> client -------------------------------------------------------------------------------


class TokenLogprob(Message, frozen=True, kw_only=True):
    token_id: int
    logprob: float | None  # None: of a prompt's first token, which follows nothing
    text: str | None = None
    raw: bytes | None = None  # the token's bytes, where `text` does not tell them: a part of a character


class PositionLogprobs(Message, frozen=True, kw_only=True):
    """Log probabilities at one position of the output, or of the prompt."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class Usage(Message, frozen=True, kw_only=True, omit_defaults=False):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens whose KV was already there

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Echo(Message, frozen=True, kw_only=True):
    """The prompt, where the request wants it back."""

    text: str
    logprobs: tuple[PositionLogprobs, ...] | None = None  # one for each prompt token


FinishReason = Literal["stop", "length", "abort", "error", "tool_calls"]


class ToolCallDelta(Message, frozen=True, kw_only=True):
    """A piece of one tool call. Its first has the `id` and the `name`; the `arguments` of all make a JSON object."""

    index: int  # of the choice's calls
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Timing(Message, frozen=True, kw_only=True):
    """When a choice's last owner came how far, in seconds since the Unix epoch.

    The first two are the broker's clock, `started` and the rest the decode worker's.
    """

    accepted_unix_s: float = 0.0  # the request was stored
    preprocessed_unix_s: float = 0.0  # the tokenized task was stored
    started_unix_s: float = 0.0  # this attempt began
    first_token_unix_s: float | None = None  # of this attempt, streamed or not
    prefill_worker: str | None = None
    prefill_claimed_unix_s: float | None = None
    kv_landed_unix_s: float | None = None
    ended_unix_s: float | None = None  # the last frame was made


class Frame(Message, frozen=True, kw_only=True):
    """A piece of one choice's output. The choice's last frame, and only that, has a `finish_reason`.

    A reader keeps the highest attempt it has seen and drops tokens that it has: `index` says where
    in the choice's output the first of `token_ids` stands.
    """

    request_id: str
    choice: int = 0
    attempt: int = 1  # how often the request was handed to a worker
    index: int = 0
    token_ids: TokenIds = NO_TOKENS  # u32[num_new_tokens]
    text: str = ""
    logprobs: tuple[PositionLogprobs, ...] | None = None  # one for each of token_ids
    embedding: Vector | None = None  # f32[dimensions], with finish_reason; then there are no tokens
    finish_reason: FinishReason | None = None
    matched_stop: int | str | None = None  # the stop token or string that ended it
    usage: Usage | None = None  # with finish_reason
    error: Failure | None = None  # with finish_reason "error" or "abort"
    worker: str | None = None  # on an attempt's first frame and on the last
    timing: Timing | None = None  # with finish_reason
    echo: Echo | None = None  # on a choice's first frame, once whoever owns it; stands before all text
    reasoning: str = ""  # of a chat: what the model thinks, before it answers with `text` or calls tools
    tool_calls: tuple[ToolCallDelta, ...] = ()
    raw: str | None = None  # what the model said, where `text` is not all of it: a next owner parses on from there


# --- KV events: engine -> routers, telemetry ---------------------------------------------------------

Tier = Literal["gpu", "host", "disk"]
"""Where a KV block lies: the engine's own pool (on a CPU platform too), HiCache's host pool, or its storage."""


class BlocksStored(Message, frozen=True, kw_only=True, tag_field="type", tag="stored"):
    """Consecutive blocks of one prefix are now in a tier. A block's hash covers all tokens from the first on."""

    hashes: BlockHashes  # i64[num_blocks], in the prefix's order
    parent: int | None = None  # hash of the block before the first; None: it is a prompt's first
    tier: Tier = "gpu"


class BlocksRemoved(Message, frozen=True, kw_only=True, tag_field="type", tag="removed"):
    hashes: BlockHashes  # i64[num_blocks]
    tier: Tier = "gpu"


class BlocksCleared(Message, frozen=True, kw_only=True, tag_field="type", tag="cleared"):
    """No block is left, in any tier."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


class KvEvents(Message, frozen=True, kw_only=True):
    """What became of one rank's KV blocks, in order.

    A reader applies `seq` right after `seq` - 1 of the same incarnation; whatever else it sees, it asks for a snapshot.
    """

    worker: str
    incarnation: str
    dp_rank: int = 0
    seq: int  # 1 for an incarnation's first message of a rank, then one more each
    block_tokens: int  # tokens in a block
    events: tuple[KvEvent, ...] = ()


class KvSnapshotRequest(Message, frozen=True, kw_only=True):
    """Asks a rank for all the blocks that it holds."""


class KvSnapshot(Message, frozen=True, kw_only=True):
    """All the blocks of a rank, in `parts` messages to the reply subject; a parent comes before its children."""

    worker: str
    incarnation: str
    dp_rank: int = 0
    seq: int  # of the last KvEvents that it contains
    block_tokens: int
    part: int = 0  # in [0, parts)
    parts: int = 1
    blocks: tuple[BlocksStored, ...] = ()


# --- control ----------------------------------------------------------------------------------------


class Cancel(Message, frozen=True, kw_only=True):
    reason: str = "cancelled by the client"


class ControlRequest(Message, frozen=True, kw_only=True):
    """An operator's command to one worker; `arguments` are the operation's own (`sglang-nats control --list`)."""

    arguments: dict[str, Any] = {}


class ControlReply(Message, frozen=True, kw_only=True):
    ok: bool
    result: dict[str, Any] = {}
    error: Failure | None = None


Role = Literal["preprocess", "decode", "prefill", "embed", "telemetry", "gateway"]


class Embedding(Message, frozen=True, kw_only=True):
    """What a model's vectors can be."""

    dimensions: int  # of a whole vector
    matryoshka: bool = False  # shorter ones can be asked for: trained so that a vector's beginning is one too
    matryoshka_dimensions: tuple[int, ...] = ()  # only these; none: any up to `dimensions`


class ModelCard(Message, frozen=True, kw_only=True):
    """What a worker can serve, put in a KV bucket when its engine is ready."""

    worker: str
    role: Role
    model: str  # the served name, a subject token
    incarnation: str  # new at every start of the process
    model_path: str
    engine: str  # "sglang 0.5.21" or "simulated"
    context_len_tokens: int
    max_running_requests: int
    max_prefill_tokens: int  # most tokens in one batch
    kv_blocks: int
    kv_block_tokens: int
    disaggregation: Literal["aggregated", "prefill", "decode"] = "aggregated"
    disaggregation_endpoint: str | None = None  # the bootstrap subject prefix of this worker
    dp_size: int = 1
    tp_size: int = 1
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    chat_template: str | None = None  # overrides the tokenizer's own
    embedding: Embedding | None = None  # of an embedding worker
    served_name: str | None = None  # as the operator gave it, where that is no subject token: `Qwen/Qwen3-0.6B`
    sampling: dict[str, float] = {}  # the model's own temperature and top_p, where a request gives none; OpenAI's: 1
    tokenizer_files: dict[str, str] = {}  # file name to SHA-256 in hex, its name in the bucket SGLANG_TOKENIZERS
    started_unix_s: float = 0.0


class Load(Message, frozen=True, kw_only=True):
    """What an engine is doing now."""

    running: int = 0  # choices
    waiting: int = 0  # choices inside the engine that wait for a place, or for their KV
    kv_tokens_used: int = 0  # of running choices; what is only cached does not count
    kv_tokens: int = 0  # most that fit
    waiting_prefill_tokens: int = 0  # prompt tokens that wait to be computed, as the engine estimates it
    generated_tokens_per_s: float = 0.0
    cached_share: float = 0.0  # in [0, 1], of the prompt tokens that were prefilled last


class Heartbeat(Message, frozen=True, kw_only=True):
    worker: str
    role: Role
    incarnation: str
    model: str | None = None  # None: serves every model
    ready: bool = False
    draining: bool = False
    paused: bool = False  # takes no new work until it is resumed; what runs goes on
    slots: int = 0  # most tasks at once
    in_flight: int = 0
    load: Load = Load()
    unhealthy: tuple[str, ...] = ()  # codes of what is wrong; `pipeline.health` has the list
    sent_unix_s: float = 0.0


class MetricSample(Message, frozen=True, kw_only=True):
    name: str
    labels: dict[str, str]
    value: float


class MetricFamily(Message, frozen=True, kw_only=True):
    """One Prometheus series family, as `prometheus_client` collects it."""

    name: str
    help: str
    type: str
    samples: tuple[MetricSample, ...]


class MetricsSnapshot(Message, frozen=True, kw_only=True):
    worker: str
    role: Role
    model: str | None = None
    process: str = ""  # of the engine, which sends a snapshot for each; "": the worker's own
    families: tuple[MetricFamily, ...] = ()


class DeadLetter(Message, frozen=True, kw_only=True):
    stage: str
    subject: str  # where the payload came from
    stream_seq: int
    attempts: int
    error: Failure
    payload: bytes
    request_id: str | None = None
    headers: dict[str, str] = {}
    died_unix_s: float = 0.0


# --- gateways' buckets --------------------------------------------------------------------------------

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
"""OpenAI's words."""


class BatchAnswers(Message, frozen=True, kw_only=True):
    """So many objects of answers an owner of the batch has put, numbered from 0."""

    owner: str
    parts: int


class BatchLineError(Message, frozen=True, kw_only=True):
    """Why a batch was refused."""

    code: str
    message: str
    line: int | None = None  # of the input file, from 1
    param: str | None = None


class BatchState(Message, frozen=True, kw_only=True):
    """A batch of /v1/batches, its value in a KV bucket. Times are seconds since the Unix epoch, 0: not yet.

    Only its owner writes it, but for a cancellation; each write names the revision that it replaces.
    """

    batch_id: str
    client: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_unix_s: float
    expires_unix_s: float
    metadata: dict[str, str] | None = None
    status: BatchStatus = "validating"
    owner: str = ""  # `<worker>-<incarnation>` of the gateway that works on it
    taken: int = 0  # how often a gateway took it up
    renewals: int = 0  # of the owner's lease
    answers: tuple[BatchAnswers, ...] = ()
    total: int = 0  # requests
    completed: int = 0
    failed: int = 0
    errors: tuple[BatchLineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_unix_s: float = 0.0
    finalizing_unix_s: float = 0.0
    completed_unix_s: float = 0.0
    failed_unix_s: float = 0.0
    expired_unix_s: float = 0.0
    cancelling_unix_s: float = 0.0
    cancelled_unix_s: float = 0.0


class StoredResponse(Message, frozen=True, kw_only=True):
    """A response of /v1/responses, its value in a KV bucket: first what was asked, at its end the answer too."""

    request_id: str
    model: str
    created_unix_s: float
    deadline_unix_s: float
    settings: dict[str, Any] = {}  # the fields of the request that the answer repeats
    messages: tuple[dict[str, Any], ...] = ()  # the conversation so far, without instructions
    body: dict[str, Any] | None = None  # the answer in OpenAI's form, when it is whole
