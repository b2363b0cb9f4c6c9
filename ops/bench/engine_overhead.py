"""What the engine costs beside the model: Python time of a decode step outside of `model.forward` and `kernels.sample`.

    python -m ops.bench.engine_overhead [--sequences 32] [--steps 400]

Prints one line of JSON for the core alone (no thread, no readers) and one for the whole engine with a reader per
sequence.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from server.config import EngineConfig
from server.engine import sampler
from server.engine.core import Core, CoreSizes
from server.engine.engine import Engine
from server.messages import GenerateRequest, SamplingParams, TokenDelta
from server.model.memory import Field, LayerMemory
from server.model.mixers import ClosingPages
from server.model.rows import Rows

VOCABULARY = 256
NUM_PROMPT_TOKENS = 64

P = ParamSpec("P")
R = TypeVar("R")


class NullSpec:
    """Sizes of a small real model, but for the vocabulary."""

    vocabulary_size = VOCABULARY
    context_length_tokens = 8192
    page_size_tokens = 16


class NullModel:
    """Computes nothing."""

    def __init__(self, max_rows: int) -> None:
        self.spec = NullSpec()
        self.device = torch.device("cpu")
        self.page_fields = ((Field("none", (1,), torch.uint8),),)
        self.tail_fields: tuple[tuple[Field, ...], ...] = ((),)
        self._logits = torch.rand((max_rows, VOCABULARY), generator=torch.Generator().manual_seed(0))

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        """Return the same logits as ever."""
        del memory
        return self._logits[: rows.logit_rows.numel()]

    def close(self, memory: Sequence[LayerMemory], pages: ClosingPages) -> None:
        """Do nothing."""


class Stopwatch:
    """Sums the time spent in what it wraps."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function with its time counted."""

        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.elapsed_s += time.perf_counter() - started_s

        return timed


def request(number: int, max_tokens: int, *, is_penalised: bool) -> GenerateRequest:
    """Make a request that decodes for a while."""
    prompt = tuple((number * 31 + position) % VOCABULARY for position in range(NUM_PROMPT_TOKENS))
    penalty = 1.1 if is_penalised else 1.0
    sampling = SamplingParams(seed=number, max_tokens=max_tokens, top_p=0.9, repetition_penalty=penalty)
    return GenerateRequest(str(number), prompt, sampling)


def measure_core(num_sequences: int, num_steps: int, *, is_penalised: bool = False) -> dict[str, float]:
    """Step a core without thread or readers; return milliseconds a step outside of model and sampler."""
    model = NullModel(num_sequences)
    watch = Stopwatch()
    model.forward = watch.wrap(model.forward)  # type: ignore[method-assign]
    real = sampler.__dict__["sample"]
    vars(sampler)["sample"] = watch.wrap(real)
    core = Core(model, CoreSizes(num_sequences, 8192, 65536), fingerprint="null", clock=time.monotonic)
    for number in range(num_sequences):
        each = request(number, num_steps + 100, is_penalised=is_penalised)
        core.submit(each, np.array(each.prompt_token_ids, dtype=np.int32), number)
    overheads_ms = []
    for _ in range(num_steps):
        watch.elapsed_s = 0.0
        started_s = time.perf_counter()
        core.step()
        core.emissions = []
        core.load()
        overheads_ms.append(1e3 * (time.perf_counter() - started_s - watch.elapsed_s))
    vars(sampler)["sample"] = real
    decode_ms = overheads_ms[10:]
    return {
        "median_ms": round(statistics.median(decode_ms), 4),
        "p99_ms": round(statistics.quantiles(decode_ms, n=100)[98], 4),
        "mean_ms": round(statistics.mean(decode_ms), 4),
    }


async def measure_engine(num_sequences: int, num_steps: int) -> dict[str, float]:
    """Run the whole engine with a reader per sequence; return CPU and wall milliseconds a step."""
    model = NullModel(num_sequences)
    num_tokens = 0

    async def read(engine: Engine, number: int) -> None:
        nonlocal num_tokens
        async with aclosing(engine.generate(request(number, num_steps, is_penalised=False))) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    num_tokens += len(event.token_ids)

    config = EngineConfig(max_num_seqs=num_sequences, max_step_tokens=8192, page_pool_bytes=65536)
    num_reports = 0

    def observe(_: object) -> None:
        nonlocal num_reports
        num_reports += 1

    async with Engine(model, config, fingerprint="null", observer=observe) as engine:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(read(engine, number) for number in range(num_sequences)))
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return {
        "wall_ms": round(1e3 * wall_s / num_reports, 4),
        "cpu_ms": round(1e3 * cpu_s / num_reports, 4),
        "tokens_per_s": round(num_tokens / wall_s),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    facts = {"sequences": arguments.sequences, "steps": arguments.steps}
    core = measure_core(arguments.sequences, arguments.steps)
    print(json.dumps({"what": "core", **facts, **core}))
    penalised = measure_core(arguments.sequences, arguments.steps, is_penalised=True)
    print(json.dumps({"what": "core, repetition penalty", **facts, **penalised}))
    engine = asyncio.run(measure_engine(arguments.sequences, arguments.steps))
    print(json.dumps({"what": "engine with readers, null model, sampling included", **facts, **engine}))


if __name__ == "__main__":
    main()
