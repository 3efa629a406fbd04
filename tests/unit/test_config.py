"""Settings: where they come from, which one wins, and what a mistake says."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import config
from pipeline.config import BUILTIN_MODEL, NATS_URL_DEFAULT, load_topology, load_worker, nats_url, sglang_flags
from pipeline.errors import ConfigError
from pipeline.local import command
from subjects.names import is_token


def worker(file: Path | None = None, environment: dict[str, str] | None = None, **options: Any):
    return load_worker("decode", file=file, environment=environment or {}, options=options)


def toml(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text)
    return file


def test_defaults_need_nothing() -> None:
    settings = worker()
    assert settings.role == "decode"
    assert settings.nats == NATS_URL_DEFAULT
    assert is_token(settings.worker) and settings.worker.startswith("decode-")
    assert settings.worker != worker().worker


def test_routing_is_merged_key_by_key(tmp_path: Path) -> None:
    file = toml(tmp_path, 'routing = {policy = "least_loaded", load_weight = 2.0}')
    routing = worker(file, {"SGLANG_NATS_ROUTING": '{"load_weight": 0.5, "seed": 7}'}).routing
    assert (routing.policy, routing.load_weight, routing.seed) == ("least_loaded", 0.5, 7)


def test_command_line_goes_above_environment_above_file(tmp_path: Path) -> None:
    file = toml(tmp_path, 'slots = 1\nmodel = "of-file"\nlog_level = "debug"\n[sglang]\ntp_size = 1\ndp_size = 1')
    environment = {"SGLANG_NATS_SLOTS": "2", "SGLANG_NATS_MODEL": "of-env", "SGLANG_NATS_SGLANG": '{"dp_size": 2}'}
    settings = worker(file, environment, slots=3, sglang={"page_size": "16"})
    assert (settings.slots, settings.model, settings.log_level) == (3, "of-env", "debug")
    assert settings.sglang == {"tp_size": 1, "dp_size": 2, "page_size": "16"}


def test_nats_url_comes_from_our_variable_before_the_cli_of_nats() -> None:
    assert nats_url({}) == NATS_URL_DEFAULT
    assert nats_url({"NATS_URL": "nats://a"}) == "nats://a"
    assert nats_url({"NATS_URL": "nats://a", "SGLANG_NATS_NATS": "nats://b"}) == "nats://b"
    assert worker(environment={"NATS_URL": "nats://a"}).nats == "nats://a"
    assert worker(environment={"NATS_URL": "nats://a", "SGLANG_NATS_NATS": "nats://b"}).nats == "nats://b"


@pytest.mark.parametrize(
    ("text", "says", "field"),
    [
        ("slotz = 1", "no setting 'slotz'; did you mean 'slots'?", "slotz"),
        ('slots = "many"', "Expected `int`, got `str`", "slots"),
        ("slots = -1", ">= 0", "slots"),
        ("metrics_port = 70000", "<= 65535", "metrics_port"),
        ('engine = "vllm"', "Invalid enum value 'vllm'", "engine"),
        ("simulated = {ttft_ms = -1}", ">= 0", "simulated.ttft_ms"),
        ("simulated = {tftt_ms = 1}", "did you mean 'ttft_ms'?", "simulated.tftt_ms"),
        ("routing = {policy = 'vk'}", "vk", "routing.policy"),
        ("routing = {temprature = 1}", "did you mean 'temperature'?", "routing.temprature"),
        ('role = "telemetry"', "is for the role 'telemetry', not 'decode'", "role"),
        ("slots =", "cannot be parsed", "config"),
        ('worker = "a.b"', "does not fit in a subject", "worker"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, says: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        worker(toml(tmp_path, text))
    assert says in str(caught.value)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("SGLANG_NATS_SLOTS", "many", "SGLANG_NATS_SLOTS: Expected `int`"),
        ("SGLANG_NATS_SGLANG", "tp_size=1", "SGLANG_NATS_SGLANG is not JSON"),
        ("SGLANG_NATS_SGLANG", "[1]", "SGLANG_NATS_SGLANG is not a JSON object"),
    ],
)
def test_mistakes_in_the_environment_are_named(variable: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        worker(environment={variable: text})


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        worker(tmp_path / "none.toml")


def test_flags_of_sglang_become_its_fields() -> None:
    arguments = ["--tp-size", "2", "--enable-metrics", "--kv-events-config={}", "--ids", "1", "2", "3", "--last"]
    assert sglang_flags(arguments) == {
        "tp_size": "2",
        "enable_metrics": True,
        "kv_events_config": "{}",
        "ids": "1 2 3",
        "last": True,
    }
    assert sglang_flags([]) == {}
    with pytest.raises(ConfigError, match="'stray' after -- belongs to no flag"):
        sglang_flags(["stray"])


@pytest.mark.parametrize("file", sorted(config.TOPOLOGIES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_topology_we_ship_loads_by_its_name(file: Path) -> None:
    topology = load_topology(file.stem)
    assert topology == load_topology(str(file))
    assert topology.about
    names = [settings.worker for settings, _ in topology.settings("nats://x:1")]
    assert len(set(names)) == len(names)


def test_a_topology_names_its_workers_and_gives_them_the_model(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'model = "m"\nmodel_path = "builtin:smollm2"\n'
        '[[workers]]\nrole = "preprocess"\n[[workers]]\nrole = "decode"\ncount = 2\nenvironment = {A = "1"}\n'
        '[[workers]]\nrole = "decode"\nmodel = "other"\nmodel_path = "/m"',
    )
    workers = {settings.worker: (settings, extra) for settings, extra in load_topology(str(file)).settings("nats://x")}
    assert list(workers) == ["preprocess-0", "decode-0", "decode-1", "decode-2"]
    preprocess, _ = workers["preprocess-0"]
    assert preprocess.model is None and preprocess.models == {"m": BUILTIN_MODEL, "other": "/m"}
    decode, extra = workers["decode-1"]
    assert (decode.model, decode.model_path, decode.nats, extra) == ("m", BUILTIN_MODEL, "nats://x", {"A": "1"})
    assert workers["decode-2"][0].model == "other"


def test_mistakes_in_a_topology_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give a TOML file or one of .*cpu-aggregated.*simulated"):
        load_topology("none")
    with pytest.raises(ConfigError, match=r"length >= 1 \(at workers\)"):
        load_topology(str(toml(tmp_path, "workers = []")))
    with pytest.raises(ConfigError, match=r"no setting 'cout'; did you mean 'count'\? \(at workers\[0\]\.cout\)"):
        load_topology(str(toml(tmp_path, '[[workers]]\nrole = "decode"\ncout = 2')))


def test_settings_written_for_a_child_come_back_equal(tmp_path: Path) -> None:
    settings = worker(slots=3, sglang={"tp_size": 2}, simulated={"ttft_ms": 1.5}, worker="w", nats="nats://x")
    file = tmp_path / "w.json"
    file.write_bytes(msgspec.json.encode(settings))
    assert json.loads(file.read_text())["slots"] == 3
    assert worker(file) == settings
    line = command(settings, file)
    assert line[3:] == [*("decode", "--config", str(file), "--worker", "w", "--nats", "nats://x"), *line[-2:]]
