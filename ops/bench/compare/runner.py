"""The child's side of a comparison: answers every question with the seconds that it took, one JSON line each.

Started as `python -m ops.bench.compare.run_X`, also by Pythons that have none of our packages: imports nothing of ours.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], Sequence[int]]
"""Given prompts and how many tokens to add to each, adds them all at once; returns how many came for each prompt."""

NUM_THREADS = 2
"""Everybody has so many."""


def answer_questions(versions: dict[str, str], generate: Generate) -> None:
    """Say who is there, then measure until the questions end.

    Args:
        versions: of the packages that compute.
        generate: see `Generate`; greedy, and with no memory of earlier prompts.
    """
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        begun = time.perf_counter()
        counts = generate(question["prompts"], question["new_tokens"])
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "counts": list(counts)}), flush=True)
