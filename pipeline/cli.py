"""The command line. Light commands import only what they use, so that `--help` comes at once.

Errors of the pipeline are printed as a sentence, with exit code 1; a wrong command line is exit code 2.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
import typer

from pipeline import config
from pipeline.errors import ConfigError, PipelineError
from subjects import names

if TYPE_CHECKING:
    from pipeline.local import LocalTopology

TOPOLOGY_DEFAULT: Final = "cpu-aggregated"
QUESTION: Final = "What is the capital of France?"
SUBJECTS_PAGE: Final = Path("docs/subjects.md")
HEARD_S: Final = 1.3
"""Long enough to hear one heartbeat of everyone."""
CONNECT_S_MAX: Final = 3.0
"""A command that only looks does not wait longer for a broker."""
T = TypeVar("T")

app = typer.Typer(
    name="sglang-nats",
    help="SGLang serving as an event-driven NATS JetStream pipeline.",
    epilog="Start with: sglang-nats demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
LOCAL: Final = "On this machine"
ASK: Final = "Ask and look"
WORKERS: Final = "One worker in the foreground"

TopologyArgument = Annotated[
    str, typer.Argument(metavar="[TOPOLOGY]", help="A TOML file, or the name of one in infra/topologies.")
]
NatsOption = Annotated[
    str | None,
    typer.Option(
        "--nats",
        metavar="URL",
        help=f"The broker; else $SGLANG_NATS_NATS, $NATS_URL, {config.NATS_URL_DEFAULT}.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The served model; default: the only one that is served.")
]


def main() -> None:
    """The entry point: an error is a sentence and an exit code, never a traceback."""
    try:
        app()
    except PipelineError as error:
        print(f"sglang-nats: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command that speaks to a person: of the log only errors."""
    from pipeline import log

    log.configure("error")
    return asyncio.run(work)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("sglang-nats"))
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SGLang serving as an event-driven NATS JetStream pipeline."""


# --- on this machine --------------------------------------------------------------------------------


@app.command(rich_help_panel=LOCAL)
def up(
    topology: TopologyArgument = TOPOLOGY_DEFAULT,
    run_s: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", min=0, help="Stop by itself after this time.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where settings, logs and streams are kept; default: in the cache, kept between runs."),
    ] = None,
) -> None:
    """Start a broker and every worker here, and keep them running until Ctrl-C."""
    settings = config.load_topology(topology)
    where = folder or _cache() / "up" / Path(topology).stem
    _run(_up(settings, where, run_s))


@app.command(rich_help_panel=LOCAL)
def demo(
    topology: TopologyArgument = TOPOLOGY_DEFAULT,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Start everything, ask one question, stream the answer, then show its timing and the subjects used."""
    import shutil
    import tempfile

    settings = config.load_topology(topology)
    if not settings.model_paths():
        raise ConfigError(f"the topology {topology!r} serves no model to ask", field="topology")
    folder = Path(tempfile.mkdtemp(prefix="sglang-nats-demo-"))
    code = _run(_demo(settings, folder, question, max_tokens))
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


async def _up(settings: config.TopologySettings, folder: Path, run_s: float | None) -> None:
    from pipeline.local import running
    from pipeline.screen import err

    with _only_one(folder):
        async with running(_on_a_known_port(settings), folder) as local:
            ended = _on_signals(local)
            await _ready_or(local, ended)
            if not ended.is_set():
                _say_what_next(local, folder)
                await _first_of(ended.wait(), _report_changes(local), timeout_s=run_s)
            err.print("stopping: workers finish or hand over what they have; Ctrl-C again ends them at once")


async def _demo(settings: config.TopologySettings, folder: Path, question: str, max_tokens: int) -> int:
    """The demo's exit code. Its run folder, with the logs, is kept where it fails."""
    from pipeline.local import running
    from pipeline.screen import err

    try:
        async with running(settings, folder) as local:
            ended = _on_signals(local)
            await _ready_or(local, ended)
            if ended.is_set():
                return 130
            answering = asyncio.ensure_future(_ask_and_tell(local, question, max_tokens))
            await _first_of(ended.wait(), answering)
            return answering.result() if answering.done() and not answering.cancelled() else 130
    except PipelineError as error:
        err.print(f"sglang-nats: {error}", style="red", markup=False)
        err.print(f"the logs are in {folder}", markup=False)
        return 1


async def _ready_or(local: "LocalTopology", ended: asyncio.Event) -> None:
    """Show the start until every worker is ready, or until the user has seen enough."""
    from pipeline.screen import Starting

    starting = Starting(local)

    async def tell() -> None:
        while True:
            starting.tell()
            await asyncio.sleep(0.2)

    async def start() -> None:
        await local.start()
        await local.until_ready()

    with starting.shown():
        telling = asyncio.create_task(tell())
        try:
            await _first_of(start(), ended.wait())
        finally:
            telling.cancel()
    starting.tell()


async def _ask_and_tell(local: "LocalTopology", question: str, max_tokens: int) -> int:
    """Ask, stream the answer, then print its timing and which subjects carried what; the exit code."""
    from pipeline.client import Client
    from pipeline.screen import err, out, table
    from pipeline.tap import Tap

    async with Client.connect(local.url, client="demo") as client, Tap.on(local.url) as tap:
        out.print(f"\n{question}", style="bold", markup=False)
        fields = {
            "request_id": f"demo-{token_hex(3)}",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        answer = await _stream(client, local.models[0], fields)
        await tap.settle()
    out.print()
    for failure in answer.failures:
        err.print(f"{failure.code}: {failure.message}", style="red", markup=False)
    out.print(answer.timing(), style="green")
    out.print()
    rows = [(seen.subject, seen.flow, f"{seen.messages:,}", f"{seen.payload_bytes:,}") for seen in tap.seen()]
    out.print(table("Subjects used", ("Subject", "From -> to", "Messages", "Bytes"), rows))
    return 1 if answer.failures or not answer.tokens else 0


def _say_what_next(local: "LocalTopology", folder: Path) -> None:
    from pipeline.screen import err

    url = "" if local.url == config.nats_url() else f" --nats {local.url}"
    model = local.models[0] if local.models else "MODEL"
    err.print(
        f"\nEverything is ready on {local.url}. In another terminal:\n\n"
        f'  sglang-nats request{url} "{QUESTION}"\n'
        f"  sglang-nats workers{url}\n"
        f"  sglang-nats streams{url}\n"
        f"  nats sub{url.replace('--nats', '-s')} '{names.EVERYTHING}'\n"
        f"  nats pub{url.replace('--nats', '-s')} {names.REQUESTS.of(model=model)} "
        '\'{"messages":[{"role":"user","content":"hi"}]}\'\n'
        + "".join(f"  curl {address}\n" for address in local.metrics_addresses())
        + f"\nLogs: {folder}. Ctrl-C stops everything.\n",
        markup=False,
    )


async def _report_changes(local: "LocalTopology") -> None:
    from pipeline.screen import err

    async def tell() -> None:
        while True:
            while local.recent:
                err.print(local.recent.popleft(), style="yellow", markup=False)
            await asyncio.sleep(0.2)

    await _first_of(local.until_failed(), tell())


def _on_signals(local: "LocalTopology") -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; a second one kills the workers at once."""
    ended = asyncio.Event()

    def on_signal() -> None:
        if ended.is_set():
            local.kill()
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return ended


async def _first_of(*works: Coroutine[Any, Any, Any] | asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Until one of the works ends (its exception is raised) or the time is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _on_a_known_port(settings: config.TopologySettings) -> config.TopologySettings:
    """NATS' own port for the embedded broker where it is free, so that other commands find it unasked."""
    import socket

    if settings.nats.url or settings.nats.port:
        return settings
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 4222))
        except OSError:
            return settings
    return msgspec.structs.replace(settings, nats=config.NatsSettings(port=4222))


def _only_one(folder: Path):
    """Holds the folder's lock; a second topology on the same streams and logs would disturb the first."""
    import contextlib
    import fcntl

    @contextlib.contextmanager
    def held():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"this topology runs already, with its files in {folder}: stop it, or give --folder", field="folder"
                ) from None
            yield

    return held()


def _cache() -> Path:
    from pipeline.models import cache_folder

    return cache_folder()


# --- ask and look -----------------------------------------------------------------------------------


@app.command(rich_help_panel=ASK)
def request(
    prompt: Annotated[str | None, typer.Argument(help="The user's message; or give --json.")] = None,
    model: ModelOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="A request as JSON (- for standard input); options go above it."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the prompt as it is, without a chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; default: what the context leaves.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a draw.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    choices: Annotated[int, typer.Option("-n", help="How many answers.")] = 1,
    deadline_s: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="Give up after this.")] = 600.0,
    frames: Annotated[bool, typer.Option("--frames", help="Print each frame as JSON instead of text.")] = False,
    nats: NatsOption = None,
) -> None:
    """Ask a model; the answer streams to standard output, its timing goes to standard error."""
    import time

    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "n": choices if choices != 1 else None,
        "deadline": time.time() + deadline_s,
    }
    fields = _request_fields(json_file, prompt, system, raw)
    fields |= {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(_run(_request(nats or config.nats_url(), model, fields, frames)))


def _request_fields(json_file: Path | None, prompt: str | None, system: str | None, raw: bool) -> dict[str, Any]:
    """The request's fields from file and prompt. Raises ConfigError where they do not make one request."""
    fields: dict[str, Any] = {}
    if json_file:
        try:
            text = sys.stdin.read() if str(json_file) == "-" else json_file.read_text()
            fields = json.loads(text)
        except OSError as error:
            raise ConfigError(f"cannot read {json_file}: {error.strerror}", field="json") from None
        except ValueError as error:
            raise ConfigError(f"{json_file} is not JSON: {error}", field="json") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{json_file} does not hold a JSON object", field="json")
    if prompt is not None:
        turns = [{"role": "system", "content": system}] if system else []
        fields.pop("prompt" if not raw else "messages", None)
        fields |= {"prompt": prompt} if raw else {"messages": [*turns, {"role": "user", "content": prompt}]}
    if not fields:
        raise ConfigError("give a prompt, or a request with --json FILE", field="prompt")
    return fields


async def _request(url: str, model: str | None, fields: dict[str, Any], frames: bool) -> int:
    from pipeline.client import Client
    from pipeline.screen import err

    named = model or fields.get("model") or await _only_model(url)
    async with Client.connect(url) as client:
        answer = await _stream(client, named, fields, as_json=frames)
    for failure in answer.failures:
        place = f" ({failure.field})" if failure.field else ""
        print(f"sglang-nats: {failure.code}{place}: {failure.message}", file=sys.stderr)
    err.print(answer.timing(), style="dim")
    return 1 if answer.failures else 0


async def _only_model(url: str) -> str:
    """The model that is served where only one is. Raises ConfigError where there are none or several."""
    async with _looking(url) as (_, presence):
        models = sorted(presence.models())
    if len(models) == 1:
        return models[0]
    found = f"there are {', '.join(models)}" if models else "no worker has registered one yet"
    raise ConfigError(f"say which model with --model NAME: {found}", field="model")


async def _stream(client: Any, model: str, fields: dict[str, Any], *, as_json: bool = False):
    """Send a request and print its frames as they come: one choice as a stream, several one after another."""
    from contextlib import aclosing

    from pipeline.screen import Answer
    from subjects.codec import Format, encode
    from subjects.messages import Request

    try:
        choices = msgspec.convert(fields, Request).n
    except msgspec.ValidationError as error:
        raise ConfigError(f"this is no request: {error}", field="json") from None
    answer = Answer()
    texts = [""] * choices
    async with aclosing(client.generate(model=model, **fields)) as frames:
        async for frame in frames:
            text = answer.add(frame)
            texts[frame.choice] += text
            if as_json:
                print(encode(frame, Format.JSON).decode(), flush=True)
            elif choices == 1:
                print(text, end="", flush=True)
    if not as_json and choices == 1:
        print()
    elif not as_json:
        print("\n".join(f"[{index}] {text}" for index, text in enumerate(texts)))
    return answer


@app.command(rich_help_panel=ASK)
def workers(nats: NatsOption = None) -> None:
    """Every worker: its role and model, whether it takes work, and its load."""
    _run(_workers(nats or config.nats_url()))


async def _workers(url: str) -> None:
    from pipeline.screen import err, out, table

    with err.status("listening for heartbeats"):
        async with _looking(url) as (_, presence):
            await asyncio.sleep(HEARD_S)
            states = presence.workers()
    rows = []
    for state in states:
        beat, card = state.heartbeat, state.card
        if beat is None:
            continue
        takes = "draining" if beat.draining else "ready" if beat.ready else "starting"
        kv = f"{beat.load.kv_tokens_used:,}/{beat.load.kv_tokens:,}" if beat.load.kv_tokens else "-"
        slots = f"{beat.in_flight}/{beat.slots}" if beat.slots else str(beat.in_flight)
        rows.append((beat.worker, beat.role, beat.model or "-", takes, slots, kv, card.engine if card else "-"))
    heads = ("Worker", "Role", "Model", "State", "In flight", "KV tokens", "Engine")
    out.print(table("", heads, sorted(rows)) if rows else "no worker is up")


@app.command(rich_help_panel=ASK)
def streams(nats: NatsOption = None) -> None:
    """Every stream and consumer: what waits, what is being worked on, what came again."""
    _run(_streams(nats or config.nats_url()))


async def _streams(url: str) -> None:
    from pipeline.errors import BrokerRefused
    from pipeline.screen import out, table
    from subjects import streams as declared

    async with _looking(url) as (bus, presence):
        rows, readers = [], []
        for spec in declared.STREAMS:
            try:
                state = await bus.stream_state(spec.name)
            except BrokerRefused:
                rows.append((spec.name, "missing", "-", "-", spec.about))
                continue
            rows.append((spec.name, f"{state.messages:,}", f"{state.bytes:,}", str(state.consumers), spec.about))
        for spec in declared.all_consumers(presence.models()):
            try:
                reader = await bus.consumer_state(spec.stream, spec.name)
            except BrokerRefused:
                continue
            figures = (reader.pending, reader.ack_pending, reader.redelivered, reader.waiting)
            readers.append((spec.name, spec.stream, *(f"{figure:,}" for figure in figures)))
    out.print(table("Streams", ("Stream", "Messages", "Bytes", "Consumers", "Holds"), rows))
    out.print()
    heads = ("Consumer", "Stream", "Waiting", "In work", "Came again", "Open pulls")
    out.print(table("Consumers", heads, readers))


def _looking(url: str):
    """A connection and the presence seen through it, closed in any case."""
    import contextlib

    @contextlib.asynccontextmanager
    async def looking():
        from pipeline.bus import Bus
        from pipeline.presence import Presence

        bus = await Bus.connect(url, name="cli", timeout_s=CONNECT_S_MAX)
        try:
            presence = Presence(bus)
            await presence.start()
            yield bus, presence
            await presence.close()
        finally:
            await bus.close()

    return looking()


@app.command(rich_help_panel=ASK)
def subjects(
    to: Annotated[Path, typer.Option("--out", help="Where to write the page.")] = SUBJECTS_PAGE,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where the page is stale.")] = False,
) -> None:
    """Write the page of all subjects, streams and messages from their declarations."""
    from subjects.catalogue import render

    page = render()
    if not check:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(page)
    elif not to.is_file() or to.read_text() != page:
        raise ConfigError(f"{to} is not what the code declares: run `just subjects`", field="out")


# --- one worker in the foreground -------------------------------------------------------------------

_PASS_ON: Final = {"allow_extra_args": True, "allow_interspersed_args": True}


def _stage_command(role: str, about: str) -> None:
    """Add the command that runs one worker of a role."""

    def run(
        context: typer.Context,
        file: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings, as TOML.")] = None,
        worker: Annotated[str | None, typer.Option(help="Its name; default: role, host and a random part.")] = None,
        nats: NatsOption = None,
        model: Annotated[str | None, typer.Option(metavar="NAME", help="The served model's name.")] = None,
        model_path: Annotated[
            str | None, typer.Option(metavar="PATH", help=f"A folder, a hub name, or {config.BUILTIN_MODEL}.")
        ] = None,
        models: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME=PATH", help="preprocess: a model to expect; may be repeated."),
        ] = None,
        engine: Annotated[str | None, typer.Option(metavar="sglang|simulated", help="What runs the model.")] = None,
        slots: Annotated[int | None, typer.Option(help="Most tasks at once; 0: as many as the engine runs.")] = None,
        simulated: Annotated[
            list[str] | None,
            typer.Option(metavar="KEY=VALUE", help="The simulated engine, e.g. ttft_ms=20; may be repeated."),
        ] = None,
        metrics_port: Annotated[int | None, typer.Option(help="telemetry: port of /metrics; 0: a free one.")] = None,
        log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
        parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    ) -> None:
        options = {
            "worker": worker,
            "nats": nats,
            "model": model,
            "model_path": model_path,
            "models": _pairs(models, "models"),
            "engine": engine,
            "slots": slots,
            "simulated": {name: _number(text) for name, text in _pairs(simulated, "simulated").items()},
            "metrics_port": metrics_port,
            "log_level": log_level,
            "sglang": config.sglang_flags(context.args),
        }
        given = {name: value for name, value in options.items() if value is not None and value != {}}
        settings = config.load_worker(role, file=file, environment=os.environ, options=given)
        raise typer.Exit(_run_stage(settings, parent))

    epilog = "Flags after -- go to SGLang as they are: sglang-nats decode --model m -- --tp-size 2"
    app.command(role, help=about, epilog=epilog, context_settings=_PASS_ON, rich_help_panel=WORKERS)(run)


def _run_stage(settings: config.WorkerSettings, parent: int | None) -> int:
    from pipeline import log

    if parent is not None:
        _end_with(parent)
    log.configure(settings.log_level)
    from pipeline.worker import run_worker

    return run_worker(settings)


def _end_with(parent: int) -> None:
    """Have the kernel end this process in order (SIGTERM) when the one that started it is gone (Linux)."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we could ask
        sys.exit(1)


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` options as a table. Raises ConfigError for one without `=`."""
    pairs = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--{option} takes NAME=VALUE, not {text!r}", field=option)
        pairs[name] = value
    return pairs


def _number(text: str) -> Any:
    """The number that a text stands for, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


_stage_command("preprocess", "Take requests, check and tokenize them, and pass them on to decode workers.")
_stage_command("decode", "Run a model: own requests from their first token to their last frame.")
_stage_command("telemetry", "Collect metrics and heartbeats, and serve them to Prometheus.")


if __name__ == "__main__":
    main()
