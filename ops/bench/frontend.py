"""What the front end costs: frames per second and CPU per token, with a source that says tokens as fast as it is read.

Server and client run in two processes, so that the CPU that is reported is the server's alone.

Example:
    .venv/bin/python ops/bench/frontend.py --streams 32 --tokens 500
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc
from server.config import TelemetryConfig
from server.telemetry import configure_logging
from tests.fixtures.front_ends import rambling, served, serving


def serve(pipe: Connection, rate: float | None) -> None:
    """Serve until told to stop; answer with the CPU seconds used between two messages."""
    configure_logging(TelemetryConfig(log_level="error"))

    async def main() -> None:
        async with serving(served(rambling(tokens_per_s=rate))) as world:
            pipe.send(world.front_end.port)
            while await asyncio.to_thread(pipe.recv) != "stop":
                usage = resource.getrusage(resource.RUSAGE_SELF)
                pipe.send(usage.ru_utime + usage.ru_stime)

    asyncio.run(main())


async def load(port: int, *, streams: int, tokens: int, stop: int) -> tuple[int, int]:
    """Read so many streams at once; return the frames and tokens that came."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        params = pb.SamplingParams(max_tokens=tokens, stop=["never"] * min(stop, 1) + ["x" * n for n in range(1, stop)])
        request = pb.GenerateRequest(text="hi", sampling_params=params)

        async def one() -> tuple[int, int]:
            frames, last = 0, 0
            async for frame in stub.Generate(request):
                frames += 1
                last = frame.sequence
            return frames, last

        counts = await asyncio.gather(*(one() for _ in range(streams)))
    return sum(frames for frames, _ in counts), sum(last for _, last in counts)


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--rate", type=float, default=None, help="tokens/s of each stream; unset = no limit")
    parser.add_argument("--stop", type=int, default=0, help="stop strings of each request")
    arguments = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, arguments.rate))
    server.start()
    port = here.recv()
    asyncio.run(load(port, streams=2, tokens=50, stop=arguments.stop))
    here.send("measure")
    cpu_s = -here.recv()
    began_s = time.perf_counter()
    frames, tokens = asyncio.run(load(port, streams=arguments.streams, tokens=arguments.tokens, stop=arguments.stop))
    duration_s = time.perf_counter() - began_s
    here.send("measure")
    cpu_s += here.recv()
    here.send("stop")
    server.join()
    print(
        json.dumps(
            {
                "streams": arguments.streams,
                "stop_strings": arguments.stop,
                "tokens": tokens,
                "frames": frames,
                "duration_s": round(duration_s, 3),
                "tokens_per_s": round(tokens / duration_s),
                "frames_per_s": round(frames / duration_s),
                "server_cpu_us_per_token": round(cpu_s / tokens * 1e6, 1),
                "server_cpu_us_per_frame": round(cpu_s / frames * 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
