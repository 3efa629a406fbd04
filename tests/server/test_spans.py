"""One request's spans, over the stages as they are and a real broker: one trace, with the right parents."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pipeline import look, spans, trace
from pipeline.bus import Bus
from pipeline.cancel import Cancellations
from pipeline.chat import ChatTokenizer, LoadedModel
from pipeline.client import Client
from pipeline.config import BUILTIN_MODEL, RoutingSettings, SimulatedSettings
from pipeline.engine.disaggregated import Claims, DisaggregatedEngine
from pipeline.engine.protocol import EngineOutput, EngineRequest
from pipeline.engine.sglang.handshake import Address
from pipeline.engine.simulated import Address as SimulatedAddress
from pipeline.engine.simulated import SimulatedEngine
from pipeline.lease import LeaseKeeper
from pipeline.models import prepare_model
from pipeline.nats_server import NatsServer
from pipeline.placement import Placements
from pipeline.presence import Presence
from pipeline.responses import StreamLog
from pipeline.runner import Runner
from pipeline.stage import Stage
from stages.decode import decode
from stages.prefill import prefill
from stages.preprocess import preprocess
from subjects import headers, names, streams
from subjects.messages import Frame

MODEL = "smollm2"
WAIT_S = 20.0
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
DECODE = SimulatedSettings(ttft_ms=1, itl_ms=20, disaggregation="decode")


class Anywhere:
    """No worker is better than another."""

    async def choose(self, *_: object) -> None:
        return None


class OneModel:
    """What preprocess needs of a served model."""

    def __init__(self) -> None:
        tokenizer = ChatTokenizer.load(prepare_model(BUILTIN_MODEL))
        self._model = LoadedModel(name=MODEL, tokenizer=tokenizer, context_len_tokens=8192)

    async def ready(self, model: str, until_unix_s: float) -> LoadedModel:
        return self._model


class Handshaking(SimulatedEngine):
    """A prefill engine that says on the bus what SGLang's says there."""

    def __init__(self, bus: Bus, address: SimulatedAddress) -> None:
        super().__init__(SimulatedSettings(ttft_ms=5, disaggregation="prefill"), address)
        self._handshake = bus

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        assert request.room is not None
        to, room = Address("d0", "i"), str(request.room.number)
        await self._handshake.publish(to.subject("receipt", room), b"", headers={headers.HANDSHAKE_US: "100"})
        said = {headers.HANDSHAKE_STATUS: "success", headers.HANDSHAKE_BYTES: "4096", headers.HANDSHAKE_PAGES: "4"}
        said[headers.HANDSHAKE_WRITE_US] = "2000"
        await self._handshake.publish(to.subject("status", room), b"", headers=said)
        async for output in super().generate(request):
            yield output


@pytest.fixture
async def pipeline(nats_server: NatsServer) -> AsyncIterator[str]:
    """Preprocess, decode and prefill in this process; the broker's URL."""
    bus = await Bus.connect(nats_server.url, name="d0")
    await bus.provision(streams.STREAMS, streams.CONSUMERS, streams.BUCKETS)
    cancellations, leases = Cancellations(bus), LeaseKeeper(nats_server.url, "test")
    await cancellations.start()
    await leases.start()
    engines = [
        SimulatedEngine(DECODE, SimulatedAddress(nats_server.url, "d0", "i")),
        Handshaking(bus, SimulatedAddress(nats_server.url, "p0", "i")),
    ]
    for engine in engines:
        await engine.start()
    presence = Presence(bus)
    places = Placements(bus, presence, RoutingSettings(policy="any"), "prefill")
    owner = DisaggregatedEngine(engines[0], bus, "d0", MODEL, presence, places)
    await owner.listen()
    runners = []

    async def run(stage: Stage, consumer: streams.ConsumerSpec) -> None:
        await bus.ensure_consumer(consumer)
        runners.append(Runner(bus, leases, cancellations, stage))
        await runners[-1].pull(consumer, slots=4)

    await run(preprocess.bind(models=OneModel(), places=Anywhere()), streams.PREPROCESS)
    await run(decode.bind(engine=owner, responses=StreamLog(bus), worker="d0"), streams.decode_any(MODEL))
    claims = Claims(bus, "p0", "i")
    await run(prefill.bind(engine=engines[1], claims=claims, presence=presence), streams.prefill_any(MODEL))
    yield nats_server.url
    for runner in runners:
        await runner.drain(timeout_s=WAIT_S)
    for engine in engines:
        await engine.close()
    await leases.close()
    await bus.close()


@pytest.fixture
def exported() -> Callable[[], dict[str, list[ReadableSpan]]]:
    """Ends the export; every span there was, by its name."""
    exporter = InMemorySpanExporter()
    spans.start("test", "t0", exporter)

    def all_spans() -> dict[str, list[ReadableSpan]]:
        spans.stop()
        found: dict[str, list[ReadableSpan]] = {}
        for span in exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    yield all_spans
    spans.stop()


async def ask(url: str, **fields) -> list[Frame]:
    async with asyncio.timeout(WAIT_S), Client.connect(url, client="me") as client:
        asked = client.generate(model=MODEL, prompt="hello", max_tokens=4, ignore_eos=True, **fields)
        return [frame async for frame in asked]


async def settled(bus: Bus) -> None:
    """Wait until every task of the request is acked: then its spans have ended."""
    async with asyncio.timeout(WAIT_S):
        while (await bus.stream_state(streams.WORK.name)).messages:
            await bus.flush()


async def test_a_request_is_one_trace_with_the_right_parents(pipeline, exported, bus):
    frames = await ask(pipeline, traceparent=f"00-{TRACE}-{SPAN}-01", request_id="r1", temperature=0.5)
    await settled(bus)
    found = exported()
    assert {name: len(each) for name, each in found.items()} == {
        "queue": 3, "preprocess": 1, "decode": 1, "prefill": 1, "handshake": 1, "transfer": 1
    }  # fmt: skip
    every = [span for each in found.values() for span in each]
    assert {f"{span.context.trace_id:032x}" for span in every} == {TRACE}
    (first,), (second,), (third,) = found["preprocess"], found["decode"], found["prefill"]
    above = {span.name: [f"{each.parent.span_id:016x}" for each in found[span.name]] for span in every}
    sender, task, owner = SPAN, f"{first.context.span_id:016x}", f"{second.context.span_id:016x}"
    assert above == {
        "queue": [sender, task, owner], "preprocess": [sender], "decode": [task], "prefill": [owner],
        "handshake": [owner], "transfer": [owner],
    }  # fmt: skip
    assert all(span.start_time <= span.end_time for span in every)
    assert second.start_time <= found["handshake"][0].start_time <= third.end_time
    said = second.attributes
    assert said["gen_ai.request.model"] == MODEL
    assert said["gen_ai.request.temperature"] == 0.5
    assert said["gen_ai.response.finish_reasons"] == ("length",)
    assert said["gen_ai.usage.output_tokens"] == 4
    assert said["gen_ai.usage.input_tokens"] == frames[-1].usage.prompt_tokens
    assert found["transfer"][0].attributes["sglang_nats.kv_bytes"] == 4096
    assert found["transfer"][0].end_time - found["transfer"][0].start_time == pytest.approx(2e6, rel=0.01)
    timing = frames[-1].timing
    assert timing.prefill_worker == "p0"
    assert timing.accepted_unix_s <= timing.preprocessed_unix_s <= timing.started_unix_s
    assert timing.started_unix_s <= timing.prefill_claimed_unix_s <= timing.first_token_unix_s


async def test_every_hop_and_log_line_has_the_trace_of_a_request_that_named_none(pipeline, bus, log):
    lines: list[dict] = []
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, lambda *line: lines.append(line[2]) or ""])
    for subject in (names.DECODE_ANY, names.PREFILL_ANY, names.CLAIM, names.RESPONSES):
        await bus.subscribe(subject.any(), log.add)
    await bus.flush()
    try:
        payload = json.dumps({"prompt": "hi", "request_id": "r2", "max_tokens": 4, "stream": True, "n": 0}).encode()
        await bus.publish_durable(names.REQUESTS.of(model=MODEL), payload, headers={headers.TRACEPARENT: "garbage"})
        await log.until(lambda heard: len(heard) == 1)
        await bus.publish_durable(names.REQUESTS.of(model=MODEL), payload.replace(b'"n": 0', b'"n": 1'))
        heard = await log.until(lambda heard: len(heard) > 1 and b"finish_reason" in heard[-1].payload)
    finally:
        structlog.reset_defaults()
    traced = [(one.headers or {}).get(headers.TRACEPARENT, "")[:35] for one in heard]
    assert traced[0] and traced[1] != traced[0], "another request, another trace"
    assert lines[0]["trace_id"] in traced[0], "the refused request's log line"
    assert len(set(traced[1:]) - {""}) == 1, "each hop is of one trace"
    with_it = [names.RESPONSES.parse(one.subject) is not None for one in heard[1:] if one.headers]
    assert with_it == [False, False, False, True, True], "task, prompt, claim, first and last frame"
    assert len(heard) > 1 + len(with_it), "frames between them have none"


async def test_a_person_asks_and_then_sees_where_the_time_went(pipeline, exported, capsys):
    fields = {"prompt": "hi", "max_tokens": 4, "ignore_eos": True, "request_id": "r3"}
    assert await look.ask(pipeline, MODEL, fields, client="me", as_frames=False, verbose=True) == 0
    said = capsys.readouterr().err
    assert "request r3 of client me, trace " in said
    trace_id = said.split(", trace ")[1].split()[0]
    assert await trace.show(pipeline, "r3", None) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"Request r3 of client me, trace {trace_id}\n")
    steps = ("accepted", "preprocessed", "started", "prefill claimed", "KV landed", "first token", "ended: length")
    places = [told.index(step) for step in steps]
    assert sorted(places) == places
    assert "not known" not in told


class Collector(BaseHTTPRequestHandler):
    """Takes spans as an OpenTelemetry collector does."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    spans.start("decode", "d0")
    spans.begin("decode", None).end()
    began_s = time.monotonic()
    spans.stop()
    assert time.monotonic() - began_s < spans.CLOSE_S_MAX + 2


def test_spans_reach_a_collector_over_http(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        spans.start("decode", "d0")
        spans.begin("decode", spans.TraceContext(TRACE, SPAN)).end(error="engine_died")
        spans.stop()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, body),) = server.bodies
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert path == "/v1/traces"
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.instance.id"] == "d0"
    assert resource.scope_spans[0].spans[0].trace_id.hex() == TRACE
