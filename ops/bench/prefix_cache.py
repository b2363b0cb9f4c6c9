"""Time to the first token of a long prompt that is wholly in the prefix cache, next to that of a cold one.

Through gRPC, each round a new prompt: first cold, then once more. Goal: at most 0.08 times as long.

Example:
    .venv/bin/python ops/bench/prefix_cache.py --rounds 15
"""

import argparse
import asyncio
import json
import statistics
import time
from typing import NamedTuple

import grpc.aio

from ops.bench import served
from ops.bench.compare.prompts import Measure, draw
from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc

GOAL = 0.08


class FirstToken(NamedTuple):
    """How long it took, and what of the prompt was computed before."""

    seconds: float
    cached_tokens: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with served.serving("--threads", str(options.threads)) as (_, address):
        rounds = asyncio.run(measure(address, options.tokens, options.rounds))
    cold_s, warm_s = (statistics.median(pair[place].seconds for pair in rounds) for place in (0, 1))
    ratio = warm_s / cold_s
    verdict = "pass" if ratio <= GOAL else "MISS"
    print(f"{options.tokens} tokens, {options.rounds} rounds, medians: cold {cold_s * 1e3:.1f} ms, ", end="")
    print(f"cached {warm_s * 1e3:.2f} ms ({rounds[-1][1].cached_tokens} tokens were in pages)")
    print(f"cached / cold {ratio:.4f} (<= {GOAL}) {verdict}")
    print(
        json.dumps({"cold_s": [cold.seconds for cold, _ in rounds], "cached_s": [warm.seconds for _, warm in rounds]})
    )


async def measure(address: str, tokens: int, count: int) -> list[tuple[FirstToken, FirstToken]]:
    """Take the rounds, after one that warms up."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        rounds = []
        for number in range(count + 1):
            (prompt,) = draw(Measure("prefix cache", 1, tokens, 0), number, part=0)
            rounds.append((await first_token(stub, prompt), await first_token(stub, prompt)))
        return rounds[1:]


async def first_token(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", prompt: list[int]) -> FirstToken:
    """Time from the call to the first frame with a token."""
    seconds, usage = 0.0, pb.Usage()
    begun = time.perf_counter()
    async for frame in stub.Generate(served.greedy(prompt, 1)):
        if frame.sequence and not seconds:
            seconds = time.perf_counter() - begun
        if frame.WhichOneof("event") == "finished":
            usage = frame.finished.usage
    return FirstToken(seconds, usage.cached_tokens)


if __name__ == "__main__":
    main()
