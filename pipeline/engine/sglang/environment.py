"""Settings that the worker leaves in the environment for every process that SGLang starts."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from pipeline.errors import EngineStartError
from subjects.names import is_token

T = TypeVar("T", bound=msgspec.Struct)


def read(environ: Mapping[str, str], variable: str, kind: type[T], tokens: tuple[str, ...]) -> T | None:
    """The settings in a variable as JSON, or None without it; fields named in `tokens` must be subject tokens.

    Raises EngineStartError.
    """
    text = environ.get(variable)
    if text is None:
        return None
    try:
        settings = msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise EngineStartError(f"{variable} does not hold {kind.__name__}: {error}", field=variable) from error
    given = msgspec.structs.asdict(settings)
    for name in tokens:
        if not is_token(given[name]):
            raise EngineStartError(f"{variable}: {name} must be 1 to 64 characters of [A-Za-z0-9_-]", field=name)
    return settings
