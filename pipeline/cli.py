"""The command line. Light commands import only what they use, so that `--help` comes at once.

Errors of the pipeline are printed as a sentence, with exit code 1; a wrong command line is exit code 2.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import typer

from pipeline import config
from pipeline.errors import ConfigError, PipelineError

TOPOLOGY_DEFAULT: Final = "cpu-aggregated"
SUBJECTS_PAGE: Final = Path("docs/subjects.md")
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
RUN: Final = "Run the pipeline"
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
Watched = Annotated[Literal["bootstrap", "kv"], typer.Argument(help="What to watch.")]
ModelOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The served model; default: the only one that is served.")
]
SessionOption = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="The conversation: its requests go to one worker, while that costs little."),
]
ClientOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Whose answer it is; two of one name read each other's.")
]
ConsoleOption = Annotated[
    bool | None, typer.Option("--console/--no-console", help="gateway: serve the web console; default: no.")
]
FramesOption = Annotated[bool, typer.Option("--frames", help="Print each frame as JSON instead of text.")]


def main() -> None:
    """The entry point: an error is a sentence and an exit code, never a traceback."""
    try:
        app()
    except PipelineError as error:
        later = f" (try again after {error.retry_after_s:g} s)" if error.retry_after_s else ""
        print(f"sglang-nats: {error}{later}", file=sys.stderr)
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

    from pipeline import up as local
    from pipeline.models import cache_folder

    _run(local.up(settings, folder or cache_folder() / "up" / Path(topology).stem, run_s))


@app.command(rich_help_panel=LOCAL)
def demo(
    topology: TopologyArgument = TOPOLOGY_DEFAULT,
    question: Annotated[str, typer.Option(help="What to ask.")] = config.DEMO_QUESTION,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Start everything, ask one question, stream the answer, then show its timing and the subjects used."""
    settings = config.load_topology(topology)
    if not settings.model_paths():
        raise ConfigError(f"the topology {topology!r} serves no model to ask", field="topology")

    from pipeline import up as local

    folder = Path(tempfile.mkdtemp(prefix="sglang-nats-demo-"))
    code = _run(local.demo(settings, folder, question, max_tokens))
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


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
    priority: Annotated[
        int | None, typer.Option(metavar="N", help="Above 0: before all others of the model; below 0: after them.")
    ] = None,
    session: SessionOption = None,
    client: ClientOption = None,
    request_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Its id, for `resume` and `cancel`; the same id runs once.")
    ] = None,
    traceparent: Annotated[
        str | None, typer.Option(metavar="W3C", help="The trace that it belongs to; default: one of its own.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say its id and its trace.")] = False,
    frames: FramesOption = False,
    nats: NatsOption = None,
) -> None:
    """Ask a model; the answer streams to standard output, its timing goes to standard error."""
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "n": choices if choices != 1 else None,
        "deadline": time.time() + deadline_s,
        "priority": priority,
        "session": session,
        "request_id": request_id,
    }
    fields = _request_fields(json_file, prompt, system, raw)
    fields |= {name: value for name, value in options.items() if value is not None}

    from pipeline import look

    asking = look.ask(
        nats or config.nats_url(),
        model,
        fields,
        client=client,
        as_frames=frames,
        verbose=verbose,
        traceparent=traceparent,
    )
    raise typer.Exit(_run(asking))


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


@app.command(rich_help_panel=ASK)
def embed_text(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to embed.")],
    model: ModelOption = None,
    dimensions: Annotated[int | None, typer.Option(min=1, help="Shorter vectors, where the model has them.")] = None,
    nats: NatsOption = None,
) -> None:
    """Turn texts into vectors; each is a line of JSON on standard output."""
    from pipeline import look

    raise typer.Exit(_run(look.embed(nats or config.nats_url(), model, texts, dimensions)))


@app.command(rich_help_panel=ASK)
def resume(
    request_id: Annotated[str, typer.Argument(help="The request's id.")],
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who asked; default: the only one with an answer of this id.")
    ] = None,
    from_token: Annotated[int, typer.Option("--from", metavar="N", min=0, help="Leave out the first N tokens.")] = 0,
    choices: Annotated[int, typer.Option("-n", min=1, help="How many answers were asked for.")] = 1,
    deadline_s: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="Give up after this.")] = 600.0,
    frames: FramesOption = False,
    nats: NatsOption = None,
) -> None:
    """Read a request's answer from token N on: what the log has of it, then live to its end."""
    from pipeline import look

    reading = look.resume(
        nats or config.nats_url(),
        request_id,
        client=client,
        from_token=from_token,
        choices=choices,
        deadline_s=deadline_s,
        as_frames=frames,
    )
    raise typer.Exit(_run(reading))


@app.command(rich_help_panel=ASK)
def trace(
    request_id: Annotated[str, typer.Argument(help="The request's id.")],
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who asked; default: the only one with a request of this id.")
    ] = None,
    nats: NatsOption = None,
) -> None:
    """A request's timeline, from what the streams have of it: every hop, owner, gap and its end."""
    from pipeline import trace as tracing

    raise typer.Exit(_run(tracing.show(nats or config.nats_url(), request_id, client)))


@app.command(rich_help_panel=ASK)
def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Requests: OpenAI batch lines.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the answers go; default: FILE.out.jsonl. What it has is kept."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The served model, for lines whose body names none.")
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=4096, help="How many to have in work at once.")] = 256,
    deadline_s: Annotated[
        float,
        typer.Option("--deadline", metavar="SECONDS", min=1, max=86_000, help="The longest that a line may take."),
    ] = 43_200.0,
    submit_only: Annotated[
        bool, typer.Option("--submit", help="Submit every line and leave; a later run gets the answers.")
    ] = False,
    nats: NatsOption = None,
) -> None:
    """Answer a file of requests. Stopped or killed, the same command goes on, and pays for no line twice."""
    from pipeline.batch import run_batch

    url = nats or config.nats_url()
    running = run_batch(
        url,
        file,
        output,
        model=model,
        in_flight=in_flight,
        deadline_s=deadline_s,
        submit_only=submit_only,
    )
    raise typer.Exit(_run(running))


@app.command(rich_help_panel=ASK)
def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    nats: NatsOption = None,
) -> None:
    """The whole pipeline live: workers, queues, rates, latencies, cache hits, errors."""
    from pipeline import top as watching

    raise typer.Exit(_run(watching.top(nats or config.nats_url(), once)))


@app.command(rich_help_panel=ASK)
def workers(nats: NatsOption = None) -> None:
    """Every worker: its role and model, whether it takes work, and its load."""
    from pipeline import look

    _run(look.show_workers(nats or config.nats_url()))


@app.command(rich_help_panel=ASK)
def health(
    worker: Annotated[str | None, typer.Argument(help="Its name, as in `workers`; default: all.")] = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="Also ask each model for one token, the way clients do, and time it.")
    ] = False,
    nats: NatsOption = None,
) -> None:
    """Whether every worker lives and takes work, and why not; exit code 1 where any is not well."""
    from pipeline import checkup

    raise typer.Exit(_run(checkup.check(nats or config.nats_url(), worker, canary=canary)))


@app.command(rich_help_panel=ASK)
def watch(what: Watched, nats: NatsOption = None) -> None:
    """Print what passes between workers: bootstrap, handshakes of prefill and decode; kv, what caches hold."""
    from pipeline import watch as watching

    _run(watching.watch(watching.KV if what == "kv" else watching.BOOTSTRAP, nats or config.nats_url()))


@app.command(rich_help_panel=ASK)
def route(
    file: Annotated[
        Path,
        typer.Option("--explain", metavar="FILE", help="A request as JSON (- for standard input); not sent."),
    ],
    model: ModelOption = None,
    role: Annotated[Literal["decode", "prefill"], typer.Option(help="Whose workers to rank.")] = "decode",
    session: SessionOption = None,
    policy: Annotated[
        Literal["kv", "least_loaded", "random", "round_robin"], typer.Option(help="How workers are compared.")
    ] = "kv",
    nats: NatsOption = None,
) -> None:
    """Print which workers a request would go to now, the first choice first, and why."""
    fields = _request_fields(file, None, None, False)
    settings = config.RoutingSettings(policy=policy)

    from pipeline import route as routing

    url = nats or config.nats_url()
    raise typer.Exit(_run(routing.explain(url, fields, settings, model=model, role=role, session=session)))


@app.command(rich_help_panel=ASK)
def streams(nats: NatsOption = None) -> None:
    """Every stream and consumer: what waits, what is being worked on, what came again."""
    from pipeline import look

    _run(look.show_streams(nats or config.nats_url()))


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


# --- measure ----------------------------------------------------------------------------------------

bench = typer.Typer(help="Measure a served model under load: times, throughput, goodput, CPU.")
app.add_typer(bench, name="bench", rich_help_panel=ASK)
PlotsOption = Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Draw PNG files there.")]
RateOption = Annotated[float | None, typer.Option(min=1e-3, help="Open loop: requests a second.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Open loop: times and lengths of a Mooncake trace (JSONL)."),
]
PidOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PID", help="Count the CPU of this process here and its children; may be repeated."),
]


@bench.callback(invoke_without_command=True)
def bench_run(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Ask this OpenAI HTTP server; default: over NATS.")] = None,
    model: ModelOption = None,
    concurrency: Annotated[int, typer.Option(min=1, max=20_000, help="Closed loop: so many at once.")] = 16,
    rate: RateOption = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="With --rate: evenly spaced, not Poisson.")] = False,
    trace_file: TraceOption = None,
    speedup: Annotated[float, typer.Option(min=1e-3, help="The trace's clock runs so much faster.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to send.")] = 200,
    issue_s: Annotated[float, typer.Option("--for", metavar="SECONDS", min=0.1, help="Send none later.")] = 300.0,
    prompt_length: Annotated[
        str, typer.Option("--input", metavar="N[:M]", help="A prompt's length, or a span.")
    ] = "128",
    answer_length: Annotated[
        str, typer.Option("--output", metavar="N[:M]", help="An answer's tokens, or a span.")
    ] = "32",
    sharegpt: Annotated[bool, typer.Option("--sharegpt", help="Lengths spread as those of ShareGPT's turns.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Prompts are token ids, not words.")] = False,
    shared: Annotated[float, typer.Option("--shared-prefix", min=0, max=1, help="Share of a prompt that repeats.")] = 0,
    prefixes: Annotated[int, typer.Option(min=1, help="So many different shared prefixes.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a chat with one message.")] = False,
    eos: Annotated[bool, typer.Option("--eos", help="Let the model end its answer before the wanted length.")] = False,
    warmup: Annotated[int, typer.Option(min=0, max=10_000, help="Requests before, not counted.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed asks the same at the same times.")] = 0,
    deadline_s: Annotated[float, typer.Option("--deadline", metavar="SECONDS", min=0.1, help="Of a request.")] = 120.0,
    slo: Annotated[str | None, typer.Option(metavar="LIMITS", help="For goodput, in ms: ttft=200,tpot=20.")] = None,
    pid: PidOption = None,
    label: Annotated[str | None, typer.Option(help="What the run is called in tables.")] = None,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Result as JSON; default: bench-*.json.")
    ] = None,
    plots: PlotsOption = None,
    nats: NatsOption = None,
) -> None:
    """Send a load to a model, over NATS or HTTP, and print what came of it. Ctrl-C ends it with the figures so far."""
    if context.invoked_subcommand:
        return
    from pipeline import log
    from pipeline.bench import command
    from pipeline.bench.result import Settings

    log.configure("error")
    inputs, outputs = command.spans_of(prompt_length, answer_length, sharegpt=sharegpt)
    settings = Settings(
        target="http" if url else "nats", url=url or "", model=model or "",
        arrivals="trace" if trace_file else "closed" if rate is None else "fixed" if fixed else "poisson",
        concurrency=None if trace_file or rate else concurrency, rate_per_s=rate,
        trace=trace_file.name if trace_file else None, speedup=speedup, requests=requests, issue_s_max=issue_s,
        lengths="sharegpt" if sharegpt else "even", input_min=inputs[0], input_max=inputs[1],
        output_min=outputs[0], output_max=outputs[1], unit="tokens" if tokens else "words", shared_prefix=shared,
        prefixes=prefixes, chat=chat, ignore_eos=not eos, warmup=warmup, seed=seed, deadline_s=deadline_s,
        slo=command.slo_of(slo),
    )  # fmt: skip
    nats = nats if url else nats or config.nats_url()
    pids = command.pids_of(_pairs(pid, "pid"))
    code = command.run(settings, nats=nats, trace=trace_file, pids=pids, label=label, file=file, plots_folder=plots)
    raise typer.Exit(code)


@bench.command("compare")
def bench_compare(
    files: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Runs; the first is compared with.")],
    plots: PlotsOption = None,
) -> None:
    """Print runs side by side as a Markdown table, with ratios to the first one."""
    from pipeline.bench import command

    raise typer.Exit(command.compare(files, plots))


# --- run the pipeline -------------------------------------------------------------------------------

dead_letters = typer.Typer(help="Work that was given up: look at it, try it again, or drop it.", no_args_is_help=True)
app.add_typer(dead_letters, name="dead", rich_help_panel=RUN)
LettersArgument = Annotated[list[int], typer.Argument(metavar="LETTER...", help="Numbers from `dead list`.")]


@app.command(rich_help_panel=RUN)
def cancel(
    request_id: Annotated[str, typer.Argument(help="The request's id.")],
    reason: Annotated[str, typer.Option(help="What its client is told.")] = "cancelled by an operator",
    nats: NatsOption = None,
) -> None:
    """End a request, wherever it is: one that still waits ends when a worker takes it."""
    from pipeline import control

    raise typer.Exit(_run(control.cancel(nats or config.nats_url(), request_id, reason)))


@app.command(rich_help_panel=RUN)
def drain(worker: Annotated[str, typer.Argument(help="Its name, as in `workers`.")], nats: NatsOption = None) -> None:
    """Have a worker take no more work, finish what it has or hand it over, and end."""
    from pipeline import control

    raise typer.Exit(_run(control.drain(nats or config.nats_url(), worker)))


@app.command(rich_help_panel=RUN)
def control(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKER] OPERATION [KEY=VALUE]...", help="Who, what, and its arguments; see --list."),
    ] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every worker that can; WORKER is left out.")] = False,
    role: Annotated[str | None, typer.Option(metavar="ROLE", help="Every worker of a role, e.g. decode.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Every worker of a served model.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the operations and their arguments.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
    nats: NatsOption = None,
) -> None:
    """Have a worker do something: pause, flush its cache, change its weights, record a profile, and more."""
    from pipeline import control as controlling

    if listed:
        controlling.show_operations()
        return
    chosen = controlling.Chosen(everyone=everyone, role=role, model=model)
    raise typer.Exit(_run(controlling.control(nats or config.nats_url(), words or (), chosen, as_json=as_json)))


@app.command(rich_help_panel=RUN)
def pause(
    model: Annotated[str, typer.Argument(help="The served model's name.")],
    span: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="90s, 30m, 1h or 2d; default: until `unpause`.")
    ] = None,
    nats: NatsOption = None,
) -> None:
    """Hold back a model's requests: they are accepted and kept, running ones go on."""
    from pipeline import pause as pausing

    raise typer.Exit(_run(pausing.pause(nats or config.nats_url(), model, pausing.span_of(span) if span else None)))


@app.command(rich_help_panel=RUN)
def unpause(model: Annotated[str, typer.Argument(help="The served model's name.")], nats: NatsOption = None) -> None:
    """End a pause: the model's requests are served again, those that waited first."""
    from pipeline import pause as pausing

    raise typer.Exit(_run(pausing.unpause(nats or config.nats_url(), model)))


@dead_letters.command("list")
def dead_list(nats: NatsOption = None) -> None:
    """Every letter: when it died, where, of what."""
    from pipeline import dead

    raise typer.Exit(_run(dead.show_all(nats or config.nats_url())))


@dead_letters.command("show")
def dead_show(
    letter: Annotated[int, typer.Argument(help="A number from `dead list`.")], nats: NatsOption = None
) -> None:
    """One letter with its payload, which may be somebody's prompt, as JSON."""
    from pipeline import dead

    raise typer.Exit(_run(dead.show(nats or config.nats_url(), letter)))


@dead_letters.command("retry")
def dead_retry(
    letters: LettersArgument,
    deadline_s: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="How long each may take.")] = 600.0,
    nats: NatsOption = None,
) -> None:
    """Run a letter's work again, as a new request to the same client, and remove the letter."""
    from pipeline import dead

    raise typer.Exit(_run(dead.retry(nats or config.nats_url(), letters, deadline_s)))


@dead_letters.command("drop")
def dead_drop(letters: LettersArgument, nats: NatsOption = None) -> None:
    """Remove letters for good."""
    from pipeline import dead

    raise typer.Exit(_run(dead.drop(nats or config.nats_url(), letters)))


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
        metrics_host: Annotated[str | None, typer.Option(help="telemetry: address of /metrics.")] = None,
        port: Annotated[int | None, typer.Option(help="gateway: HTTP port; 0: a free one.")] = None,
        host: Annotated[str | None, typer.Option(help="gateway: address; 0.0.0.0: all of the machine.")] = None,
        keys_file: Annotated[str | None, typer.Option(metavar="FILE", help="gateway: API keys by client.")] = None,
        console: ConsoleOption = None,
        health_port: Annotated[
            int | None, typer.Option(help="HTTP port of /live and /ready; 0: a free one; default: none.")
        ] = None,
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
            "metrics_host": metrics_host,
            "gateway": {
                name: value
                for name, value in (("port", port), ("host", host), ("keys_file", keys_file), ("console", console))
                if value is not None
            },
            "health": {} if health_port is None else {"port": health_port},
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
_stage_command("prefill", "Run a model's prompts for its decode workers, and write their KV to them by RDMA.")
_stage_command("embed", "Run an embedding model: turn texts into vectors.")
_stage_command("telemetry", "Collect metrics and heartbeats, and serve them to Prometheus.")
_stage_command("gateway", "Serve OpenAI's API over HTTP, with every request and answer on the pipeline.")


if __name__ == "__main__":
    main()
