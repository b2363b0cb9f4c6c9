"""Seconds by phase, and CPU time by what threads do."""

import sys
import threading
import time

import pytest

from server import budget
from server.budget import CpuTimeCollector, PhaseCounter, Reading, group_of


def samples(collector: PhaseCounter | CpuTimeCollector) -> dict[tuple[str, ...], float]:
    """Scrape; return values by their labels' values."""
    return {tuple(sample.labels.values()): sample.value for metric in collector.collect() for sample in metric.samples}


def test_phases_add_up() -> None:
    """Each phase of each model is a sum of its own, named as a counter."""
    counter = PhaseCounter()
    for phase, model, seconds in (
        ("kernels", "a", 0.5),
        ("kernels", "a", 0.25),
        ("kernels", "b", 1.0),
        ("text", "", 2),
    ):
        counter.add(phase, model, seconds)

    assert samples(counter) == {("kernels", "a"): 0.75, ("kernels", "b"): 1.0, ("text", ""): 2.0}
    assert {s.name for metric in counter.collect() for s in metric.samples} == {"pathfox_phase_seconds_total"}


@pytest.mark.parametrize(
    ("name", "native_name", "group"),
    [
        ("pathfox-engine", "python", budget.ENGINE),
        ("MainThread", "python", budget.LOOP),
        ("Thread-1 (_poll_wrapper)", "python", budget.GRPC),
        ("ThreadPoolExecutor-0_0", "python", budget.OTHER),
        (None, "event_engine", budget.GRPC),
        (None, "grpc_global_tim", budget.GRPC),
        (None, "python", budget.KERNELS),
        (None, "jemalloc_bg", budget.OTHER),
    ],
)
def test_threads_are_known_by_their_names(name: str | None, native_name: str, group: str) -> None:
    """Python's name counts first; grpc names its own threads, and the kernels' pool names none."""
    assert group_of(name, native_name, "python") == group


def test_time_of_ended_threads_is_kept() -> None:
    """A counter never goes back: not when a thread ends, nor when another one gets its number."""
    scrapes = iter(
        [
            {1: Reading("grpc", 2.0), 2: Reading("grpc", 3.0)},
            {1: Reading("grpc", 2.5)},
            {1: Reading("engine", 0.5)},
        ]
    )
    collector = CpuTimeCollector(lambda: next(scrapes))

    assert samples(collector) == {("grpc",): 5.0}
    assert samples(collector) == {("grpc",): 5.5}
    assert samples(collector) == {("grpc",): 5.5, ("engine",): 0.5}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads are not listed")
def test_reads_this_process() -> None:
    """A thread of Python is found with the CPU time that its own clock says."""
    spent_s = 0.0
    is_done, may_end = threading.Event(), threading.Event()

    def work() -> None:
        nonlocal spent_s
        while (spent_s := time.thread_time()) < 0.01:
            pass
        is_done.set()
        may_end.wait(10)

    thread = threading.Thread(target=work, name="pathfox-engine")
    thread.start()
    assert is_done.wait(10)
    assert thread.native_id is not None
    reading = budget.read_threads()[thread.native_id]
    may_end.set()
    thread.join()

    assert reading.group == budget.ENGINE
    assert reading.seconds >= spent_s > 0
