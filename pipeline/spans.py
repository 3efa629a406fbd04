"""OpenTelemetry spans, exported where `OTEL_EXPORTER_OTLP_ENDPOINT` says where to; else they cost nothing.

The SDK is an extra, `sglang-nats[otel]`, and imported only then. It reads all its other variables (sampling, headers,
time-outs, batches) itself. Attributes are those of the semantic conventions for messaging and generative AI
(v1.41: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/); prompts and outputs are never among them.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

from pipeline.errors import ConfigError
from pipeline.tracing import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL: Final = "http/protobuf"
CLOSE_S_MAX: Final = 3.0
NS: Final = 1_000_000_000

Attribute = str | bool | int | float | Sequence[str]
Kind = Literal["internal", "client", "consumer"]


class Span:
    """A span in progress; without an exporter only the context that it passes on."""

    __slots__ = ("_span", "context")

    def __init__(self, context: TraceContext, span: "OtelSpan | None" = None) -> None:
        self.context, self._span = context, span

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)

    def event(self, name: str) -> None:
        """Something happened now."""
        if self._span is not None:
            self._span.add_event(name)

    def end(self, unix_s: float | None = None, error: str | None = None) -> None:
        """`error`: a stable code; without one the status stays unset, which means well."""
        if self._span is None:
            return
        if error:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end(None if unix_s is None else int(NS * unix_s))


class Exporter:
    """Makes spans and sends them, in batches from a thread of its own; more than its queue holds are dropped."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("sglang-nats")

    def open(self, name: str, parent: TraceContext | None, start_unix_s: float | None, kind: Kind) -> Span:
        from opentelemetry import trace

        above = trace.set_span_in_context(trace.NonRecordingSpan(_otel(parent)) if parent else trace.INVALID_SPAN)
        start_ns = None if start_unix_s is None else int(NS * start_unix_s)
        span = self._tracer.start_span(name, above, trace.SpanKind[kind.upper()], start_time=start_ns)
        its = span.get_span_context()
        flags = f"{int(its.trace_flags):02x}"
        return Span(TraceContext(f"{its.trace_id:032x}", f"{its.span_id:016x}", flags), span)

    def close(self) -> None:
        """Send what waits, within `CLOSE_S_MAX`; the SDK itself tries for half a minute where nobody answers."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(CLOSE_S_MAX)


def _otel(context: TraceContext):
    from opentelemetry import trace

    flags = trace.TraceFlags(int(context.flags, 16))
    return trace.SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags)


_exporter: Exporter | None = None


def start(role: str, instance: str, to: "SpanExporter | None" = None) -> None:
    """Export this process's spans from now on, where the environment names an endpoint, or to `to`.

    Raises ConfigError where they cannot be exported as the environment wants it.
    """
    global _exporter
    if to is None and not any(os.environ.get(name) for name in ENDPOINTS):
        return
    protocol = next((value for name in PROTOCOLS if (value := os.environ.get(name))), PROTOCOL)
    if to is None and protocol != PROTOCOL:
        raise ConfigError(f"{PROTOCOLS[1]}={protocol}: spans are exported by {PROTOCOL} only", field="otel")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{ENDPOINTS[1]} is set, but OpenTelemetry is not installed ({error}): pip install 'sglang-nats[otel]'",
            field="otel",
        ) from None
    ours = {"service.name": f"sglang-nats-{role}", "service.namespace": "sglang-nats", "service.instance.id": instance}
    if os.environ.get("OTEL_SERVICE_NAME"):
        del ours["service.name"]
    provider = TracerProvider(resource=Resource.create(ours), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(to or OTLPSpanExporter()))
    _exporter = Exporter(provider)


def stop() -> None:
    """Export what waits, and nothing from now on."""
    global _exporter
    exporter, _exporter = _exporter, None
    if exporter is not None:
        exporter.close()


def begin(
    name: str,
    parent: TraceContext | None,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    start_unix_s: float | None = None,
    kind: Kind = "internal",
) -> Span:
    """A span to be ended; `parent` None begins a trace."""
    if _exporter is None:
        return Span(parent or TraceContext.new())
    span = _exporter.open(name, parent, start_unix_s, kind)
    span.set(attributes or {})
    return span


def record(
    name: str,
    parent: TraceContext,
    start_unix_s: float,
    end_unix_s: float,
    attributes: Mapping[str, Attribute] | None = None,
) -> None:
    """A span that is over. Clocks of two machines: it never ends before it began."""
    if _exporter is not None:
        begin(name, parent, attributes, start_unix_s=start_unix_s).end(max(start_unix_s, end_unix_s))
