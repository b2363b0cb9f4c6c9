"""Overload: what a server still achieves at twice the rate that it can sustain, and how it refuses the rest.

First a closed loop finds the capacity, then an open loop (Poisson) sends at a multiple of it; rounds are interleaved.
Every request asks for its first token within a budget. Goodput counts the output tokens of requests whose budget was
kept, per second, over the same window of both loops. A refusal's time is taken in the client, from send to status, and
from the server's log, from the arrival of the call to its status.

Goals: goodput at least 0.95 of capacity; 99 of 100 refusals within 5 ms; each of them says when to come back.

Examples:
    .venv/bin/python ops/bench/overload.py
    .venv/bin/python ops/bench/overload.py --soak 600
"""

import argparse
import asyncio
import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ops.bench import served
from ops.bench.soak import Flatness, watch
from server.cli.bench.arrivals import due_times_s
from server.cli.bench.connection import connect
from server.cli.bench.drive import Limits, SystemClock, drive
from server.cli.bench.figures import percentile
from server.cli.bench.pathfox import PathfoxTarget
from server.cli.bench.recording import Call, Outcome, Recording
from server.cli.bench.workload import Lengths, Workload, random_tokens

LEAST_GOODPUT, MOST_REFUSAL_MS = 0.95, 5.0
WORKLOAD = Workload(Lengths(96, 288), Lengths(32, 96))
VOCABULARY_SIZE = 49_152
CHANNELS = 4
MAX_REQUESTS = 100_000
SETTLE_S = 10.0
"""At the start of a loop, not counted: queues fill, and a closed loop that began all at once gets out of step."""
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop's record."""

    recording: Recording
    duration_s: float

    @property
    def window_s(self) -> tuple[float, float]:
        """Return from when to when counts."""
        return self.recording.begun_s + SETTLE_S, self.recording.begun_s + self.duration_s

    @property
    def refused(self) -> list[Call]:
        """Return the calls that found no room, whether or not they were told when to come back."""
        return [call for call in self.recording.calls if call.status == REFUSED]

    @property
    def requests_per_s(self) -> float:
        """Return how many ended well."""
        begin_s, end_s = self.window_s
        done = [call for call in self.recording.calls if call.outcome is Outcome.COMPLETED]
        return sum(begin_s <= (call.ended_s or 0) <= end_s for call in done) / (end_s - begin_s)

    def tokens_per_s(self, budget_s: float = math.inf) -> float:
        """Return the goodput: output tokens of requests whose first token came in time."""
        begin_s, end_s = self.window_s
        good = [call for call in self.recording.calls if call.frames and first_token_s(call) <= budget_s]
        return sum(_tokens_between(call, begin_s, end_s) for call in good) / (end_s - begin_s)

    def refusals_ms(self) -> list[float]:
        """Return how long each refusal took, as the client saw it."""
        return [(call.ended_s - call.sent_s) * 1e3 for call in self.refused if call.ended_s is not None]


def first_token_s(call: Call) -> float:
    """Return how long the first token took."""
    return call.frames[0].at_s - call.sent_s


def _tokens_between(call: Call, begin_s: float, end_s: float) -> int:
    until = [frame.num_tokens for frame in call.frames if frame.at_s <= end_s]
    before = [frame.num_tokens for frame in call.frames if frame.at_s < begin_s]
    return max(until, default=0) - max(before, default=0)


@dataclass(slots=True)
class Bench:
    """One server under load."""

    address: str
    budget_s: float
    concurrency: int
    seed: int = field(default=0, init=False)
    """Of the last loop; each has prompts of its own."""

    async def closed(self, duration_s: float) -> Loop:
        """Keep so many requests going for a while."""
        return await self._load([0.0] * MAX_REQUESTS, duration_s, concurrency=self.concurrency, budget_s=None)

    async def open(self, duration_s: float, rate_per_s: float) -> Loop:
        """Send at a rate for a while, whatever comes back."""
        due_s = due_times_s(int(rate_per_s * duration_s), rate_per_s=rate_per_s, seed=self.seed + 1)
        return await self._load(due_s, duration_s, concurrency=MAX_REQUESTS, budget_s=self.budget_s)

    async def _load(
        self, due_s: Sequence[float], duration_s: float, *, concurrency: int, budget_s: float | None
    ) -> Loop:
        self.seed += 1
        recording = Recording(len(due_s))
        async with connect(self.address, count=CHANNELS) as connection:
            await drive(
                PathfoxTarget(connection, first_token_budget_s=budget_s),
                WORKLOAD.asks(random_tokens(VOCABULARY_SIZE), seed=self.seed),
                due_s,
                limits=Limits(concurrency, duration_s),
                recording=recording,
                clock=SystemClock(),
            )
        return Loop(recording, duration_s)


def main() -> None:
    """Measure and print."""
    options = read_options()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        log = Path(folder) / "server.log"
        stream = stack.enter_context(log.open("w"))
        serving = served.serving("--threads", str(options.threads), "--metrics-port", "0", log=stream)
        process_id, address = stack.enter_context(serving)
        bench = Bench(address, options.budget, options.concurrency)
        if options.soak:
            asyncio.run(soak(bench, options, process_id, metrics_port(log)))
        else:
            asyncio.run(rounds(bench, options, log))


async def rounds(bench: Bench, options: argparse.Namespace, log: Path) -> None:
    """Find the capacity and exceed it, in turns."""
    await bench.closed(SETTLE_S)  # warm-up
    pairs = []
    for number in range(options.rounds):
        closed = await bench.closed(options.duration)
        opened = await bench.open(options.duration, options.times * closed.requests_per_s)
        pairs.append((closed, opened))
        seen_s = [first_token_s(call) for call in opened.recording.calls if call.frames]
        first_s = ", ".join(f"p{percent} {percentile(seen_s, percent) or 0:.2f} s" for percent in (50, 99))
        print(
            f"round {number + 1}: {closed.requests_per_s:.1f} requests/s sustained, {closed.tokens_per_s():.0f} tok/s; "
            f"at {options.times:g} times as many: goodput {opened.tokens_per_s(bench.budget_s):.0f} tok/s, "
            f"{len(opened.refused)} of {len(opened.recording.calls)} refused, first token {first_s}",
            flush=True,
        )
    report(pairs, bench.budget_s, logged_refusals_ms(log))


def report(pairs: Sequence[tuple[Loop, Loop]], budget_s: float, server_ms: list[float]) -> None:
    """Print what came of all rounds."""
    share = statistics.median(opened.tokens_per_s(budget_s) / closed.tokens_per_s() for closed, opened in pairs)
    print(f"goodput / capacity {share:.3f} (>= {LEAST_GOODPUT}) {verdict(share >= LEAST_GOODPUT)}")
    client_ms = [each for _, opened in pairs for each in opened.refusals_ms()]
    for who, taken_ms in (("client", client_ms), ("server", server_ms)):
        p50_ms, p99_ms = (percentile(taken_ms, percent) or 0.0 for percent in (50, 99))
        reached = verdict(p99_ms < MOST_REFUSAL_MS)
        print(f"refusals at the {who}: p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms (< {MOST_REFUSAL_MS:g}) {reached}")
    refused = [call for _, opened in pairs for call in opened.refused]
    told = sum(call.outcome is Outcome.REJECTED for call in refused)
    print(f"refusals with RetryInfo: {told} of {len(refused)} {verdict(told == len(refused))}")


async def soak(bench: Bench, options: argparse.Namespace, process_id: int, port: int) -> None:
    """Overload for a long time and watch what grows."""
    closed = await bench.closed(options.duration)
    rate_per_s = options.times * closed.requests_per_s
    print(f"soaking for {options.soak:.0f} s at {rate_per_s:.1f} requests/s", flush=True)
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch(process_id, port, options.soak))
        remaining_s = options.soak
        while remaining_s > 0:
            await bench.open(min(options.duration, remaining_s), rate_per_s)
            remaining_s -= options.duration
    print("| | first | last | growth in 10 minutes | |\n|---|---|---|---|---|")
    for each in watching.result():
        print(row(each))


def row(each: Flatness) -> str:
    """Write one line of the soak's table."""
    growth = f"{each.growth:+.2f} {each.unit}"
    return f"| {each.name} | {each.first:.1f} | {each.last:.1f} | {growth} | {verdict(each.is_flat)} |"


def verdict(is_reached: bool) -> str:  # noqa: FBT001 that is all it is about
    """Say whether a goal is reached."""
    return "pass" if is_reached else "MISS"


def logged_refusals_ms(log: Path) -> list[float]:
    """Return how long the server took for each refusal, by its own log."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return [line["duration_s"] * 1e3 for line in lines if line.get("code") == REFUSED]


def metrics_port(log: Path) -> int:
    """Find the port in the server's log."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return next(int(line["port"]) for line in lines if line["event"] == "metrics_started")


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=40.0, help="seconds of one loop")
    parser.add_argument("--times", type=float, default=2.0, help="of the sustainable rate")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds to the first token that a request allows")
    parser.add_argument("--concurrency", type=int, default=64, help="of the closed loop: what one engine runs at once")
    parser.add_argument("--soak", type=float, default=0.0, help="overload for so many seconds instead")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
