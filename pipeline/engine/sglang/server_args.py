"""SGLang's own settings: every field passes through, under its own name; a wrong one fails before anything starts."""

import argparse
import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any, Final

from pipeline.engine.sglang import cpu_platform
from pipeline.errors import ConfigError

_OURS: Final = {
    "model_path": "give the model with --model-path",
    "node_rank": "one worker is one engine process; an engine over several machines is not supported",
    "tokenizer_worker_num": "start more preprocess workers instead",
    "custom_sigquit_handler": "the worker handles its signals",
}
"""Fields that the pipeline decides, and what to do instead."""

_FIXED: Final = {
    "incremental_streaming_output": True,  # disjoint pieces: what frames are made of
}


def resolve(model_path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments for `sglang.Engine`: what the user gave, checked, and defaults where there is no GPU.

    A value may be a string, as on a command line; it is then read as SGLang's own command line would.
    Raises ConfigError naming the field. Imports SGLang.
    """
    from sglang.srt.server_args import ServerArgs

    fields = tuple(inspect.signature(ServerArgs).parameters)
    actions = _actions(ServerArgs)
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        name = _field(key, fields, actions)
        arguments[name] = _value(name, value, actions.get(name))
    defaults = {} if cpu_platform.accelerator_present() else _on_cpu(arguments)
    defaults |= {"reasoning_parser": "auto", "tool_call_parser": "auto"}  # by the model's chat template
    defaults["enable_metrics"] = True  # its series leave by `series`: no file, no port
    if arguments.get("disaggregation_mode", "null") != "null":
        defaults["disaggregation_transfer_backend"] = "nixl"
    return defaults | arguments | _FIXED | {"model_path": model_path}


def _on_cpu(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a machine without a GPU; none where the user chose another device."""
    return dict(cpu_platform.SERVER_ARGS) if given.get("device", "cpu") == "cpu" else {}


def _actions(server_args: Any) -> dict[str, argparse.Action]:
    """SGLang's command-line options by every name they have, written as fields: `--tp` is also "tp"."""
    parser = argparse.ArgumentParser(add_help=False)
    server_args.add_cli_args(parser)
    named = {}
    for action in parser._actions:  # argparse has no public way to list them
        for option in action.option_strings:
            named.setdefault(option.lstrip("-").replace("-", "_"), action)
        named[action.dest] = action
    return named


def _field(key: str, fields: tuple[str, ...], actions: Mapping[str, argparse.Action]) -> str:
    name = key.lstrip("-").replace("-", "_")
    if name not in fields and name in actions:
        name = actions[name].dest
    if name in _OURS:
        raise ConfigError(f"SGLang's {name} is not settable here: {_OURS[name]}", field=f"sglang.{name}")
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"SGLang has no setting {key!r}{meant}", field=f"sglang.{key}")
    return name


def _value(name: str, value: Any, action: argparse.Action | None) -> Any:
    if action is None:
        return value
    try:
        value = _parsed(value, action)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"SGLang's {name} cannot be {value!r}: {error}", field=f"sglang.{name}") from error
    allowed = action.choices
    if allowed is not None and any(one not in allowed for one in (value if isinstance(value, list) else [value])):
        raise ConfigError(
            f"SGLang's {name} cannot be {value!r}; it is one of {', '.join(map(str, allowed))}",
            field=f"sglang.{name}",
        )
    return value


def _parsed(value: Any, action: argparse.Action) -> Any:
    """A value in the type that SGLang's command line gives it. Raises what the option's own type raises."""
    is_switch = action.nargs == 0 or isinstance(action.const, bool)
    if isinstance(value, dict) and action.type in (None, str):
        return json.dumps(value)  # a table in a topology file, JSON on SGLang's command line
    if not isinstance(value, str):
        return value
    if is_switch:
        words = {"true": True, "1": True, "false": False, "0": False}
        if value.lower() not in words:
            raise ValueError("it is true or false")
        return words[value.lower()]
    convert = action.type or str
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        return [convert(word) for word in value.split()]
    return convert(value)
