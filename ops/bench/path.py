"""What the way through gRPC costs: decode tokens/s of a whole server next to its own engine loop without one.

Both run the same work in turn: B prompts of 192 random tokens, 64 and more new ones, greedy. What is timed is the time
in which all B decode: from the last one's first token to the first one's end. The engine loop is `Core.step` in this
process; the server and its client are two others, idle meanwhile. Nobody guesses tokens. The median of the rounds'
ratios is printed.

Example:
    .venv/bin/python ops/bench/path.py --rounds 5
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

import grpc
import numpy as np

from ops.bench.compare.prompts import NEW_TOKENS, PROMPT_TOKENS, Measure, draw
from ops.bench.compare.run_engine import load_core
from ops.bench.served import NO_SPECULATION, greedy, serving
from pathfox.v1 import generation_pb2_grpc
from server.engine.core import Core
from server.engine.events import EmittedToken
from server.messages import GenerateRequest, SamplingParams
from server.model.loader.bundled import find_bundled_model


class Window:
    """The time in which all streams decode, and the tokens in it."""

    def __init__(self, streams: int) -> None:
        self._counts = [0] * streams
        self._waiting = streams
        self._before = self._total = 0
        self._begun_s = self._ended_s = 0.0

    def note(self, stream: int, tokens: int, now_s: float) -> None:
        """Count what has come of a stream so far."""
        if self._ended_s:
            return
        self._total += tokens - self._counts[stream]
        if not self._counts[stream]:
            self._waiting -= 1
            if not self._waiting:
                self._begun_s, self._before = now_s, self._total
        self._counts[stream] = tokens

    def close(self, now_s: float) -> None:
        """Note that a stream has ended; the first one counts."""
        self._ended_s = self._ended_s or now_s

    @property
    def tokens_per_s(self) -> float:
        """Return the rate."""
        return (self._total - self._before) / (self._ended_s - self._begun_s)


def prompts(streams: int, seed: int) -> list[list[int]]:
    """Make prompts that no cache knows."""
    return draw(Measure(f"{streams} streams", streams, PROMPT_TOKENS, NEW_TOKENS), seed, part=0)


def step_core(core: Core, streams: int, seed: int, new_tokens: int) -> float:
    """Run the engine loop alone; return tokens/s."""
    window = Window(streams)
    counts = [0] * streams
    for serial, prompt in enumerate(prompts(streams, seed)):
        sampling = SamplingParams(seed=0, max_tokens=new_tokens, temperature=0.0)
        core.submit(GenerateRequest(str(serial), tuple(prompt), sampling), np.array(prompt, dtype=np.int32), serial)
    while core.scheduler.has_work:
        core.step()
        emissions, core.emissions, core.closed = core.emissions, [], []
        now_s = time.perf_counter()
        for serial, emission in emissions:
            if isinstance(emission, EmittedToken):
                counts[serial] += 1
                window.note(serial, counts[serial], now_s)
                if counts[serial] == new_tokens:
                    window.close(now_s)
    return window.tokens_per_s


async def read_streams(address: str, streams: int, seed: int, new_tokens: int) -> tuple[float, float, float]:
    """Read the same through gRPC; return tokens/s, this client's CPU us per token, and tokens per frame."""
    window = Window(streams)
    frames = 0

    async def read(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", stream: int, prompt: list[int]) -> None:
        nonlocal frames
        async for frame in stub.Generate(greedy(prompt, new_tokens)):
            if frame.HasField("delta"):
                frames += 1
                window.note(stream, frame.sequence, time.perf_counter())
                if frame.sequence == new_tokens:
                    window.close(time.perf_counter())

    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.gather(*(read(stub, stream, prompt) for stream, prompt in enumerate(prompts(streams, seed))))
        after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tokens = streams * new_tokens
    return window.tokens_per_s, 1e6 * cpu_s / tokens, tokens / frames


def be_client(pipe: Connection) -> None:
    """Carry out what comes through the pipe."""
    while (order := pipe.recv()) is not None:
        pipe.send(asyncio.run(read_streams(*order)))


def main() -> None:
    """Run the rounds and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    options = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    client = multiprocessing.get_context("spawn").Process(target=be_client, args=(there,), daemon=True)
    client.start()
    core = load_core(find_bundled_model())
    rows: dict[int, list[tuple[float, float, float, float]]] = {streams: [] for streams in options.streams}
    with serving("--threads", str(options.threads), NO_SPECULATION) as (_, address):
        for seed in range(options.rounds + 1):
            for streams, taken in rows.items():
                alone = step_core(core, streams, seed, options.new_tokens)
                here.send((address, streams, seed, options.new_tokens))
                taken.append((alone, *here.recv()))
    here.send(None)
    report({streams: taken[1:] for streams, taken in rows.items()})  # the first round warms up


def report(rows: dict[int, list[tuple[float, float, float, float]]]) -> None:
    """Print medians."""
    print(f"{'':12}{'engine loop':>14}{'through gRPC':>14}{'ratio':>8}   (rounds)   client us/token, tokens/frame")
    result = {}
    for streams, taken in rows.items():
        alone, through, client_us, per_frame = (statistics.median(column) for column in zip(*taken, strict=True))
        ratios = [each[1] / each[0] for each in taken]
        ratio = statistics.median(ratios)
        print(
            f"{f'{streams} streams':12}{alone:>14.0f}{through:>14.0f}{ratio:>8.3f}   "
            f"({' '.join(f'{each:.2f}' for each in ratios)})   {client_us:.0f}, {per_frame:.2f}"
        )
        result[streams] = {"engine": alone, "grpc": through, "ratio": ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
