"""Prompts that mean nothing, of a wanted length, as words or as token ids; the same for the same seed. Pure."""

import math
import random
from collections.abc import Sequence
from typing import Final

from pipeline.bench.result import Settings, Unit

TOKEN_MIN: Final = 1_000
TOKEN_MAX: Final = 29_999
"""Ids that are plain tokens in every vocabulary in use: special ones stand at its ends."""
_WORDS: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body back "
    "parent face level office door health person art war history party result change morning reason research girl "
    "guy moment air teacher force education"
)
WORDS: Final = tuple(_WORDS.split())
"""Mostly one token each in the tokenizers of today; how many, the server's usage says."""
SHAREGPT_INPUT: Final = (math.log(161) - 1.2**2 / 2, 1.2)
"""Of a log-normal distribution, whose mean is that of the turns in ShareGPT (Kwon et al. 2023, section 6.1): 161 ..."""
SHAREGPT_OUTPUT: Final = (math.log(338) - 0.9**2 / 2, 0.9)
"""... and 338 tokens. The shapes are ours: many short ones, a long tail."""

Prompt = str | tuple[int, ...]
Units = Sequence[int]
"""Words by their place in WORDS, or token ids."""


def draw(seed: str, count: int, unit: Unit) -> list[int]:
    """As many words or tokens; the same for the same seed."""
    drawn = random.Random(seed)
    if unit == "tokens":
        return drawn.choices(range(TOKEN_MIN, TOKEN_MAX + 1), k=count)
    return drawn.choices(range(len(WORDS)), k=count)


def prompt_of(units: Units, unit: Unit) -> Prompt:
    return tuple(units) if unit == "tokens" else " ".join(WORDS[number] for number in units)


class Synthetic:
    """Prompts whose first part is one of a few prefixes, and whose rest is each one's own."""

    def __init__(self, settings: Settings, name: str) -> None:
        """`name`: of the series; another one shares no prefix with it."""
        self._settings, self._seed = settings, f"{settings.seed}/{name}"
        longest = round(settings.shared_prefix * settings.input_max)
        self._prefixes = [
            draw(f"{self._seed}/prefix/{number}", longest, settings.unit) for number in range(settings.prefixes)
        ]

    def lengths(self, index: int) -> tuple[int, int]:
        """Of a request's prompt, in units, and of its answer, in tokens."""
        drawn = random.Random(f"{self._seed}/lengths/{index}")
        settings = self._settings
        if settings.lengths == "sharegpt":
            asked, answered = (round(drawn.lognormvariate(*shape)) for shape in (SHAREGPT_INPUT, SHAREGPT_OUTPUT))
            return (
                min(max(asked, settings.input_min), settings.input_max),
                min(max(answered, settings.output_min), settings.output_max),
            )
        return (
            drawn.randint(settings.input_min, settings.input_max),
            drawn.randint(settings.output_min, settings.output_max),
        )

    def prompt(self, index: int, length: int) -> Prompt:
        """The request's prompt, of `length` units."""
        unit = self._settings.unit
        chosen = random.Random(f"{self._seed}/which/{index}").randrange(len(self._prefixes))
        shared = self._prefixes[chosen][: round(self._settings.shared_prefix * length)]
        return prompt_of([*shared, *draw(f"{self._seed}/own/{index}", length - len(shared), unit)], unit)
