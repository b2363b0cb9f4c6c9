"""How long `pathfox serve` takes from its start to a client's first token, and what memory it holds then.

Each round starts two servers with a weight cache of their own: a first start, which packs the weights and keeps them,
and a second one, which finds them. The model's files and the libraries are in the page cache for both. Memory is that
of a second start whose page pool was filled by a prompt as long as the pool, so that every page of it counts.

Example:
    .venv/bin/python -m ops.bench.start --output ops/bench/results/start.json
"""

import argparse
import json
import pathlib
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import AbstractContextManager

from ops.bench.compare import machine
from ops.bench.served import serving
from pathfox.client import Client, Delta

MAX_SECOND_START_S = 5.0
MAX_OTHER_BYTES = 900_000_000
"""Resident memory beside weights and page pool."""
POOL_BYTES = 64 << 20
POOL_PROMPT_TOKENS = 2_900
"""Tokens of the default model that fill `POOL_BYTES`, but for a page or two."""
TOKEN_IDS = range(100, 40_000)


def main() -> int:
    """Measure, print two tables and one JSON line; return 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, help="write the JSON here too")
    options = parser.parse_args()

    starts: dict[str, list[dict[str, float]]] = {"first start": [], "second start": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for taken in starts.values():
                taken.append(measure_start(options.threads, pathlib.Path(cache)))
    memory = measure_memory(options.threads)
    result = {
        "machine": machine.describe(),
        "threads": options.threads,
        "rounds": options.rounds,
        "median_s": {name: medians(taken) for name, taken in starts.items()},
        "resident_bytes": memory,
        "all": starts,
    }
    is_reached = report(starts, memory)
    print(json.dumps({key: result[key] for key in ("median_s", "resident_bytes")}))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if is_reached else 1


def measure_start(threads: int, cache: pathlib.Path) -> dict[str, float]:
    """Start a server and ask it for a token; return seconds since its process was started."""
    begun = time.perf_counter()
    with serve(threads, cache) as (_, address):
        serving_s = time.perf_counter() - begun
        with Client(address) as client:
            next(event for event in client.generate(text="The sea is", max_tokens=1) if isinstance(event, Delta))
        return {"serving": serving_s, "first token": time.perf_counter() - begun}


def measure_memory(threads: int) -> dict[str, int]:
    """Return the resident bytes of a second start whose pool is full, by what they are."""
    words = random.Random(0)  # noqa: S311 not a secret
    prompt = [words.choice(TOKEN_IDS) for _ in range(POOL_PROMPT_TOKENS)]
    with tempfile.TemporaryDirectory() as cache:
        measure_start(threads, pathlib.Path(cache))
        with serve(threads, pathlib.Path(cache), page_pool_bytes=POOL_BYTES) as (pid, address):
            with Client(address) as client:
                client.generate_once(token_ids=prompt, max_tokens=1)
            found = resident(pid)
    return {
        "weights": found["weights"],
        "page pool": POOL_BYTES,
        "libraries": found["libraries"],
        "other files": found["other files"],
        "heap and stacks": found["anonymous"] - POOL_BYTES,
        "all": found.total(),
    }


def serve(threads: int, cache: pathlib.Path, **engine: int) -> AbstractContextManager[tuple[int, str]]:
    """Serve the default model with a weight cache of its own."""
    settings = {"weight_cache_folder": str(cache), **engine}
    environment = {f"PATHFOX__ENGINE__{name.upper()}": str(value) for name, value in settings.items()}
    return serving("--threads", str(threads), settings=environment)


def resident(pid: int) -> Counter[str]:
    """Add up a process's resident bytes: of the weight cache, of shared objects, of other files, of no file."""
    found: Counter[str] = Counter()
    kind = ""
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            path = words[5] if len(words) > 5 else ""
            if path.endswith(".weights"):
                kind = "weights"
            elif ".so" in pathlib.Path(path).name:
                kind = "libraries"
            else:
                kind = "other files" if path.startswith("/") else "anonymous"
        elif words[0] == "Rss:":
            found[kind] += int(words[1]) << 10
    return found


def medians(taken: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: statistics.median(each[name] for each in taken) for name in taken[0]}


def report(starts: dict[str, list[dict[str, float]]], memory: dict[str, int]) -> bool:
    """Print both tables, each with its limit; return whether both are kept."""
    print(f"{'seconds, median [min-max]':28}{'serving':>22}{'first token':>22}")
    for name, taken in starts.items():
        cells = []
        for figure, median in medians(taken).items():
            values = [each[figure] for each in taken]
            cells.append(f"{median:.2f} [{min(values):.2f}-{max(values):.2f}]")
        print(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells))
    second_s = medians(starts["second start"])["first token"]
    is_fast = judge(
        "second start to first token", f"{second_s:.2f} s", f"{MAX_SECOND_START_S:.0f} s", MAX_SECOND_START_S - second_s
    )
    print(f"\n{'resident memory':28}{'MB':>10}")
    for name, num_bytes in memory.items():
        print(f"{name:28}{num_bytes / 1e6:>10.0f}")
    other = memory["all"] - memory["weights"] - memory["page pool"]
    is_small = judge(
        "beside weights and pool", f"{other / 1e6:.0f} MB", f"{MAX_OTHER_BYTES / 1e6:.0f} MB", MAX_OTHER_BYTES - other
    )
    return is_fast and is_small


def judge(what: str, seen: str, limit: str, left: float) -> bool:
    """Print one figure beside its limit; return whether it is kept."""
    print(f"{what:28}{seen:>10}, at most {limit}: {'reached' if left >= 0 else 'MISSED'}")
    return left >= 0


if __name__ == "__main__":
    raise SystemExit(main())
