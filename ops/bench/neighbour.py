"""What a busy neighbour costs: decode rates with and without another process that spins on core 0, interleaved.

Goal: at most 2.5 times as slow, never a collapse. Also run: a server that may use one core only, with as many threads
as it finds cores and with more; these say what they reach and must not collapse either.

Example:
    .venv/bin/python ops/bench/neighbour.py --rounds 5
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator

from ops.bench import served
from ops.bench.compare.contenders import Pathfox
from ops.bench.compare.prompts import MEASURES, Measure

GOAL = 2.5
COLUMNS = tuple(each for each in MEASURES if each.name in {"1 stream", "8 streams"})
QUIET, BUSY = "2 cores, 2 threads", "2 cores, 2 threads, neighbour on core 0"
ONE_CORE, CROWDED = "1 core, threads unset", "1 core, 2 threads asked"
Rates = dict[tuple[str, str], list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rates: Rates = {}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Pathfox("--threads", "2", served.NO_SPECULATION))
        with affinity({0}):
            one_core = stack.enter_context(Pathfox(served.NO_SPECULATION))
            crowded = stack.enter_context(Pathfox("--threads", "2", served.NO_SPECULATION))
        for number in range(-1, options.rounds):
            for measure in COLUMNS:
                take(rates, QUIET, ours, measure, number)
                with neighbour({0}):
                    take(rates, BUSY, ours, measure, number)
                take(rates, ONE_CORE, one_core, measure, number)
                take(rates, CROWDED, crowded, measure, number)
    report(rates)


def take(rates: Rates, name: str, contender: Pathfox, measure: Measure, number: int) -> None:
    """Take one rate; the round before the first warms up."""
    rate = contender.rate(measure, number)
    if number >= 0:
        rates.setdefault((name, measure.name), []).append(rate)


@contextlib.contextmanager
def affinity(cores: set[int]) -> Iterator[None]:
    """Let what is started in the body run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def neighbour(cores: set[int]) -> Iterator[None]:
    """Keep cores busy for the body."""
    with affinity(cores):
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def report(rates: Rates) -> None:
    """Print medians, and how many times as slow as alone."""
    print("| | " + " | ".join(f"{each.name}, tok/s [least-most] | times as slow" for each in COLUMNS) + " |")
    print("|---" * (1 + 2 * len(COLUMNS)) + "|")
    for name in (QUIET, BUSY, ONE_CORE, CROWDED):
        cells = []
        for measure in COLUMNS:
            taken = rates[name, measure.name]
            slower = statistics.median(rates[QUIET, measure.name]) / statistics.median(taken)
            verdict = "" if name != BUSY else f" (<= {GOAL}) {'pass' if slower <= GOAL else 'MISS'}"
            cells += [f"{statistics.median(taken):.0f} [{min(taken):.0f}-{max(taken):.0f}]", f"{slower:.2f}x{verdict}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
