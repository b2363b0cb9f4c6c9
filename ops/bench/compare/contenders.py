"""How contenders are reached. All but llama.cpp answer one question: how long for these prompts?"""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import grpc.aio

from ops.bench import served
from ops.bench.compare import machine
from ops.bench.compare.prompts import Measure, Prompts, draw
from pathfox.v1 import generation_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]


class Contender(Protocol):
    """One way to run the model. Entered once before the rounds and left after them."""

    name: str
    versions: dict[str, str]
    """Known once it was entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def rate(self, measure: Measure, seed: int) -> float:
        """Return tokens per second of one measure, taken once, on prompts that were never seen."""
        ...

    def cpu_s(self) -> float:
        """Return the CPU time that its processes used so far, this one included where it takes part."""
        ...


class Timed:
    """The rates of whoever can say how long a batch took."""

    def seconds(self, prompts: Prompts, new_tokens: int) -> float:
        """Add so many tokens to each of the prompts, all at once."""
        raise NotImplementedError

    def rate(self, measure: Measure, seed: int) -> float:
        """Return the rate of prefill, or of decode as the difference of a long and a short generation."""
        first_s = self.seconds(draw(measure, seed, part=0), 1)
        if not measure.new_tokens:
            return measure.streams * measure.prompt_tokens / first_s
        whole_s = self.seconds(draw(measure, seed, part=1), 1 + measure.new_tokens)
        return measure.streams * measure.new_tokens / (whole_s - first_s)


class Pathfox(Timed):
    """Ours through everything: a server in a child process, its client in this one.

    Args:
        options: of `pathfox serve`.
    """

    name = "pathfox"

    def __init__(self, *options: str) -> None:
        self._options = options
        self._open = contextlib.ExitStack()
        self.versions = {"grpcio": grpc.__version__, "pathfox": commit()}

    def __enter__(self) -> Self:
        self._process_id, address = self._open.enter_context(served.serving(*self._options))
        self._runner = self._open.enter_context(asyncio.Runner())
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._runner.run(self._connect(address)))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def seconds(self, prompts: Prompts, new_tokens: int) -> float:
        """Read one stream for each prompt."""
        return self._runner.run(self._together(prompts, new_tokens))

    async def _connect(self, address: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(address)
        self._open.callback(lambda: self._runner.run(channel.close(None)))
        return channel

    async def _together(self, prompts: Prompts, new_tokens: int) -> float:
        begun = time.perf_counter()
        requests = [served.greedy(prompt, new_tokens) for prompt in prompts]
        counts = await asyncio.gather(*(served.read(self._stub, request) for request in requests))
        seconds = time.perf_counter() - begun
        check_counts(self.name, counts, new_tokens)
        return seconds

    def cpu_s(self) -> float:
        """Return the server's CPU time and the client's."""
        return machine.cpu_s([os.getpid(), self._process_id])


class Child(Timed):
    """A runner script in a process of its own, questioned by lines."""

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self._command = [str(each) for each in command]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603 our own words
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        self.versions = self._hear()["versions"]
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def seconds(self, prompts: Prompts, new_tokens: int) -> float:
        """Ask the script."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._hear()
        check_counts(self.name, answer["counts"], new_tokens)
        return float(answer["seconds"])

    def cpu_s(self) -> float:
        """Return the child's CPU time, and ours, which is next to nothing."""
        return machine.cpu_s([os.getpid(), self._process.pid])

    def _hear(self) -> dict[str, Any]:
        """Read the next line of JSON; libraries print other lines in between."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                heard: dict[str, Any] = json.loads(line)
                return heard
        raise SystemExit(f"{self.name}: its runner ended; run it by hand to see why:\n  {' '.join(self._command)}")


def check_counts(name: str, counts: Sequence[int], new_tokens: int) -> None:
    """Stop when somebody generated less than was asked: its time would mean nothing."""
    if set(counts) != {new_tokens}:
        raise SystemExit(f"{name}: streams brought {sorted(set(counts))} tokens instead of {new_tokens}")


def commit() -> str:
    """Name the commit that is measured."""
    words = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)  # noqa: S603 our own words
    return said.stdout.strip() or "not from a checkout"
