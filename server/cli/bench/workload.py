"""What is in the requests: how long prompts and answers are, and which tokens a prompt is made of."""

import math
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.cli.bench.target import Ask
from server.errors import ConfigError

LENGTHS_HELP = "N, uniform:LOW:HIGH or normal:MEAN:DEVIATION[:LOW:HIGH] (clipped)"
NORMAL_REACH = 3.0

Draw = Callable[[random.Random, int], list[int]]
"""Draws so many tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts, never outside `low` .. `high`."""

    low: int
    high: int
    normal: tuple[float, float] | None = None
    """(mean, standard deviation); None = uniform."""

    @classmethod
    def parse(cls, option: str, text: str) -> "Lengths":
        """Read a distribution from the command line.

        Raises:
            ConfigError: names the option and what it takes.
        """
        kind, _, rest = text.partition(":")
        try:
            match kind, [float(each) for each in (rest.split(":") if rest else [])]:
                case "uniform", [low, high]:
                    lengths = cls(int(low), int(high))
                case "normal", [mean, deviation, *bounds] if (
                    len(bounds) in {0, 2} and math.isfinite(mean) and 0 <= deviation < math.inf
                ):
                    low, high = bounds or (max(1, mean - NORMAL_REACH * deviation), mean + NORMAL_REACH * deviation)
                    lengths = cls(int(low), int(high), (mean, deviation))
                case _, []:
                    lengths = cls(int(kind), int(kind))
                case _:
                    raise ValueError(text)
        except (ValueError, OverflowError):
            raise ConfigError(f"{option}: got {text!r}, want {LENGTHS_HELP}") from None
        if not 1 <= lengths.low <= lengths.high:
            raise ConfigError(f"{option}: got {text!r}, want at least 1 token, and LOW <= HIGH")
        return lengths

    def draw(self, source: random.Random) -> int:
        """Draw one length."""
        if self.normal is None:
            return source.randint(self.low, self.high)
        return min(max(round(source.gauss(*self.normal)), self.low), self.high)


@dataclass(frozen=True, slots=True)
class Workload:
    """What all requests of a run have in common."""

    input_tokens: Lengths
    output_tokens: Lengths
    shared_prefix_tokens: int = 0
    """Tokens that all prompts begin with, before those of `input_tokens`."""
    temperature: float = 0.0
    ignore_eos: bool = True
    """Answers are as long as they were drawn."""

    def check(self, context_length_tokens: int) -> None:
        """Find out before the first request whether the longest one fits the model.

        Raises:
            ConfigError: names the lengths and the limit.
        """
        longest = self.shared_prefix_tokens + self.input_tokens.high + self.output_tokens.high
        if longest > context_length_tokens:
            raise ConfigError(
                f"--shared-prefix + --input-tokens + --output-tokens: got up to {longest} tokens, "
                f"want at most the model's {context_length_tokens}"
            )

    def asks(self, draw: Draw, *, seed: int | str) -> Iterator[Ask]:
        """Yield requests without an end, made as they are taken. Same seed, same requests."""
        source = random.Random(seed)  # noqa: S311 not a secret
        prefix = draw(source, self.shared_prefix_tokens)
        while True:
            prompt = prefix + draw(source, self.input_tokens.draw(source))
            yield Ask(
                prompt=array("i", prompt),
                max_tokens=self.output_tokens.draw(source),
                temperature=self.temperature,
                seed=source.getrandbits(63),
                ignore_eos=self.ignore_eos,
            )


def random_tokens(vocabulary_size: int) -> Draw:
    """Draw tokens that no cache knows; not from the ends of the vocabulary, where control tokens stand."""
    vocabulary = range(vocabulary_size // 10, vocabulary_size * 9 // 10 or 1)
    return lambda source, count: source.choices(vocabulary, k=count)


def pieces_of(text: Sequence[int]) -> Draw:
    """Draw pieces of a text's tokens, begun anywhere and read round its end."""

    def draw(source: random.Random, count: int) -> list[int]:
        begin = source.randrange(len(text))
        return [text[(begin + place) % len(text)] for place in range(count)]

    return draw
