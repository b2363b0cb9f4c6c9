"""llama.cpp by its own `llama-batched-bench`: bare, without a server or a binding around it.

It draws random prompts of the lengths we ask for itself. llama-cpp-python's high-level API, which carries this library,
generates one sequence at a time and would show neither 8 nor 32 streams.
"""

import os
import subprocess
from pathlib import Path
from typing import Self

from ops.bench.compare import machine
from ops.bench.compare.prompts import Measure
from ops.bench.compare.runner import NUM_THREADS

CONTEXT_TOKENS = 8448
"""32 sequences of 192 + 64 tokens, and some to spare."""
PREFILL_COLUMN, DECODE_COLUMN = 6, 8


class Llama:
    """One file, one new process for each measurement; loading is not measured.

    Args:
        name: in the table.
        programs: the folder of llama.cpp's programs.
        file: GGUF.
    """

    def __init__(self, name: str, programs: Path, file: Path) -> None:
        self.name = name
        self._program = programs / "llama-batched-bench"
        self._file = file
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True)  # noqa: S603 our own words
        self.versions = {"llama.cpp": (said.stdout + said.stderr).partition("\n")[0].removeprefix("version: ")}
        return self

    def __exit__(self, *error: object) -> None:
        return

    def rate(self, measure: Measure, seed: int) -> float:
        """Return tokens per second of one measure, taken once."""
        del seed  # every process draws its own
        shape = ("-npp", measure.prompt_tokens, "-ntg", measure.new_tokens or 1, "-npl", measure.streams)
        sizes = ("-t", NUM_THREADS, "-c", CONTEXT_TOKENS, "-b", 2048, "-ub", 512)
        command = [str(each) for each in (self._program, "-m", self._file, *sizes, *shape)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 our own words
        cells = [line for line in printed.splitlines() if line.startswith("|")][-1].split("|")
        return float(cells[DECODE_COLUMN if measure.new_tokens else PREFILL_COLUMN])

    def cpu_s(self) -> float:
        """Return the CPU time of all processes that were started and have ended."""
        return machine.cpu_s([os.getpid()])


def requantised(programs: Path, file: Path, folder: Path) -> Path:
    """Return the file in Q4_0, which llama.cpp computes fastest with; made once from the given file."""
    made = folder / file.name.replace("Q4_1", "Q4_0")
    if not made.exists():
        command = [str(each) for each in (programs / "llama-quantize", "--allow-requantize", file, made, "Q4_0")]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603 our own words
    return made
