"""Operations' arguments: what is taken, and how a mistake is named."""

import pytest

from pipeline.errors import InvalidRequest
from pipeline.operations import ALL, BY_NAME, LogLevel, StartProfile, UpdateWeights, describe_arguments, find, parse


def test_arguments_come_as_text_or_as_values():
    operation = find("start_profile")
    wanted = StartProfile(num_steps=5, activities=("CPU", "GPU"), by_stage=True)
    assert parse(operation, {"num_steps": 5, "activities": ["CPU", "GPU"], "by_stage": True}) == wanted
    assert parse(operation, {"num_steps": "5", "activities": "CPU, GPU", "by_stage": "true"}, as_text=True) == wanted
    assert parse(find("log_level"), {"level": "debug"}, as_text=True) == LogLevel(level="debug")
    assert parse(find("update_weights"), {"model_path": "/1", "weight_version": "7"}, as_text=True) == UpdateWeights(
        model_path="/1", weight_version="7"
    )


@pytest.mark.parametrize(
    ("name", "given", "field", "said"),
    [
        ("update_weights", {}, "model_path", "needs it"),
        ("update_weights", {"model_path": "relative/path"}, "model_path", "'relative/path' is not allowed"),
        ("update_weights", {"model_path": "/" + "x" * 5000}, "model_path", "length <= 4096"),
        ("start_profile", {"num_steps": 0}, "num_steps", "`int` >= 1"),
        ("start_profile", {"num_steps": "3"}, "num_steps", "Expected `int"),
        ("start_profile", {"activities": ["RPD"]}, "activities", "there are CPU, GPU"),
        ("release_memory", {"kinds": ["weights", "souls"]}, "kinds", "there are kv_cache, weights, cuda_graph"),
        ("flush_cache", {"wait_s": 1e9}, "wait_s", "<= 3600"),
        ("resume", {"now": True}, "now", "resume takes no arguments"),
    ],
)
def test_a_mistake_is_named(name, given, field, said):
    with pytest.raises(InvalidRequest) as caught:
        parse(find(name), given)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert said in str(caught.value)


def test_an_unknown_operation_names_those_that_there_are():
    with pytest.raises(InvalidRequest, match="'dance' is not one of ping, drain, pause"):
        find("dance")


def test_every_operation_has_a_deadline_that_waiting_is_added_to():
    assert len(BY_NAME) == len(ALL)
    assert all(operation.timeout_s > 0 and operation.about.endswith(".") for operation in ALL)
    flush = find("flush_cache")
    assert flush.deadline_s(parse(flush, {"wait_s": 7.0})) == flush.timeout_s + 7.0
    assert describe_arguments(find("update_weights")) == "model_path=... [wait_s=30.0] [weight_version]"
