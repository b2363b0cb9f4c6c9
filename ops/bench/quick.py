"""A guard against slow commits: what a step costs, in units of plain loops over the same bytes on the same machine.

Two yardsticks are timed between the steps: reading as many bytes as the model's weights have (what decoding one stream
is bound by), and a float32 matrix product (what prefill and many streams are bound by). A machine that is twice as fast
halves both sides, so the ratios can be compared with those that are kept in `results/quick.json`.

Examples:
    make bench-quick
    .venv/bin/python ops/bench/quick.py --keep
"""

import argparse
import asyncio
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from contextlib import aclosing

import numpy as np

from server.config import EngineConfig
from server.engine.engine import Engine
from server.messages import GenerateRequest, SamplingParams
from server.model.loader import load_model
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model

KEPT = pathlib.Path(__file__).parent / "results" / "quick.json"
ROUNDS = 5
PROMPT_TOKENS = 192
NEW_TOKENS = 48
PREFILL_TOKENS = 512
STREAMS = (1, 8, 32)
SLOWER = 1.25
"""Times the kept ratio: worth a look. Rounds differ by a tenth on a quiet machine."""


def main() -> None:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="make this run the one to compare with")
    options = parser.parse_args()
    ratios = asyncio.run(measure(load_model(find_bundled_model())))
    kept: dict[str, float] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    print("what a step costs, in plain loops timed beside it; now/kept: below 1.00x = faster than when that was kept")
    print(f"{'step / yardstick':24}{'now':>8}{'kept':>8}{'now/kept':>10}")
    for name, ratio in ratios.items():
        before = kept.get(name)
        verdict = "" if before is None else f"{ratio / before:>9.2f}x" + ("  slower" if ratio > SLOWER * before else "")
        print(f"{name:24}{ratio:>8.2f}{before or float('nan'):>8.2f}{verdict}")
    if options.keep:
        KEPT.write_text(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}, indent=2) + "\n")


async def measure(model: Model) -> dict[str, float]:
    """Take the medians of interleaved rounds of steps and yardsticks."""
    read_s, multiply_s = yardsticks(model)
    samples: dict[str, list[float]] = {}
    words = random.Random(0)  # noqa: S311 not a secret

    # Guesses would be lucky here: greedy answers to random prompts go round in circles.
    async with Engine(model, EngineConfig(speculation=False)) as engine:

        async def together(count: int, prompt_tokens: int, new_tokens: int) -> float:
            prompts = [tuple(words.randrange(100, 40_000) for _ in range(prompt_tokens)) for _ in range(count)]
            begun = time.perf_counter()
            await asyncio.gather(*(drain(engine, prompt, new_tokens) for prompt in prompts))
            return time.perf_counter() - begun

        await together(1, PREFILL_TOKENS, 8)  # warm-up
        for _ in range(ROUNDS):
            reading, multiplying = read_s(), multiply_s()
            for count in STREAMS:
                first = await together(count, PROMPT_TOKENS, 1)
                whole = await together(count, PROMPT_TOKENS, NEW_TOKENS + 1)
                yardstick = reading if count == 1 else multiplying
                samples.setdefault(f"decode, {count:2} streams", []).append((whole - first) / NEW_TOKENS / yardstick)
            prefill = await together(1, PREFILL_TOKENS, 1)
            samples.setdefault(f"prefill of {PREFILL_TOKENS}", []).append(prefill / multiplying)
    return {name: statistics.median(taken) for name, taken in samples.items()}


async def drain(engine: Engine, prompt: tuple[int, ...], new_tokens: int) -> None:
    """Generate greedily and throw the tokens away."""
    request = GenerateRequest("bench", prompt, SamplingParams(seed=0, max_tokens=new_tokens, temperature=0.0))
    async with aclosing(engine.generate(request)) as events:
        async for _ in events:
            pass


def yardsticks(model: Model) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two functions that time a loop over the weights' bytes, and a matrix product, in seconds."""
    layers = [layer for network_layer in model.layers for layer in (network_layer.mixer, network_layer.ffn)]
    packed = {
        id(each): each.num_bytes for layer in layers for each in vars(layer).values() if hasattr(each, "num_bytes")
    }
    weights = np.ones((sum(packed.values()) + model.network.head.num_bytes) // 8, dtype=np.uint64)
    rows, columns = np.ones((512, 1024), dtype=np.float32), np.ones((1024, 1024), dtype=np.float32)

    def timed(loop: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            loop()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)

    return lambda: timed(weights.sum), lambda: timed(lambda: rows @ columns)


if __name__ == "__main__":
    main()
