"""Tokens per second through everything (gRPC, scheduler, sampler, detokeniser), next to llama.cpp on the same file.

Prefill is 512 tokens to the first token. Decode is B streams at once: (time for 65 tokens - time for 1 token),
64 tokens each, greedy, prompts of 192 random tokens that no cache knows. Rounds of the two servers are interleaved;
the medians and their ratio are printed.

Examples:
    .venv/bin/python ops/bench/streams.py
    .venv/bin/python ops/bench/streams.py --rounds 5 --llama llama.cpp/build/bin/llama-batched-bench
"""

import argparse
import asyncio
import json
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import time

import grpc

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc
from server.model.loader.bundled import find_bundled_model

PREFILL_TOKENS = 512
PROMPT_TOKENS = 192
NEW_TOKENS = 64
Rates = dict[str, float]


def main() -> None:
    """Run the rounds and print a table and one JSON line."""
    options = read_options()
    rounds: dict[str, list[Rates]] = {"pathfox": []}
    peers = {"llama.cpp Q4_1": options.llama} if options.llama else {}
    rounds |= {name: [] for name in peers}
    process, address = (None, options.address) if options.address else start_server(options.threads)
    try:
        asyncio.run(measure_pathfox(address, options.streams, seed=0))  # warm-up: caches, threads, clocks
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds["pathfox"].append(asyncio.run(measure_pathfox(address, options.streams, seed=number + 1)))
            for name, program in peers.items():
                rounds[name].append(measure_llama(program, options.streams, options.threads))
    finally:
        if process:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
    report(rounds, options)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="a running server; unset starts one")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", type=pathlib.Path, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--output", type=pathlib.Path, help="write the JSON here too")
    return parser.parse_args()


def start_server(threads: int) -> tuple[subprocess.Popen[str], str]:
    """Start `pathfox serve` on a free port and wait until it says that it serves."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--threads", str(threads)]
    quiet = {**os.environ, "PATHFOX__TELEMETRY__LOG_LEVEL": "warning"}  # noqa: TID251 handed on to the server
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet)  # noqa: S603 our own words
    for line in process.stdout or ():
        if line.startswith("serving on "):
            return process, line.split()[-1]
    raise SystemExit("the server ended before it served")


async def measure_pathfox(address: str, streams: list[int], seed: int) -> Rates:
    """Measure one round; prompts differ in every round, so that no page is reused."""
    words = random.Random(seed)  # noqa: S311 not a secret
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def together(count: int, prompt_tokens: int, new_tokens: int) -> float:
            prompts = [[words.randrange(100, 40_000) for _ in range(prompt_tokens)] for _ in range(count)]
            begun = time.perf_counter()
            await asyncio.gather(*(stream(stub, prompt, new_tokens) for prompt in prompts))
            return time.perf_counter() - begun

        rates = {"prefill 512": PREFILL_TOKENS / await together(1, PREFILL_TOKENS, 1)}
        for count in streams:
            first = await together(count, PROMPT_TOKENS, 1)
            whole = await together(count, PROMPT_TOKENS, NEW_TOKENS + 1)
            rates[name_of(count)] = count * NEW_TOKENS / (whole - first)
        return rates


def name_of(count: int) -> str:
    """Name a column."""
    return "1 stream" if count == 1 else f"{count} streams"


async def stream(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", prompt: list[int], new_tokens: int) -> None:
    """Read one stream to its end and check that it brought every token."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling_params=pb.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
    )
    sequence = 0
    async for frame in stub.Generate(request):
        sequence = frame.sequence
    if sequence != new_tokens:
        raise SystemExit(f"a stream brought {sequence} tokens, not {new_tokens}")


def measure_llama(program: pathlib.Path, streams: list[int], threads: int) -> Rates:
    """Measure llama.cpp's own batched benchmark: bare, without a server around it."""

    def run(prompt_tokens: int, new_tokens: int, count: int) -> tuple[float, float]:
        shape = ["-npp", str(prompt_tokens), "-ntg", str(new_tokens), "-npl", str(count)]
        command = [
            str(program),
            "-m",
            str(find_bundled_model()),
            "-t",
            str(threads),
            "-c",
            "8448",
            "-b",
            "2048",
            "-ub",
            "512",
            *shape,
        ]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 our own words
        cells = [line for line in printed.splitlines() if line.startswith("|")][-1].split("|")
        return float(cells[6]), float(cells[8])

    rates = {"prefill 512": run(PREFILL_TOKENS, 1, 1)[0]}
    return rates | {name_of(count): run(PROMPT_TOKENS, NEW_TOKENS, count)[1] for count in streams}


def report(rounds: dict[str, list[Rates]], options: argparse.Namespace) -> None:
    """Print medians, ranges and ratios."""
    names = list(rounds["pathfox"][0])
    medians = {
        who: {name: statistics.median(each[name] for each in taken) for name in names} for who, taken in rounds.items()
    }
    print(f"{'tokens/s, median [min-max]':28}" + "".join(f"{name:>24}" for name in names))
    for who, taken in rounds.items():
        cells = [
            f"{medians[who][name]:.0f} [{min(e[name] for e in taken):.0f}-{max(e[name] for e in taken):.0f}]"
            for name in names
        ]
        print(f"{who:28}" + "".join(f"{cell:>24}" for cell in cells))
    for who in list(rounds)[1:]:
        print(f"{'pathfox / ' + who:28}" + "".join(f"{medians['pathfox'][n] / medians[who][n]:>23.2f}x" for n in names))
    result = {
        "machine": f"{platform.machine()}, {options.threads} threads",
        "rounds": options.rounds,
        "medians": medians,
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result | {"all": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
