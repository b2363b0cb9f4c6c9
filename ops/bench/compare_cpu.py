"""Pathfox next to llama.cpp, OpenVINO GenAI, transformers and its own bare engine loop: one run, interleaved.

Prefill is one prompt to its first token. Decode is (seconds for 65 tokens - seconds for 1) of so many streams at once.
Writes ops/bench/results/compare_cpu.{json,md,png} with --keep. Peers: ops/bench/compare/install_peers.sh.

Examples:
    .venv/bin/python ops/bench/compare_cpu.py --rounds 1 --only pathfox engine
    .venv/bin/python ops/bench/compare_cpu.py --rounds 5 --peers ~/pathfox-peers --keep
"""

import argparse
import contextlib
import datetime as dt
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ops.bench.compare import machine
from ops.bench.compare.contenders import Contender
from ops.bench.compare.lineup import KEYS, line_up
from ops.bench.compare.plot import plot
from ops.bench.compare.prompts import MEASURES, Measure
from ops.bench.compare.report import Result, as_json, as_markdown
from ops.bench.compare.rounds import Sample, take_rounds
from ops.bench.compare.runner import NUM_THREADS

RESULTS = Path(__file__).parent / "results"
DEFAULT_PEERS = Path("~/pathfox-peers").expanduser()
diagnostics = Console(stderr=True)


def main() -> None:
    """Run the rounds, show the tables, keep them."""
    options = read_options()
    wanted = {KEYS[key] for key in options.only}
    peer_python = options.peer_python or options.peers / "venv" / "bin" / "python"
    contenders, missing = line_up(options.peers.resolve(), peer_python.absolute(), wanted)
    for name, remedy in missing:
        diagnostics.print(f"[yellow]skipped: {name} is not here; to have it: {remedy}")
    begun = now()
    samples, versions = run(contenders, [each for each in MEASURES if each.name in options.measures], options.rounds)
    facts = {
        "command": shlex.join(["python", "ops/bench/compare_cpu.py", *without_paths(sys.argv[1:])]),
        "begun": begun,
        "ended": now(),
        "threads": NUM_THREADS,
        "rounds": options.rounds,
        "machine": machine.describe(),
        "versions": versions,
        "skipped": [name for name, _ in missing],
    }
    result = Result(facts, samples)
    page = as_markdown(result, "compare_cpu.png")
    print(page)
    folder = RESULTS if options.keep else options.output
    if folder:
        (folder / "compare_cpu.json").write_text(json.dumps(as_json(result), indent=2) + "\n")
        (folder / "compare_cpu.md").write_text(page)
        plot(folder / "compare_cpu.png", result)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=KEYS, default=list(KEYS))
    names = [each.name for each in MEASURES]
    parser.add_argument("--measures", nargs="+", choices=names, default=names)
    parser.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="where install_peers.sh put them")
    parser.add_argument("--peer-python", type=Path, help="one that has openvino-genai; default PEERS/venv/bin/python")
    parser.add_argument("--keep", action="store_true", help="write the committed results")
    parser.add_argument("--output", type=Path, help="write them into this folder instead")
    return parser.parse_args()


def run(
    contenders: list[Contender], measures: list[Measure], rounds: int
) -> tuple[list[Sample], dict[str, dict[str, str]]]:
    """Start everybody, take all samples and show how far they are."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The speed is averaged over everything: a contender is slow in every round, so the forecast holds from the second.
    remaining = TimeRemainingColumn()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Progress(*columns, remaining, console=diagnostics, speed_estimate_period=1e9))
        starting = bar.add_task("", total=len(contenders))
        for each in contenders:
            bar.update(starting, description=f"starting {each.name}")
            stack.enter_context(each)
            bar.advance(starting)
        bar.remove_task(starting)
        measuring = bar.add_task("warm-up", total=rounds * len(measures) * len(contenders))

        def show(sample: Sample) -> None:
            rate = f"{sample.tokens_per_s:.0f} tok/s"
            bar.update(measuring, advance=1, description=f"{sample.contender}, {sample.measure}: {rate}")

        samples = take_rounds(contenders, measures, rounds, on_sample=show)
        return samples, {each.name: each.versions for each in contenders}


def now() -> str:
    """Return the time of day."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def without_paths(arguments: list[str]) -> list[str]:
    """Return the arguments with folders of this machine named, not told."""
    return [
        "PATH" if before in {"--peers", "--peer-python", "--output"} else each
        for before, each in zip(["", *arguments], arguments, strict=False)
    ]


if __name__ == "__main__":
    main()
