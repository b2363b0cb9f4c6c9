"""What speculation gives on texts that repeat, and what it costs on texts that do not: two engines, one with it.

Both serve the bundled model in this process, take turns text by text, and must give the same tokens. Prompts are in the
prefix cache, so that time is decoding. Medians of the rounds' ratios.

    .venv/bin/python -m ops.bench.speculation [--rounds 5] [--streams 1 8 32] [--output results/speculation.json]
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import NamedTuple

from ops.bench.compare import machine
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.report import StepReport
from server.messages import GenerateRequest, SamplingParams, TokenDelta
from server.model.loader import load_model, read_text_assets
from server.model.loader.bundled import find_bundled_model
from server.text.template import ChatMessage, ChatTemplate
from server.text.tokenizer import Tokenizer

NUM_ALONE = 3
"""Texts that one stream takes after another."""
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lea")
PLACES = ("harbour", "desert", "library", "lighthouse", "forest", "market", "station", "island")
FIELDS = ("width", "height", "weight", "price", "colour", "owner", "state", "number")


class Task(NamedTuple):
    """What is asked, and how the answer begins: so small a model needs to be shown what is meant."""

    question: str
    beginning: str


def edit(dice: random.Random) -> Task:
    """Ask for a piece of code with one name changed."""
    fields = dice.sample(FIELDS, 5)
    code = "    def __init__(self, " + ", ".join(fields) + "):\n"
    code += "".join(f"        self.{field} = {field}\n" for field in fields)
    code += "".join(f"\n    def get_{field}(self):\n        return self.{field}\n" for field in fields)
    name = dice.choice(NAMES)
    question = f"Repeat this code, but rename the class Item to {name}:\n\n```python\nclass Item:\n{code}```"
    return Task(question, f"```python\nclass {name}:\n    def __init__(self, {fields[0]},")


def extract(dice: random.Random) -> Task:
    """Ask for the rows of a table as JSON."""
    rows = [
        {"name": name, "age": dice.randrange(20, 70), "place": dice.choice(PLACES)} for name in dice.sample(NAMES, 9)
    ]
    table = "\n".join(f"| {row['name']} | {row['age']} | {row['place']} |" for row in rows)
    question = f"Write every row of this table as JSON, one a line.\n\n| name | age | place |\n{table}"
    return Task(question, "".join(json.dumps(row) + "\n" for row in rows[:2]))


def story(dice: random.Random) -> Task:
    """Ask for something new."""
    name, thing, place = dice.choice(NAMES), dice.choice(FIELDS), dice.choice(PLACES)
    return Task(f"Write a story about {name}, who finds a {thing} in the {place}.", "")


@dataclass(frozen=True)
class Kind:
    """A kind of text."""

    make: Callable[[random.Random], Task]
    temperature: float


KINDS = {"code edit": Kind(edit, 0.0), "extraction": Kind(extract, 0.0), "story": Kind(story, 0.8)}


@dataclass
class Drafts:
    """Counts of an engine's steps."""

    num_drafted: int = 0
    num_accepted: int = 0

    def observe(self, report: StepReport) -> None:
        """Count a step."""
        self.num_drafted += report.num_drafted_tokens
        self.num_accepted += report.num_accepted_tokens


@dataclass
class Measured:
    """One kind of text at one number of streams."""

    ratios: list[float]
    tokens_per_s_off: list[float]
    tokens_per_s_on: list[float]
    num_tokens: int
    drafts: Drafts

    def summary(self) -> dict[str, float]:
        """Return medians."""
        drafted, accepted = self.drafts.num_drafted, self.drafts.num_accepted
        return {
            "speedup": round(statistics.median(self.ratios), 3),
            "min": round(min(self.ratios), 3),
            "max": round(max(self.ratios), 3),
            "tokens_per_s_off": round(statistics.median(self.tokens_per_s_off), 1),
            "tokens_per_s_on": round(statistics.median(self.tokens_per_s_on), 1),
            "tokens_a_round": self.num_tokens,
            "drafted_a_round": round(drafted / len(self.ratios), 1),
            "acceptance": round(accepted / drafted, 3) if drafted else 0.0,
        }


class Prompts:
    """Makes requests of a kind: the same ones for both engines, and in every round."""

    def __init__(self, max_tokens: int) -> None:
        assets = read_text_assets(find_bundled_model())
        assert assets.gguf_metadata is not None
        assert assets.chat_template is not None
        self.tokenizer = Tokenizer.from_gguf_metadata(assets.gguf_metadata)
        self._template = ChatTemplate(assets.chat_template, special_tokens=assets.special_tokens)
        self._max_tokens = max_tokens

    def make(self, kind: Kind, count: int, eos_token_ids: tuple[int, ...]) -> list[GenerateRequest]:
        """Make requests, seeded."""
        requests = []
        for number in range(count):
            task = kind.make(random.Random(number))  # noqa: S311 not a secret
            text = self._template.render([ChatMessage("user", task.question)]) + task.beginning
            sampling = SamplingParams(
                seed=number,
                max_tokens=self._max_tokens,
                temperature=kind.temperature,
                top_p=0.95,
                eos_token_ids=eos_token_ids,
            )
            token_ids = tuple(self.tokenizer.encode(text, allow_special=True))
            requests.append(GenerateRequest(str(number), token_ids, sampling))
        return requests


async def answer(engine: Engine, request: GenerateRequest) -> list[int]:
    """Return the tokens of a request."""
    token_ids: list[int] = []
    async with aclosing(engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, TokenDelta):
                token_ids += event.token_ids
    return token_ids


async def timed(engine: Engine, requests: list[GenerateRequest], streams: int) -> tuple[float, list[list[int]]]:
    """Answer requests, so many at once; return seconds and tokens."""
    begun = time.perf_counter()
    answers: list[list[int]] = []
    for first in range(0, len(requests), streams):
        answers += await asyncio.gather(*(answer(engine, each) for each in requests[first : first + streams]))
    return time.perf_counter() - begun, answers


async def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run all kinds at all numbers of streams, round by round."""
    model = load_model(find_bundled_model())
    prompts = Prompts(options.tokens)
    measured: dict[str, Measured] = {}
    drafts = Drafts()
    async with AsyncExitStack() as stack:
        off, on = [
            await stack.enter_async_context(
                Engine(model, EngineConfig(speculation=is_on), fingerprint="bench", observer=drafts.observe)
            )
            for is_on in (False, True)
        ]
        for number in range(options.rounds + 1):  # the first fills the caches
            for name, kind in KINDS.items():
                for streams in options.streams:
                    requests = prompts.make(kind, max(streams, NUM_ALONE), tuple(model.eos_token_ids))
                    drafts.num_drafted = drafts.num_accepted = 0
                    (off_s, plain), (on_s, drafted) = await in_turn(
                        off, on, requests, streams, is_swapped=number % 2 > 0
                    )
                    if plain != drafted:
                        raise SystemExit(f"{name}, {streams} streams: the tokens differ")
                    if options.show and not number and streams == 1:
                        print("\n---\n".join(prompts.tokenizer.decode(each) for each in plain))
                    if number:
                        tokens = sum(map(len, plain))
                        place = measured.setdefault(f"{name}, {streams}", Measured([], [], [], tokens, Drafts()))
                        place.ratios.append(off_s / on_s)
                        place.tokens_per_s_off.append(tokens / off_s)
                        place.tokens_per_s_on.append(tokens / on_s)
                        place.drafts.num_drafted += drafts.num_drafted
                        place.drafts.num_accepted += drafts.num_accepted
    return {name: each.summary() for name, each in measured.items()}


async def in_turn(
    off: Engine, on: Engine, requests: list[GenerateRequest], streams: int, *, is_swapped: bool
) -> tuple[tuple[float, list[list[int]]], tuple[float, list[list[int]]]]:
    """Time both engines, the one or the other first; return the one without speculation first."""
    if is_swapped:
        second = await timed(on, requests, streams)
        return await timed(off, requests, streams), second
    first = await timed(off, requests, streams)
    return first, await timed(on, requests, streams)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--show", action="store_true", help="print the texts")
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    results = asyncio.run(measure(options))
    print(f"{'text, streams':18}{'on / off':>10}{'[min-max]':>16}{'tok/s off':>11}{'on':>7}{'drafted':>9}{'right':>7}")
    for name, each in results.items():
        span = f"[{each['min']:.2f}-{each['max']:.2f}]"
        rates = f"{each['tokens_per_s_off']:>11.0f}{each['tokens_per_s_on']:>7.0f}"
        drafted = f"{each['drafted_a_round']:>9.0f}{100 * each['acceptance']:>6.0f}%"
        print(f"{name:18}{each['speedup']:>9.2f}x{span:>16}{rates}{drafted}")
    if options.output:
        facts = {
            "machine": f"{machine.describe()['processor']}, {len(os.sched_getaffinity(0))} processors",
            "command": f"python -m ops.bench.speculation --rounds {options.rounds} --tokens {options.tokens}",
            "model": find_bundled_model().name,
            "results": results,
        }
        options.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
