"""A server of our own in a child process, and streams from it: what the benches through gRPC have in common."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc

STOP_TIMEOUT_S = 60
NO_SPECULATION = "--no-speculation"
"""For rates of decoding: random prompts end in circles, which guesses would foresee."""


@contextlib.contextmanager
def serving(
    *options: str, log: IO[str] | None = None, settings: dict[str, str] | None = None
) -> Iterator[tuple[int, str]]:
    """Serve the default model on a free port for the body.

    Args:
        options: of `pathfox serve`.
        log: where the server's log goes, a line of JSON each; None = warnings only, to stderr.
        settings: by the names of environment variables.

    Yields:
        Process id and address.
    """
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *options]
    level = {"PATHFOX__TELEMETRY__LOG_LEVEL": "warning" if log is None else "info"}
    process = subprocess.Popen(  # noqa: S603 our own words
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **level, **(settings or {})},  # noqa: TID251 handed on to the server
    )
    try:
        assert process.stdout is not None
        address = next((line.split()[-1] for line in process.stdout if line.startswith("serving on ")), None)
        if address is None:
            raise SystemExit("the server ended before it served")
        yield process.pid, address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP_TIMEOUT_S)


def greedy(prompt: Sequence[int], new_tokens: int) -> pb.GenerateRequest:
    """Ask for exactly so many tokens."""
    sampling = pb.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=sampling)


async def read(stub: "generation_pb2_grpc.GenerationServiceAsyncStub", request: pb.GenerateRequest) -> int:
    """Read one stream to its end; return how many tokens it brought."""
    sequence = 0
    async for frame in stub.Generate(request):
        sequence = frame.sequence
    return sequence
