"""What is measured, and the prompts for it: random tokens of SmolLM2's vocabulary, never the same twice."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompts = Sequence[Sequence[int]]

FIRST_TOKEN = 100
LAST_TOKEN = 40_000
"""Inside SmolLM2's 49,152 and without its control tokens."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One column of the table."""

    name: str
    streams: int
    prompt_tokens: int
    new_tokens: int
    """After the first one; 0 = prefill is measured, else decode."""


PROMPT_TOKENS = 192
NEW_TOKENS = 64
MEASURES = (
    *(Measure(f"prefill {length}", 1, length, 0) for length in (512, 2048, 4096)),
    Measure("1 stream", 1, PROMPT_TOKENS, NEW_TOKENS),
    *(Measure(f"{streams} streams", streams, PROMPT_TOKENS, NEW_TOKENS) for streams in (8, 32)),
)

WARM_UP = Measure("warm-up", 8, 256, 4)
"""Before the first round: caches, threads, clocks."""


def draw(measure: Measure, seed: int, *, part: int) -> list[list[int]]:
    """Draw the prompts of one batch; the same for everybody who asks for the same."""
    source = random.Random(f"{measure.name}/{seed}/{part}")  # noqa: S311 not a secret
    return [
        [source.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(measure.prompt_tokens)]
        for _ in range(measure.streams)
    ]
