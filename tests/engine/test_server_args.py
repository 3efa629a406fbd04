"""SGLang's settings pass through; wrong ones are refused by name before anything starts."""

import multiprocessing

import pytest

from pipeline.config import BUILTIN_MODEL
from pipeline.engine.sglang import cpu_platform
from pipeline.engine.sglang.engine import SglangEngine
from pipeline.errors import ConfigError

cpu_platform.prepare()
from pipeline.engine.sglang.server_args import resolve  # noqa: E402

pytestmark = pytest.mark.engine
without_gpu = pytest.mark.skipif(cpu_platform.accelerator_present(), reason="defaults of a machine without a GPU")


@pytest.mark.parametrize(
    ("key", "value", "becomes"),
    [
        ("max_running_requests", 5, {"max_running_requests": 5}),
        ("max_running_requests", "5", {"max_running_requests": 5}),
        ("max-running-requests", "5", {"max_running_requests": 5}),
        ("mem_fraction_static", "0.25", {"mem_fraction_static": 0.25}),
        ("enable_metrics", True, {"enable_metrics": True}),
        ("enable_metrics", "true", {"enable_metrics": True}),
        ("enable_metrics", "false", {"enable_metrics": False}),
        ("tensor_parallel_size", "2", {"tp_size": 2}),
        ("served_model_name", "7", {"served_model_name": "7"}),
        ("cuda_graph_bs_decode", "1 2 4", {"cuda_graph_bs_decode": [1, 2, 4]}),
        ("kv_events_config", {"publisher": "nats"}, {"kv_events_config": '{"publisher": "nats"}'}),
        ("reasoning_parser", "qwen3", {"reasoning_parser": "qwen3"}),
        ("stat_loggers", {"scheduler": int}, {"stat_loggers": {"scheduler": int}}),
    ],
)
def test_a_setting_passes_through(key, value, becomes):
    assert resolve("model", {key: value}).items() >= becomes.items()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_runing_requests", 5, "did you mean max_running_requests"),
        ("no_such_thing_at_all", 5, "SGLang has no setting 'no_such_thing_at_all'"),
        ("max_running_requests", "many", "max_running_requests cannot be 'many'"),
        ("enable_metrics", "perhaps", "it is true or false"),
        ("sampling_backend", "dice", "one of"),
        ("model_path", "other", "--model-path"),
        ("node_rank", 1, "not supported"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(key, value, says):
    with pytest.raises(ConfigError, match=says) as refused:
        resolve("model", {key: value})
    assert refused.value.field == f"sglang.{key}"


@without_gpu
def test_cpu_defaults_give_way_to_what_the_user_set():
    arguments = resolve("model", {"max_total_tokens": 99})
    assert (arguments["device"], arguments["attention_backend"]) == ("cpu", "torch_native")
    assert arguments["max_total_tokens"] == 99
    assert (
        "device" not in resolve("model", {"device": "cuda"}) or resolve("model", {"device": "cuda"})["device"] == "cuda"
    )
    assert "attention_backend" not in resolve("model", {"device": "cuda"})


def test_there_are_no_cpu_defaults_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_platform, "accelerator_present", lambda: True)
    assert resolve("model", {}) == {
        "model_path": "model",
        "incremental_streaming_output": True,
        "enable_metrics": True,
        "reasoning_parser": "auto",
        "tool_call_parser": "auto",
    }


def test_disaggregation_goes_over_nixl():
    assert resolve("model", {"disaggregation_mode": "prefill"})["disaggregation_transfer_backend"] == "nixl"


async def test_an_unknown_setting_fails_before_anything_starts():
    engine = SglangEngine(BUILTIN_MODEL, {"max_runing_requests": 5})
    before = multiprocessing.active_children()
    try:
        with pytest.raises(ConfigError, match="did you mean max_running_requests"):
            await engine.start()
        assert multiprocessing.active_children() == before
    finally:
        await engine.close()
