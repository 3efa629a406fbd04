"""What is refused before SGLang hears of it, since its schedulers would die of it."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.sglang.operations import Operations
from pipeline.errors import Busy, InvalidRequest, NotSupported, PipelineError
from pipeline.operations import find, parse

STATE: dict[str, Any] = {
    "enable_memory_saver": True,
    "enable_weights_cpu_backup": False,
    "disaggregation_mode": "null",
    "expert_distribution_recorder_mode": None,
}


class Manager:
    """SGLang's TokenizerManager, as far as its state goes; anything else would be an AttributeError."""

    def __init__(self, **state: Any) -> None:
        self._state = STATE | state

    async def get_internal_state(self) -> list[dict[str, Any]]:
        return [self._state]


async def run(manager: Manager, operation: str, **arguments: Any) -> dict[str, Any]:
    return await Operations(manager, "/model").run(operation, parse(find(operation), arguments))


@pytest.mark.parametrize(
    ("state", "operation", "arguments", "kind", "said"),
    [
        ({"enable_memory_saver": False}, "release_memory", {}, NotSupported, "--enable-memory-saver"),
        ({"disaggregation_mode": "prefill"}, "release_memory", {}, NotSupported, "release its weights alone"),
        ({}, "resume_memory", {}, Busy, "no memory is released"),
        ({}, "resume_memory", {"kinds": ["weights"]}, Busy, "weights: not released"),
        ({}, "update_weights", {"model_path": "/nowhere"}, InvalidRequest, "there is no folder /nowhere"),
        ({}, "start_profile", {"by_stage": True}, InvalidRequest, "num_steps: start_profile by_stage needs it"),
        ({}, "start_profile", {"output_dir": "/proc/nothing"}, InvalidRequest, "cannot be made"),
        ({}, "stop_profile", {}, Busy, "no profile is being recorded"),
        ({}, "start_expert_distribution", {}, NotSupported, "the expert distribution recorder is off"),
        ({"expert_distribution_recorder_mode": "stat"}, "stop_expert_distribution", {}, Busy, "not being recorded"),
    ],
)
async def test_what_does_not_fit_is_refused(
    state: dict[str, Any], operation: str, arguments: dict[str, Any], kind: type[PipelineError], said: str
):
    with pytest.raises(kind, match=said):
        await run(Manager(**state), operation, **arguments)


async def test_the_server_info_shows_no_secrets_and_only_plain_values():
    secrets = {"api_key": "a", "admin_api_key": "b", "ssl_keyfile_password": "c", "hf_token": "d", "_private": "e"}
    shown = await run(Manager(**secrets, folder=Path("/model"), max_total_tokens=7), "server_info")
    assert not shown.keys() & secrets.keys()
    assert (shown["folder"], shown["max_total_tokens"]) == ("/model", 7)
