"""What this machine can do at most: reading memory, multiplying in registers. By the plain loops of `ceilings.cpp`."""

import ctypes
import pathlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.cpu import build
from kernels.cpu.isa import FEATURES, Isa

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
READ_BYTES = 96 << 20
"""As many as the weights of SmolLM2-135M, and more than most caches hold."""
CHAIN = 2_000_000
CHAINS = 16
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of some rounds, all threads together."""

    read_bytes_per_s: float
    multiply_adds_per_s: float

    def share(self, num_bytes: float, multiply_adds: float, seconds: float) -> str:
        """Say what an op reached of the ceiling that is nearer."""
        read, multiplied = num_bytes / seconds, multiply_adds / seconds
        shares = read / self.read_bytes_per_s, multiplied / self.multiply_adds_per_s
        if shares[0] >= shares[1]:
            return f"{read / 1e9:6.0f} GB/s    {shares[0]:4.0%} of reading"
        return f"{multiplied / 1e9:6.0f} GMAC/s  {shares[1]:4.0%} of multiplying"


def measure(isa: Isa, num_threads: int) -> Ceilings:
    """Time the plain loops on as many threads as the ops use.

    Raises:
        BuildError: there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        loops = _build(isa, pathlib.Path(folder))
    data = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    share = READ_BYTES // num_threads // 256 * 256
    reading = _best(num_threads, lambda i: loops.ceiling_read(data.data_ptr() + i * share, share))
    multiplying = _best(num_threads, lambda _: loops.ceiling_multiply(CHAIN))
    lanes = loops.ceiling_multiply(1)
    return Ceilings(num_threads * share / reading, num_threads * CHAINS * lanes * CHAIN / multiplying)


def _build(isa: Isa, folder: pathlib.Path) -> ctypes.CDLL:
    """Compile the loops with the flags of the ops."""
    compiler = build.find_compiler()
    if compiler is None:
        raise build.BuildError("no C++ compiler for ops/bench/ceilings.cpp")
    flags = (*build.FLAGS, *(f"-m{feature}" for feature in FEATURES[isa]))
    path = folder / "ceilings.so"
    subprocess.run([*compiler.command, *flags, "-shared", str(SOURCE), "-o", str(path)], check=True)  # noqa: S603 our own words
    loops = ctypes.CDLL(str(path))
    loops.ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loops.ceiling_read.restype = ctypes.c_uint64
    loops.ceiling_multiply.argtypes = [ctypes.c_size_t]
    return loops


def _best(num_threads: int, loop: Callable[[int], object]) -> float:
    """Return the shortest time from when all threads are ready until all have done the loop."""
    best = float("inf")
    for _ in range(ROUNDS):
        ready = threading.Barrier(num_threads + 1)

        def work(index: int, ready: threading.Barrier = ready) -> None:
            ready.wait()
            loop(index)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(num_threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        started = time.perf_counter()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - started)
    return best
