"""Where a token's time goes: seconds by phase, counted as they pass; CPU time by what threads do, read on a scrape.

On the request path only by an addition for each step and frame. `telemetry.py` registers both, and
`pathfox bench --profile` reads them. CPU time is known on Linux only.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

TASKS = Path("/proc/self/task")
PHASES_NAME = "pathfox_phase_seconds"
CPU_NAME = "pathfox_thread_cpu_seconds"
ENGINE, KERNELS, LOOP, GRPC, OTHER = "engine", "kernels", "event loop", "grpc", "other"

TEXT = "text"
"""Phase of the event loop: detokenising, stop strings, and the events of a request."""
FRAME = "frame"
"""Phase of the event loop: writing events as proto."""
WRITE = "write"
"""Handing frames to grpc and waiting until it wants the next: others run meanwhile, so these seconds overlap."""

_PYTHON_GROUPS = {"pathfox-engine": ENGINE, "MainThread": LOOP}
_GRPC_POLLER = "_poll_wrapper"
"""grpc.aio's own thread, by the name that Python gives it."""
_GRPC_NAMES = ("event_engine", "grpc", "resolver", "default-executo", "timer")
"""How grpc names its native threads. Those of the kernels' pool have the process's own name."""


class PhaseCounter(Collector):
    """Seconds by what they were spent on. An addition is far cheaper than a Prometheus counter's: no lock, no sample.

    Only one thread may add to a phase of a model.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = {}

    def add(self, phase: str, model: str, seconds: float) -> None:
        """Count time."""
        key = (phase, model)
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def collect(self) -> Iterator[Metric]:
        """Yield one sample for each phase and model."""
        family = CounterMetricFamily(PHASES_NAME, "Where the way of a token takes its time.", labels=["phase", "model"])
        for key, seconds in list(self._seconds.items()):
            family.add_metric(key, seconds)
        yield family


class Reading(NamedTuple):
    """One thread, now."""

    group: str
    seconds: float


def group_of(name: str | None, native_name: str, process_name: str) -> str:
    """Say what a thread does.

    Args:
        name: Python's name of it; None = Python did not start it.
        native_name: the operating system's.
        process_name: the operating system's name of the first thread.
    """
    if name is not None:
        return GRPC if _GRPC_POLLER in name else _PYTHON_GROUPS.get(name, OTHER)
    if native_name.startswith(_GRPC_NAMES):
        return GRPC
    return KERNELS if native_name == process_name else OTHER


class CpuTimeCollector(Collector):
    """Sums the CPU time of threads by group; of those that have ended, what was last seen.

    Args:
        read: returns the group and the CPU seconds of each living thread, by its number.
    """

    def __init__(self, read: Callable[[], dict[int, Reading]] | None = None) -> None:
        self._read = read or read_threads
        self._seen: dict[int, Reading] = {}
        self._ended: dict[str, float] = {}

    def describe(self) -> list[Metric]:
        """Name the family without reading anything."""
        return [_family()]

    def collect(self) -> Iterator[Metric]:
        """Yield one sample for each group."""
        family = _family()
        for group, seconds in self._totals().items():
            family.add_metric([group], seconds)
        yield family

    def _totals(self) -> dict[str, float]:
        now = self._read()
        for number, last in self._seen.items():
            # A number whose time has shrunk belongs to another thread by now.
            if number not in now or now[number].seconds < last.seconds:
                self._ended[last.group] = self._ended.get(last.group, 0.0) + last.seconds
        self._seen = now
        totals = dict(self._ended)
        for group, seconds in now.values():
            totals[group] = totals.get(group, 0.0) + seconds
        return totals


def _family() -> CounterMetricFamily:
    return CounterMetricFamily(CPU_NAME, "CPU time by what threads do.", labels=["threads"])


def read_threads() -> dict[int, Reading]:
    """Read the CPU time of this process's threads; nothing where the operating system does not list them."""
    if not TASKS.is_dir():
        return {}
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    process_name = (TASKS / str(os.getpid()) / "comm").read_text()
    readings = {}
    for task in TASKS.iterdir():
        number = int(task.name)
        with contextlib.suppress(OSError):  # it has just ended
            group = group_of(names.get(number), (task / "comm").read_text(), process_name)
            readings[number] = Reading(group, time.clock_gettime(_clock_of(number)))
    return readings


def _clock_of(thread: int) -> int:
    """Return a thread's CPU clock as Linux numbers it; `time.pthread_getcpuclockid` knows only threads of Python."""
    return (~thread << 3) | 6
