"""Compiles what the ops launch on a GPU, for real targets, without one.

The interpreter runs Python and forgives what Triton's compiler does not (a type that changes in a loop, a tile too
large for shared memory). Here a launch is replaced by the compilation that it would cause.
"""

import importlib.util
import pathlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.embed import embed
from kernels.linear import gated_linear, linear, pack, pack_gated
from kernels.paged_attention import paged_attention
from kernels.placement import RowPlacement
from kernels.rms_norm import Norm, rms_norm
from kernels.rope import RopeTable, rotate_and_store
from kernels.sample import SamplingRow, SamplingRows, sample
from kernels.weights import BLOCK, BLOCK_BYTES, DTYPES, EncodedMatrix, Encoding

HIDDEN, HEAD_DIM, NUM_HEADS, NUM_GROUPS = 576, 64, 9, 3
CPU = torch.device("cpu")
SHARED_MEMORY_BYTES = {80: 163 << 10, 90: 227 << 10}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

Target = tuple[int, list[str]]


@pytest.fixture(params=[90, pytest.param(80, marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Target:
    """A compute capability, and the names of the kernels that were compiled for it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    compiler = importlib.import_module("triton.compiler")  # here, because Triton is optional
    backends = importlib.import_module("triton.backends.compiler")
    jit = importlib.import_module("triton.runtime.jit")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    capability: int = request.param
    compiled: list[str] = []

    def compile_launch(kernel: jit.JITFunction, *args: object, **keywords: object) -> None:  # type: ignore[name-defined]
        values = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            is_constant = parameter.is_constexpr or value is None
            signature[parameter.name] = "constexpr" if is_constant else type_of(value)
            if is_constant:
                constants[place,] = value
            elif isinstance(value, Tensor) or (not parameter.do_not_specialize and value % 16 == 0):
                attributes[place,] = [["tt.divisibility", 16]]
        result = compiler.compile(
            compiler.ASTSource(kernel, signature, constants, attributes),
            target=backends.GPUTarget("cuda", capability, 32),
            options={name: keywords[name] for name in OPTIONS if name in keywords},
        )
        assert result.metadata.shared <= SHARED_MEMORY_BYTES[capability]
        assert not result.metadata.enable_fp_fusion
        compiled.append(kernel.__name__)

    monkeypatch.setattr(jit.JITFunction, "run", compile_launch)
    return capability, compiled


def type_of(value: object) -> str:
    """Name a value's type as Triton does."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def matrix_of(encoding: Encoding, num_rows: int, num_columns: int) -> EncodedMatrix:
    """Make a matrix of zeros."""
    if encoding in DTYPES:
        return EncodedMatrix(
            encoding, num_rows, num_columns, torch.zeros(num_rows, num_columns, dtype=DTYPES[encoding])
        )
    data = torch.zeros(num_rows, num_columns // BLOCK * BLOCK_BYTES[encoding], dtype=torch.uint8)
    return EncodedMatrix(encoding, num_rows, num_columns, data)


def products(encoding: Encoding, dtype: torch.dtype) -> None:
    """Launch the products of a layer."""
    x = torch.zeros(3, HIDDEN, dtype=dtype)
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    weight = pack([matrix_of(encoding, HIDDEN, HIDDEN)], device=CPU, bias=torch.zeros(HIDDEN))
    linear(x, weight, norm=norm, select=torch.zeros(2, dtype=torch.int32))
    linear(x, weight, residual=x)
    gated = matrix_of(encoding, 2 * HIDDEN, HIDDEN)
    gated_linear(x, pack_gated(gated, gated, device=CPU), norm=norm)


def attention(dtype: torch.dtype, *, is_interleaved: bool) -> None:
    """Launch the rotation and the attention of a layer."""
    rows = RowPlacement(*(torch.zeros(3, dtype=torch.int32) for _ in range(2)), torch.zeros(2, 64, dtype=torch.int32))
    key_pages = torch.zeros(4, NUM_GROUPS, HEAD_DIM, 16, dtype=torch.float16)
    value_pages = torch.zeros(4, NUM_GROUPS, 16, HEAD_DIM, dtype=torch.float16)
    table = RopeTable(torch.ones(8, HEAD_DIM // 2), torch.zeros(8, HEAD_DIM // 2), is_interleaved)
    qkv = torch.zeros(3, (NUM_HEADS + 2 * NUM_GROUPS) * HEAD_DIM, dtype=dtype)
    query = rotate_and_store(qkv, rows, table, key_pages, value_pages)
    paged_attention(query, key_pages, value_pages, rows, scale=0.125)


CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    **{
        f"products {encoding} {dtype}": (lambda e=encoding, d=dtype: products(e, d), ["_linear_kernel"] * 3)
        for encoding, dtype in [
            (Encoding.BF16, torch.bfloat16),
            (Encoding.F16, torch.float16),
            (Encoding.F32, torch.float32),
            (Encoding.Q4_0, torch.bfloat16),
            (Encoding.Q4_1, torch.float16),
            (Encoding.Q8_0, torch.bfloat16),
        ]
    },
    **{
        f"attention {dtype} {is_interleaved}": (
            lambda d=dtype, i=is_interleaved: attention(d, is_interleaved=i),
            ["_rotate_and_store_kernel", "_attention_kernel", "_join_kernel"],
        )
        for dtype, is_interleaved in [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)]
    },
    **{
        f"embed {encoding}": (
            lambda e=encoding: embed(torch.zeros(2, dtype=torch.int32), pack([matrix_of(e, 32, HIDDEN)], device=CPU)),
            ["_embed_kernel"],
        )
        for encoding in (Encoding.BF16, Encoding.Q4_1, Encoding.Q8_0)
    },
    "rms_norm": (
        lambda: rms_norm(torch.zeros(2, HIDDEN, dtype=torch.bfloat16), Norm(torch.ones(HIDDEN), 1e-5)),
        ["_rms_norm_kernel"],
    ),
    "sample": (
        lambda: sample(torch.zeros(2, 49152), SamplingRows.stack([SamplingRow(temperature=0.0)] * 2)),
        ["_argmax_kernel"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(target: Target, case: str) -> None:
    """Every launch of a Llama step compiles, within shared memory, and without fused multiply-adds."""
    launch, expected = CASES[case]

    with use_backend(Backend.GPU):
        launch()

    assert target[1] == expected
