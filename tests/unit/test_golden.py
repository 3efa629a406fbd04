"""What a release once put on the wire is read for ever: one encoded sample of each message and release.

A new message or field needs a value here; `python tests/unit/test_golden.py` then writes the files that are missing
and never changes one. Until a release is out, a sample of it may be deleted and written again; from then on a changed
file would mean that two releases no longer understand each other.
"""

from pathlib import Path
from typing import Final

import msgspec
import pytest

from subjects import messages as m
from subjects.codec import BlockHashes, Format, TokenIds, Vector, decode, encode

GOLDEN: Final = Path(__file__).parents[1] / "golden"
TOKENS: Final = TokenIds.of([0, 1, 255, 256, 49151, 2**32 - 1])
FAILURE: Final = m.Failure(
    code="invalid_request",
    message="temperature: 2.5 is not allowed; it must be in [0, 2]",
    status=400,
    field="temperature",
    size=2.5,
    limit=2,
    retry_after_s=1.5,
)
CHOSEN: Final = m.TokenLogprob(token_id=7042, logprob=-0.25, text=" Paris", raw=b" Paris")
LOGPROBS: Final = m.PositionLogprobs(chosen=CHOSEN, top=(CHOSEN, m.TokenLogprob(token_id=260, logprob=-2.5)))
FIRST: Final = m.PositionLogprobs(chosen=m.TokenLogprob(token_id=504, logprob=None, text="The"))
ECHO: Final = m.Echo(text="The capital", logprobs=(FIRST, LOGPROBS))
FURTHER: Final = m.FurtherPrompt(token_ids=TOKENS, max_tokens=7, echo="One, two,")
STOP: Final = m.StopConditions(
    max_tokens=64, min_tokens=2, stop=("\n\n", "é"), stop_token_ids=(2, 49151), ignore_eos=True
)
SAMPLING: Final = m.SamplingOptions(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    frequency_penalty=-0.5,
    presence_penalty=0.5,
    repetition_penalty=1.1,
    seed=-42,
    logit_bias={"260": -100.0},
    json_schema='{"type": "object"}',
    regex="[a-z]+",
    ebnf='root ::= "a"',
    structural_tag='{"type": "structural_tag"}',
    ebnf_full_assistant=True,
    require_reasoning=True,
)
OUTPUT: Final = m.OutputOptions(
    stream=False, logprobs=True, top_logprobs=2, skip_special_tokens=False, no_stop_trim=True, prompt_logprobs=True
)
ENGINE: Final = m.EngineOptions(lora_path="poet", cache_salt="tenant-7", max_thinking_tokens=512)
USAGE: Final = m.Usage(prompt_tokens=31, completion_tokens=8, cached_tokens=16)
TIMING: Final = m.Timing(
    accepted_unix_s=1789999990.25,
    preprocessed_unix_s=1789999990.5,
    started_unix_s=1789999991.0,
    first_token_unix_s=1789999991.5,
    prefill_worker="prefill-0",
    prefill_claimed_unix_s=1789999991.125,
    kv_landed_unix_s=1789999991.375,
    ended_unix_s=1789999991.75,
)
TEXT: Final = m.TextContent(text="What is the capital of France? 北京 🧑‍🚀")
CALL: Final = m.ToolCall(id="call_1", function=m.CalledFunction(name="weather", arguments='{"city": "北京"}'), index=0)
TOOL: Final = m.Tool(
    function=m.ToolFunction(name="weather", description="d", parameters={"type": "object"}, strict=True)
)
NAMED: Final = m.NamedTool(function=m.NamedFunction(name="weather"))
CHAT_OPTIONS: Final = m.ChatOptions(
    tools=(TOOL,),
    tool_choice=NAMED,
    parallel_tool_calls=False,
    reasoning_effort="low",
    separate_reasoning=False,
    stream_reasoning=False,
    chat_template_kwargs={"enable_thinking": False},
    calls_before=2,
)
CALL_DELTA: Final = m.ToolCallDelta(index=1, id="call_2", name="weather", arguments='{"city"')
SCHEMA: Final = m.JsonSchema(name="answer", schema={"type": "object"}, description="d", strict=True)
RESPONSE_FORMAT: Final = m.ResponseFormat(type="json_schema", json_schema=SCHEMA)
EMBEDDING: Final = m.Embedding(dimensions=384, matryoshka=True, matryoshka_dimensions=(128, 256))
LOAD: Final = m.Load(
    running=2,
    waiting=1,
    kv_tokens_used=100,
    kv_tokens=8192,
    waiting_prefill_tokens=700,
    generated_tokens_per_s=95.5,
    cached_share=0.25,
)
SAMPLE: Final = m.MetricSample(name="sglang_nats_tokens_total", labels={"direction": "out"}, value=8.0)
FAMILY: Final = m.MetricFamily(name="sglang_nats_tokens", help="Tokens.", type="counter", samples=(SAMPLE,))
HASHES: Final = BlockHashes.of([-(2**63), -1, 0, 2**63 - 1])
STORED: Final = m.BlocksStored(hashes=HASHES, parent=-5, tier="disk")
CLEARED: Final = m.BlocksCleared()

# Values as they were when the release was made. A field that came later stays at its default here.
RELEASES: Final[dict[str, tuple[msgspec.Struct, ...]]] = {
    "0.1.0": (
        TEXT,
        m.ChatMessage(
            role="user",
            content=(TEXT,),
            name="eve",
            tool_calls=(CALL,),
            tool_call_id="call_1",
            reasoning_content="They ask for the weather.",
        ),
        CALL.function,
        CALL,
        TOOL.function,
        TOOL,
        NAMED.function,
        NAMED,
        SCHEMA,
        RESPONSE_FORMAT,
        m.StreamOptions(include_usage=True),
        m.Request(
            messages=(m.ChatMessage(role="system", content="Be brief."), m.ChatMessage(role="user", content=(TEXT,))),
            model="smollm2",
            request_id="r-1",
            client="me",
            deadline=1790000000.5,
            priority=-3,
            session="talk-1",
            stream=True,
            stream_options=m.StreamOptions(include_usage=True),
            max_completion_tokens=64,
            min_tokens=2,
            n=2,
            stop=("\n\n", "é"),
            stop_token_ids=(2, 49151),
            ignore_eos=True,
            temperature=0.7,
            top_p=0.9,
            top_k=40,
            min_p=0.05,
            frequency_penalty=-0.5,
            presence_penalty=0.5,
            repetition_penalty=1.1,
            seed=-42,
            logit_bias={"260": -100.0},
            logprobs=True,
            top_logprobs=2,
            response_format=RESPONSE_FORMAT,
            skip_special_tokens=False,
            no_stop_trim=True,
            user="u",
            echo=True,
            best_of=2,
            lora_path="poet",
            data_parallel_rank=1,
            routed_dp_rank=1,
            cache_salt="tenant-7",
            max_thinking_tokens=512,
            metadata={"run": "7"},
            modalities=("text",),
            prompt_cache_key="talk",
            safety_identifier="u",
            service_tier="auto",
            store=False,
            tools=(TOOL,),
            tool_choice=NAMED,
            parallel_tool_calls=False,
            reasoning_effort="low",
            separate_reasoning=False,
            stream_reasoning=False,
            chat_template_kwargs={"enable_thinking": False},
        ),
        m.EmbeddingRequest(
            input=("What is the capital of France?", "北京"),
            model="minilm",
            request_id="r-1",
            client="me",
            deadline=1790000000.5,
            dimensions=128,
            encoding_format="base64",
            user="u",
        ),
        STOP,
        SAMPLING,
        OUTPUT,
        ENGINE,
        ECHO,
        FURTHER,
        m.Work(request_id="r-1", deadline_unix_s=1790000000.5),
        m.OwnedTask(
            request_id="r-1",
            deadline_unix_s=1790000000.5,
            client="me",
            model="smollm2",
            choices=2,
            reply_format=Format.JSON,
            accepted_unix_s=1789999990.25,
            reader="_INBOX_me.1",
        ),
        m.PreprocessedRequest(
            request_id="r-1",
            deadline_unix_s=1790000000.5,
            client="me",
            model="smollm2",
            token_ids=TOKENS,
            stop=STOP,
            sampling=SAMPLING,
            output=OUTPUT,
            choices=2,
            reply_format=Format.JSON,
            accepted_unix_s=1789999990.25,
            reader="_INBOX_me.1",
            priority=7,
            echo="The capital",
            engine=ENGINE,
            dp_rank=1,
            further=(FURTHER,),
            chat=CHAT_OPTIONS,
        ),
        m.EmbeddingTask(
            request_id="r-1",
            deadline_unix_s=1790000000.5,
            client="me",
            model="minilm",
            choices=2,
            reply_format=Format.JSON,
            accepted_unix_s=1789999990.25,
            reader="_INBOX_me.1",
            inputs=(TOKENS, TokenIds.of([101, 102])),
            dimensions=128,
        ),
        CHAT_OPTIONS,
        m.PrefillTask(
            request_id="r-1",
            deadline_unix_s=1790000000.5,
            room=2**63 - 1,
            owner="decode-0",
            model="smollm2",
            token_ids=TOKENS,
            stop=STOP,
            sampling=SAMPLING,
            output=OUTPUT,
            priority=-1000,
            engine=ENGINE,
        ),
        m.Claim(room=7, worker="prefill-0", incarnation="0123456789ab"),
        m.Grant(granted=False, reason="prefill-1 has this room"),
        m.Refusal(room=7, failure=FAILURE, permanent=True),
        CHOSEN,
        LOGPROBS,
        USAGE,
        FAILURE,
        TIMING,
        m.Frame(
            request_id="r-1",
            choice=1,
            attempt=2,
            index=6,
            token_ids=TOKENS,
            text=" Paris",
            logprobs=(LOGPROBS,),
            embedding=Vector.of([0.5, -0.25, 0.0]),
            finish_reason="error",
            matched_stop="\n\n",
            usage=USAGE,
            error=FAILURE,
            worker="decode-1",
            timing=TIMING,
            echo=ECHO,
            reasoning="The capital",
            tool_calls=(CALL_DELTA,),
            raw="<think>The capital",
        ),
        CALL_DELTA,
        m.Cancel(reason="changed my mind"),
        m.ControlRequest(arguments={"steps": 5}),
        m.ControlReply(ok=False, result={"path": "trace"}, error=FAILURE),
        EMBEDDING,
        m.ModelCard(
            worker="decode-1",
            role="decode",
            model="smollm2",
            incarnation="a1b2c3",
            model_path="builtin:smollm2",
            engine="sglang 0.5.21",
            context_len_tokens=8192,
            max_running_requests=64,
            max_prefill_tokens=8192,
            kv_blocks=8192,
            kv_block_tokens=1,
            disaggregation="decode",
            disaggregation_endpoint="endpoint",
            dp_size=2,
            tp_size=4,
            reasoning_parser="gpt-oss",
            tool_call_parser="gpt-oss",
            chat_template="{{ messages }}",
            sampling={"temperature": 0.6, "top_p": 0.95},
            embedding=EMBEDDING,
            served_name="meta/decode.1",
            tokenizer_files={"tokenizer.json": "ab" * 32},
            started_unix_s=1789999000.0,
        ),
        LOAD,
        m.Heartbeat(
            worker="decode-1",
            role="decode",
            incarnation="a1b2c3",
            model="smollm2",
            ready=True,
            draining=True,
            paused=True,
            slots=64,
            in_flight=3,
            load=LOAD,
            unhealthy=("queue_full",),
            sent_unix_s=1790000000.0,
        ),
        SAMPLE,
        FAMILY,
        m.MetricsSnapshot(
            worker="decode-1", role="decode", model="smollm2", process="scheduler dp0 pp0 tp0", families=(FAMILY,)
        ),
        m.DeadLetter(
            stage="decode",
            subject="subject",
            stream_seq=2**40,
            attempts=5,
            error=FAILURE,
            payload=b"\x00\xff{",
            request_id="r-1",
            headers={"Sglang-Client": "me"},
            died_unix_s=1790000000.0,
        ),
        STORED,
        m.BlocksRemoved(hashes=HASHES, tier="host"),
        CLEARED,
        m.KvEvents(
            worker="decode-1", incarnation="a1b2c3", dp_rank=1, seq=2**40, block_tokens=64, events=(STORED, CLEARED)
        ),
        m.KvSnapshotRequest(),
        m.KvSnapshot(
            worker="decode-1",
            incarnation="a1b2c3",
            dp_rank=1,
            seq=7,
            block_tokens=64,
            part=1,
            parts=2,
            blocks=(STORED,),
        ),
        m.BatchAnswers(owner="gateway-0-a1b2c3", parts=3),
        m.BatchLineError(code="invalid_request", message="url: is another one", line=7, param="url"),
        m.BatchState(
            batch_id="batch_1f",
            client="http",
            endpoint="/v1/completions",
            input_file_id="file-1f",
            completion_window="24h",
            created_unix_s=1789999990.25,
            expires_unix_s=1790086390.25,
            metadata={"team": "a"},
            status="in_progress",
            owner="gateway-0-a1b2c3",
            taken=2,
            renewals=40,
            answers=(m.BatchAnswers(owner="gateway-0-a1b2c3", parts=3),),
            total=100,
            completed=40,
            failed=2,
            errors=(m.BatchLineError(code="invalid_request", message="url: is another one", line=7, param="url"),),
            output_file_id="file-out-1f",
            error_file_id="file-err-1f",
            in_progress_unix_s=1789999991.0,
            finalizing_unix_s=1789999992.0,
            completed_unix_s=1789999993.0,
            failed_unix_s=1789999994.0,
            expired_unix_s=1789999995.0,
            cancelling_unix_s=1789999996.0,
            cancelled_unix_s=1789999997.0,
        ),
        m.StoredResponse(
            request_id="r-1",
            model="smollm2",
            created_unix_s=1789999990.25,
            deadline_unix_s=1790000590.25,
            settings={"temperature": 0.5},
            messages=({"role": "user", "content": "hi"},),
            body={"id": "resp_r-1"},
        ),
    ),
}
SUFFIX: Final = {Format.MSGPACK: "msgpack", Format.JSON: "json"}
CASES: Final = [
    (release, sample, form) for release, samples in RELEASES.items() for sample in samples for form in Format
]


def file_of(release: str, sample: msgspec.Struct, form: Format) -> Path:
    return GOLDEN / release / f"{type(sample).__name__}.{SUFFIX[form]}"


@pytest.mark.parametrize(
    ("release", "sample", "form"), CASES, ids=lambda value: getattr(type(value), "__name__", "") if value else ""
)
def test_an_old_sample_is_read_as_the_same_values(release, sample, form):
    payload = file_of(release, sample, form).read_bytes()
    assert decode(type(sample), payload) == sample


def test_every_message_has_a_sample_in_the_newest_release():
    declared = {
        kind.__name__
        for kind in vars(m).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == m.__name__
    }
    newest = list(RELEASES.values())[-1]
    assert {type(sample).__name__ for sample in newest} == declared - {m.Message.__name__}


def test_every_field_of_the_newest_release_is_in_its_sample():
    """A field left at its default is not on the wire, so that its sample would prove nothing."""
    for sample in list(RELEASES.values())[-1]:
        plain = msgspec.msgpack.decode(encode(sample))
        missing = set(type(sample).__struct_encode_fields__) - plain.keys()
        assert missing <= WAYS_THAT_EXCLUDE_EACH_OTHER.get(type(sample).__name__, set()), type(sample).__name__


WAYS_THAT_EXCLUDE_EACH_OTHER: Final = {"Request": {"prompt", "max_tokens", "json_schema", "regex", "ebnf"}}


def write_missing() -> None:
    for release, sample, form in CASES:
        file = file_of(release, sample, form)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(sample, form))
            print(f"wrote {file.relative_to(GOLDEN.parent)}")


if __name__ == "__main__":
    write_missing()
