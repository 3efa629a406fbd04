"""Which engines publish KV events."""

from typing import Any

import msgspec
import pytest

from pipeline.config import WorkerSettings
from pipeline.engine.build import build_engine
from pipeline.engine.sglang.kv_events import KvEventsSettings, from_environment, wanted

PLACE = KvEventsSettings(url="nats://broker", model="my-org-my-model", worker="w0", incarnation="i1")


@pytest.mark.parametrize(
    ("role", "settings", "publishes"),
    [
        ("decode", {}, True),
        ("prefill", {}, True),
        ("decode", {"sglang": {"disaggregation_mode": "decode"}}, False),  # SGLang keeps no prefixes there
        ("decode", {"kv_events": False}, False),
        ("decode", {"sglang": {"kv_events_config": '{"publisher": "zmq"}'}}, False),  # the user's own
    ],
)
def test_engines_that_prefill_publish_unless_told_otherwise(role: str, settings: dict[str, Any], publishes: bool):
    worker = WorkerSettings(
        role=role, worker="w0", nats="nats://broker", model="my-org/my-model", model_path="anything", **settings
    )
    assert build_engine(worker, "i1")._kv_events == (PLACE if publishes else None)


def test_the_place_reaches_sglangs_processes():
    assert from_environment(PLACE.to_environment()) == PLACE
    assert from_environment({}) is None


@pytest.mark.parametrize(
    ("page_tokens", "accelerator", "asked", "publishes"),
    [(1, False, False, True), (1, True, False, False), (64, True, False, True), (1, True, True, True)],
)
def test_a_gpu_does_not_pay_for_small_pages_unasked(page_tokens: int, accelerator: bool, asked: bool, publishes: bool):
    place = msgspec.structs.replace(PLACE, at_any_cost=asked)
    assert wanted(place, page_tokens, accelerator) is publishes


def test_true_means_at_any_cost():
    worker = WorkerSettings(role="decode", worker="w0", model="m", model_path="anything", kv_events=True)
    assert build_engine(worker, "i1")._kv_events.at_any_cost
