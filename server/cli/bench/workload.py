"""What is in the requests: how long prompts and answers are, and which tokens a prompt is made of."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pathfox.v1 import generation_pb2 as pb
from server.errors import ConfigError

LENGTHS_HELP = "N, uniform:LOW:HIGH or normal:MEAN:DEVIATION[:LOW:HIGH] (clipped)"
NORMAL_REACH = 3.0


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
                case "normal", [mean, deviation, *bounds] if len(bounds) in {0, 2} and deviation >= 0:
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
    model: str | None = None

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

    def requests(self, count: int, *, seed: int, vocabulary: Sequence[int]) -> list[pb.GenerateRequest]:
        """Make the requests; prompts are of random tokens that no cache knows. Same seed, same requests."""
        source = random.Random(seed)  # noqa: S311 not a secret
        prefix = source.choices(vocabulary, k=self.shared_prefix_tokens)
        return [
            self._request(prefix + source.choices(vocabulary, k=self.input_tokens.draw(source)), source)
            for _ in range(count)
        ]

    def requests_from(self, text: Sequence[int], count: int, *, seed: int) -> list[pb.GenerateRequest]:
        """Make the requests; each prompt is a piece of a text's tokens, begun anywhere and read round its end."""
        source = random.Random(seed)  # noqa: S311 not a secret
        prefix = _piece(text, 0, self.shared_prefix_tokens)
        return [
            self._request(prefix + _piece(text, source.randrange(len(text)), self.input_tokens.draw(source)), source)
            for _ in range(count)
        ]

    def _request(self, prompt: Sequence[int], source: random.Random) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(
            temperature=self.temperature,
            max_tokens=self.output_tokens.draw(source),
            ignore_eos=self.ignore_eos,
            seed=source.getrandbits(63),
        )
        return pb.GenerateRequest(model=self.model, token_ids=pb.TokenIds(ids=prompt), sampling_params=sampling)


def _piece(text: Sequence[int], begin: int, length: int) -> list[int]:
    return [text[(begin + place) % len(text)] for place in range(length)]
