"""Who can take part here; who cannot is named, with the command that changes it."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ops.bench.compare import goals
from ops.bench.compare.contenders import Child, Contender, Pathfox
from ops.bench.compare.llama import Llama, requantised
from ops.bench.compare.runner import NUM_THREADS
from ops.bench.served import NO_SPECULATION
from server.model.loader.bundled import find_bundled_model

INSTALL = "sh ops/bench/compare/install_peers.sh {peers}"

KEYS = {
    "pathfox": goals.OURS,
    "engine": goals.ENGINE,
    "llama-q4_0": goals.LLAMA_BEST,
    "llama-q4_1": goals.LLAMA_SAME,
    "openvino": goals.OPENVINO,
    "bf16": goals.TRANSFORMERS["bfloat16"],
    "fp32": goals.TRANSFORMERS["float32"],
}
"""Names for the command line."""


class Missing(NamedTuple):
    """Somebody who is not there."""

    name: str
    remedy: str


def line_up(peers: Path, peer_python: Path, wanted: set[str]) -> tuple[list[Contender], list[Missing]]:
    """Return who takes part, in the order of the table, and who is missing."""
    found: list[Contender] = []
    missing: list[Missing] = []
    for each in _everybody(peers, peer_python, find_bundled_model()):
        if each.name in wanted:
            (missing if isinstance(each, Missing) else found).append(each)  # type: ignore[arg-type] # the one list or the other
    return found, missing


def _everybody(peers: Path, peer_python: Path, file: Path) -> Iterator[Contender | Missing]:
    """Yield everybody. Prefix caches are off, or see no prompt twice; drafts are off where there are any."""
    install = INSTALL.format(peers=peers)
    run = "ops.bench.compare.run_"
    yield Pathfox("--threads", str(NUM_THREADS), NO_SPECULATION)
    yield Child(goals.ENGINE, (sys.executable, "-m", f"{run}engine", file))
    programs = peers / "lb" / "bin"
    if (programs / "llama-batched-bench").exists():
        yield Llama(goals.LLAMA_BEST, programs, requantised(programs, file, peers))
        yield Llama(goals.LLAMA_SAME, programs, file)
    else:
        yield from (Missing(name, install) for name in (goals.LLAMA_BEST, goals.LLAMA_SAME))
    if peer_python.exists() and _succeeds(peer_python, "-c", "import openvino_genai"):
        yield Child(goals.OPENVINO, (peer_python, "-m", f"{run}openvino", file))
    else:
        yield Missing(goals.OPENVINO, install)
    for dtype, name in goals.TRANSFORMERS.items():
        if importlib.util.find_spec("transformers"):
            yield Child(name, (sys.executable, "-m", f"{run}transformers", file, dtype))
        else:
            yield Missing(name, "make check")


def _succeeds(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 our own words
