"""Watches a server from outside for as long as a load lasts: memory, descriptors, threads, event loop tasks."""

import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from server.cli.bench.scrape import TIMEOUT_S, direct

TASKS = "pathfox_event_loop_tasks"
INTERVAL_S = 2.0
SETTLE_SHARE = 0.2
"""Of the samples, at the start: pools and caches fill."""
PERIOD_S = 600.0


@dataclass(frozen=True, slots=True)
class Flatness:
    """One figure over time."""

    name: str
    unit: str
    first: float
    last: float
    """Medians of the first and last tenth after settling."""
    growth: float
    """In ten minutes, by a line of least squares."""
    tolerance: float

    @property
    def is_flat(self) -> bool:
        """Whether it does not grow by more than noise."""
        return self.growth <= self.tolerance


TOLERANCES = {
    "resident memory": ("MiB", 16.0),
    "descriptors": ("", 2.0),
    "threads": ("", 1.0),
    "tasks": ("", 8.0),
}
"""Units, and how much growth in ten minutes is still flat: tasks follow the load, which is random."""


async def watch(process_id: int, metrics_port: int, duration_s: float) -> list[Flatness]:
    """Sample for so long, then say what grew."""
    begun, seen = time.monotonic(), []
    while (now_s := time.monotonic() - begun) < duration_s:
        seen.append((now_s, await asyncio.to_thread(sample, process_id, metrics_port)))
        await asyncio.sleep(INTERVAL_S)
    settled = seen[int(len(seen) * SETTLE_SHARE) :]
    times_s = [at_s for at_s, _ in settled]
    return [flatness(name, times_s, [figures[name] for _, figures in settled]) for name in TOLERANCES]


def sample(process_id: int, metrics_port: int) -> dict[str, float]:
    """Read the figures once."""
    process = Path(f"/proc/{process_id}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    with direct.open(f"http://127.0.0.1:{metrics_port}/metrics", timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    return {
        "resident memory": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "tasks": float(next(line.split()[1] for line in lines if line.startswith(TASKS + " "))),
    }


def flatness(name: str, times_s: list[float], values: list[float]) -> Flatness:
    """Fit a line."""
    unit, tolerance = TOLERANCES[name]
    tenth = max(1, len(values) // 10)
    slope = statistics.linear_regression(times_s, values).slope
    return Flatness(
        name, unit, statistics.median(values[:tenth]), statistics.median(values[-tenth:]), slope * PERIOD_S, tolerance
    )
