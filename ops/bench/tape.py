"""What Python costs a decode step: the model as it is written, and replayed from a tape, interleaved in one process.

    .venv/bin/python -m ops.bench.tape [--rows 1 8 32] [--steps 40]

A step is the engine's whole one (plan, rows, model, sampler, commit), without its thread and readers. What it would
take without any Python is the time inside of two C++ calls: the replay of the tape, and the choice of tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kernels.cpu import library
from server.engine.core import Core, CoreSizes
from server.messages import GenerateRequest, SamplingParams
from server.model.loader import load_model
from server.model.loader.bundled import find_bundled_model
from server.model.model import Model

PROMPT_TOKENS = 192
WARM_UP = 6
"""Steps until the prompts are in and the tape is trusted."""
COMPUTING = ("pathfox_replay", "pathfox_sample")


def start(model: Model, num_rows: int, num_steps: int, *, is_taped: bool) -> Core:
    """Return a core whose streams all decode."""
    core = Core(model, CoreSizes(num_rows, 8192, 1024), fingerprint="bench", clock=time.monotonic)
    if not is_taped:
        core.runner.repeats.stop("to compare")
    dice = np.random.default_rng(0)
    for number in range(num_rows):
        prompt = dice.integers(100, 40_000, PROMPT_TOKENS, dtype=np.int32)
        sampling = SamplingParams(seed=number, max_tokens=num_steps + 2 * WARM_UP, temperature=0.0)
        core.submit(GenerateRequest(str(number), tuple(prompt.tolist()), sampling), prompt, number)
    for _ in range(WARM_UP):
        core.step()
    assert len(core.scheduler.running) == num_rows
    return core


@contextmanager
def counted(names: tuple[str, ...]) -> Iterator[list[float]]:
    """Sum the seconds that C++ functions take, in a list of one number."""
    loaded: Any = library.load()
    before = {name: getattr(loaded, name) for name in names}
    total_s = [0.0]

    def wrap(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            begun = time.perf_counter()
            result = function(*args)
            total_s[0] += time.perf_counter() - begun
            return result

        return call

    for name, function in before.items():
        setattr(loaded, name, wrap(function))
    try:
        yield total_s
    finally:
        for name, function in before.items():
            setattr(loaded, name, function)


def measure(model: Model, num_rows: int, num_steps: int) -> dict[str, float]:
    """Step both in turns; return milliseconds a step and percents of it that are not computing."""
    plain = start(model, num_rows, num_steps, is_taped=False)
    taped = start(model, num_rows, num_steps, is_taped=True)
    times_s: dict[str, list[float]] = {"plain": [], "taped": [], "computing": []}
    with counted(COMPUTING) as computing_s:
        for _ in range(num_steps):
            for name, core in (("plain", plain), ("taped", taped)):
                computing_s[0] = 0.0
                begun = time.perf_counter()
                core.step()
                times_s[name].append(time.perf_counter() - begun)
                core.emissions = []
            times_s["computing"].append(computing_s[0])
    medians_ms = {name: 1e3 * statistics.median(each) for name, each in times_s.items()}
    shares = {
        f"{name}_overhead_percent": 100 * (1 - medians_ms["computing"] / medians_ms[name])
        for name in ("plain", "taped")
    }
    return {f"{name}_ms": round(each, 3) for name, each in medians_ms.items()} | {
        name: round(each, 1) for name, each in shares.items()
    }


def main() -> None:
    """Measure and print a line of JSON for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    model = load_model(find_bundled_model())
    for num_rows in options.rows:
        print(json.dumps({"rows": num_rows, **measure(model, num_rows, options.steps)}))


if __name__ == "__main__":
    main()
