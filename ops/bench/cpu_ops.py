"""Times the CPU ops at the shapes of SmolLM2-135M, one by one and as the steps they make up: no sampler, no server.

Each op is set against what plain loops reach on this machine in the same run: reading memory, or multiplying.

Examples:
    .venv/bin/python -m ops.bench.cpu_ops
    .venv/bin/python -m ops.bench.cpu_ops --neighbour --rows 1 8 32 --prefill
    .venv/bin/python -m ops.bench.cpu_ops --isa avx2 --threads 1 --context 4096 --rows 1 8
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu import isa, library
from kernels.cpu.isa import Isa
from kernels.embed import embed
from kernels.linear import LinearWeight, gated_linear, linear, pack, pack_gated
from kernels.paged_attention import paged_attention
from kernels.placement import RowPlacement
from kernels.rms_norm import Norm
from kernels.rope import RopeTable, rotate_and_store
from kernels.weights import BLOCK, BLOCK_BYTES, EncodedMatrix, Encoding
from ops.bench import ceilings
from ops.bench.ceilings import Ceilings

NUM_LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152
PAGE_SIZE = 16
SETTLING_S = 0.4
"""The thread pool takes so long to find out that a core is free again, or taken."""
CPU = torch.device("cpu")
YARDSTICK = "2 threads of a quiet Zen 4, context 192..256: prefill 512 1706 tok/s; 1 / 8 / 32 streams 212 / 874 / 1072"


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights and pages of one layer."""

    norm: Norm
    qkv: LinearWeight
    output: LinearWeight
    gate_up: LinearWeight
    down: LinearWeight
    key_pages: Tensor
    value_pages: Tensor


class Steps:
    """A model of random weights, and steps of it."""

    def __init__(self, num_pages: int, context: int) -> None:
        width = (HEADS + 2 * GROUPS) * HEAD_DIM
        self.head = pack([random_matrix(Encoding.Q8_0, VOCABULARY, HIDDEN)], device=CPU)
        self.layers = [
            Layer(
                norm=Norm(torch.ones(HIDDEN), 1e-5),
                qkv=pack([random_matrix(Encoding.Q4_1, width, HIDDEN)], device=CPU),
                output=pack([random_matrix(Encoding.Q4_1, HIDDEN, HEADS * HEAD_DIM)], device=CPU),
                gate_up=pack_gated(*(random_matrix(Encoding.Q4_1, FFN, HIDDEN) for _ in range(2)), device=CPU),
                down=pack([random_matrix(Encoding.Q4_1, HIDDEN, FFN)], device=CPU),
                key_pages=torch.zeros(num_pages, GROUPS, HEAD_DIM, PAGE_SIZE, dtype=torch.float16),
                value_pages=torch.zeros(num_pages, GROUPS, PAGE_SIZE, HEAD_DIM, dtype=torch.float16),
            )
            for _ in range(NUM_LAYERS)
        ]
        angles = torch.outer(torch.arange(context + 1), 1e5 ** (-torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM))
        self.table = RopeTable(angles.cos(), angles.sin(), is_interleaved=True)
        self.seconds: dict[str, float] = {}

    def run(self, rows: RowPlacement, logit_rows: Tensor) -> Tensor:
        """Run one step; adds the time of each op to `seconds`."""
        x = self.timed("embed", lambda: embed(torch.full_like(rows.positions, 7), self.head))
        for layer in self.layers:
            x = self.run_layer(layer, x, rows)
        last = self.layers[-1].norm
        return self.timed("lm_head", lambda: linear(x, self.head, norm=last, select=logit_rows))

    def run_layer(self, layer: Layer, x: Tensor, rows: RowPlacement) -> Tensor:
        """Run one layer."""
        pages = (layer.key_pages, layer.value_pages)
        qkv = self.timed("qkv", lambda: linear(x, layer.qkv, norm=layer.norm))
        query = self.timed("rope", lambda: rotate_and_store(qkv, rows, self.table, *pages))
        attended = self.timed("attention", lambda: paged_attention(query, *pages, rows, scale=HEAD_DIM**-0.5))
        mixed = self.timed("output", lambda: linear(attended, layer.output, residual=x))
        hidden = self.timed("gate_up", lambda: gated_linear(mixed, layer.gate_up, norm=layer.norm))
        return self.timed("down", lambda: linear(hidden, layer.down, residual=mixed))

    def timed(self, name: str, op: Callable[[], Tensor]) -> Tensor:
        """Call an op and add its time."""
        started = time.perf_counter()
        result = op()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    def bytes_read(self, rows: RowPlacement) -> dict[str, int]:
        """Return the bytes that each op of a step reads at least once."""
        last_positions = {int(s): int(p) for s, p in zip(rows.sequences, rows.positions, strict=True)}
        cached = sum(position + 1 for position in last_positions.values()) * GROUPS * HEAD_DIM * 2 * 2
        sizes = {name: weight.num_bytes * NUM_LAYERS for name, weight in self.products().items()}
        return {**sizes, "attention": cached * NUM_LAYERS, "lm_head": self.head.num_bytes}

    def multiply_adds(self, num_rows: int, num_logit_rows: int) -> dict[str, int]:
        """Return the multiply-adds of the products of a step."""
        layers = {name: num_rows * _size(weight) * NUM_LAYERS for name, weight in self.products().items()}
        return {**layers, "lm_head": num_logit_rows * _size(self.head)}

    def products(self) -> dict[str, LinearWeight]:
        """Return the weights of a layer by the name of their op."""
        layer = self.layers[0]
        return {"qkv": layer.qkv, "output": layer.output, "gate_up": layer.gate_up, "down": layer.down}


def _size(weight: LinearWeight) -> int:
    return weight.num_rows * weight.num_columns


def random_matrix(encoding: Encoding, num_rows: int, num_columns: int) -> EncodedMatrix:
    """Make a quantised matrix of small numbers."""
    blocks = torch.randint(0, 256, (num_rows, num_columns // BLOCK, BLOCK_BYTES[encoding]), dtype=torch.uint8)
    halves = (torch.rand(num_rows, num_columns // BLOCK, 2) * 1e-3).to(torch.float16).view(torch.uint8)
    size = 4 if encoding is Encoding.Q4_1 else 2
    blocks[..., :size] = halves[..., :size]
    return EncodedMatrix(encoding, num_rows, num_columns, blocks.view(num_rows, -1))


def decode_rows(num_sequences: int, context: int) -> RowPlacement:
    """Place one row at the end of each sequence, its pages scattered over the pool."""
    pages = context // PAGE_SIZE + 1
    table = torch.randperm(num_sequences * pages, dtype=torch.int32).view(num_sequences, pages)
    ids = torch.arange(num_sequences, dtype=torch.int32)
    return RowPlacement(torch.full_like(ids, context - 1), ids, table)


def prefill_rows(first: int, count: int, table: Tensor) -> RowPlacement:
    """Place a chunk of one sequence."""
    return RowPlacement(
        torch.arange(first, first + count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32), table
    )


def report(title: str, steps: Steps, rows: RowPlacement, repeats: int, ceiling: Ceilings) -> float:
    """Time a step, print each op's part of the best one, and return the mean."""
    num_rows = rows.num_rows
    logit_rows = torch.arange(num_rows, dtype=torch.int32)
    times, parts = [], []
    settled_at = time.perf_counter() + SETTLING_S
    while time.perf_counter() < settled_at:
        steps.run(rows, logit_rows)
    for _ in range(repeats):
        steps.seconds = {}
        started = time.perf_counter()
        steps.run(rows, logit_rows)
        times.append(time.perf_counter() - started)
        parts.append(steps.seconds)
    best = parts[times.index(min(times))]
    sizes, multiplies = steps.bytes_read(rows), steps.multiply_adds(num_rows, num_rows)
    median, least = statistics.median(times), min(times)
    rates = f"{num_rows / median:.0f} tok/s (best {num_rows / least:.0f})"
    print(f"{title}: {median * 1e3:.2f} ms (best {least * 1e3:.2f}), {rates}")
    for name, seconds in best.items():
        reached = ceiling.share(sizes[name], multiplies.get(name, 0), seconds) if name in sizes else ""
        print(f"    {name:10} {seconds * 1e3:7.2f} ms {reached}")
    return statistics.mean(times)


def report_prefill(steps: Steps, length: int, chunk: int, repeats: int, ceiling: Ceilings) -> None:
    """Time a whole prompt in chunks and print its rate."""
    table = torch.randperm(length // PAGE_SIZE + 1, dtype=torch.int32).view(1, -1)
    times, parts = [], []
    for _ in range(repeats):
        steps.seconds = {}
        started = time.perf_counter()
        for first in range(0, length, chunk):
            count = min(chunk, length - first)
            steps.run(prefill_rows(first, count, table), torch.tensor([count - 1], dtype=torch.int32))
        times.append(time.perf_counter() - started)
        parts.append(steps.seconds)
    best = parts[times.index(min(times))]
    rate, top = length / statistics.median(times), length / min(times)
    print(f"prefill {length} in chunks of {chunk}: {rate:.0f} tok/s (best {top:.0f})")
    multiplies = steps.multiply_adds(length, -(-length // chunk))
    for name, seconds in best.items():
        reached = ceiling.share(0, multiplies[name], seconds) if name in multiplies else ""
        print(f"    {name:10} {seconds * 1e3:7.2f} ms {reached}")


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep the last core of this process's affinity mask busy by another process."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:  # noqa: S603 our own words
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield
        finally:
            child.kill()


def report_neighbour(steps: Steps, rows: RowPlacement, repeats: int, ceiling: Ceilings) -> None:
    """Print what a busy neighbour on one core costs: the mean step beside it over the mean step alone."""
    alone = report(f"{rows.num_rows} streams alone", steps, rows, repeats, ceiling)
    with busy_neighbour():
        beside = report(f"{rows.num_rows} streams beside a busy neighbour", steps, rows, 20 * repeats, ceiling)
    print(f"{rows.num_rows} streams: a busy neighbour on one core costs {beside / alone:.2f}x")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", type=Isa, choices=isa.supported(), default=isa.best())
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 256])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--neighbour", action="store_true", help="say what a busy process on one core costs")
    given = parser.parse_args()
    with library.use_isa(given.isa):
        library.set_num_threads(given.threads or library.num_threads())
        print(
            f"{library.active_isa()}, {library.num_threads()} threads, context {given.context}; yardstick: {YARDSTICK}"
        )
        ceiling = ceilings.measure(given.isa, library.num_threads())
        print(f"plain loops: {ceiling.read_bytes_per_s / 1e9:.0f} GB/s, {ceiling.multiply_adds_per_s / 1e9:.0f} GMAC/s")
        longest = max([*given.prefill, given.context])
        pages = max([longest // PAGE_SIZE + 1, *(rows * (given.context // PAGE_SIZE + 1) for rows in given.rows)])
        steps = Steps(pages, longest)
        for num_rows in given.rows:
            rows = decode_rows(num_rows, given.context)
            if given.neighbour:
                report_neighbour(steps, rows, given.repeats, ceiling)
            else:
                report(f"{num_rows} streams", steps, rows, given.repeats, ceiling)
        for length in given.prefill:
            report_prefill(steps, length, given.chunk, max(2, given.repeats // 5), ceiling)


if __name__ == "__main__":
    main()
