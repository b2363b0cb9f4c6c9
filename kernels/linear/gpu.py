# mypy: disallow-untyped-decorators=False
# (Triton ships no types.)
"""Matrix products in Triton; 4- and 8-bit weights stay quantised in memory and become numbers in registers.

Shapes: R rows, L selected rows, K inputs, N outputs, G = K / 32 blocks of a quantised row.
Law: one tile shape per kind of weight, whatever R is; K is summed in tiles, in order, by one program.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels import tiles
from kernels.backend import Backend
from kernels.checks import require
from kernels.linear.weight import LinearWeight
from kernels.rms_norm.norm import Norm
from kernels.weights import BLOCK, BLOCK_BYTES, DTYPES, EncodedMatrix, Encoding, check


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of a weight that are written in one way."""

    kind: str
    """A key of `tiles.LINEAR`."""
    values: Tensor
    """Numbers `[N, K]`; "q8": int8 `[N, K]`; "q4": uint8 `[N, K / 2]`, a block's low nibbles before its high ones."""
    scales: Tensor | None = None
    """Quantised: `[N, G]` float16; w = scale q + minimum."""
    minimums: Tensor | None = None
    """"q4": `[N, G]` float16."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what it keeps in memory."""
        return tuple(each for each in (self.values, self.scales, self.minimums) if each is not None)

    def dequantised(self) -> Tensor:
        """Return the numbers as `[N, K]` float32."""
        if self.scales is None:
            return self.values.float()
        blocks = self.values.view(*self.scales.shape, -1)
        if self.minimums is None:
            numbers = blocks.float() * self.scales.float()[..., None]
        else:
            nibbles = torch.cat([blocks & 15, blocks >> 4], dim=-1)
            numbers = nibbles.float() * self.scales.float()[..., None] + self.minimums.float()[..., None]
        return torch.flatten(numbers, 1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GpuWeight(LinearWeight):
    """A matrix in video memory: its parts, stacked along the outputs. Gated: gate over up, in one part or two."""

    parts: tuple[Part, ...]

    def dequantised(self) -> Tensor:
        """Return the numbers as a new `[N, K]` float32."""
        return torch.cat([part.dequantised() for part in self.parts])


def pack(matrices: Sequence[EncodedMatrix], *, device: torch.device, bias: Tensor | None = None) -> LinearWeight:
    """See `kernels.linear.pack`."""
    return _weight(_stack([_part(each, device) for each in matrices]), matrices, bias=bias, device=device)


def pack_gated(gate: EncodedMatrix, up: EncodedMatrix, *, device: torch.device) -> LinearWeight:
    """See `kernels.linear.pack_gated`."""
    return _weight(_stack([_part(gate, device), _part(up, device)]), (gate, up), is_gated=True, device=device)


def linear(
    x: Tensor,
    weight: LinearWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    select: Tensor | None = None,
) -> Tensor:
    """See `kernels.linear.linear`. The result has the dtype of `x`."""
    assert isinstance(weight, GpuWeight)
    num_rows = x.shape[0] if select is None else select.shape[0]
    y = x.new_empty(num_rows, weight.num_rows)
    first = 0
    for part in weight.parts:
        columns = slice(first, first + part.values.shape[0])
        _launch(
            x,
            part,
            y[:, columns],
            norm=norm,
            bias=None if weight.bias is None else weight.bias[columns],
            residual=None if residual is None else residual[:, columns],
            select=select,
        )
        first = columns.stop
    return y


def gated_linear(x: Tensor, weight: LinearWeight, *, norm: Norm | None = None) -> Tensor:
    """See `kernels.linear.gated_linear`. The result has the dtype of `x`."""
    assert isinstance(weight, GpuWeight)
    if len(weight.parts) == 1:
        y = x.new_empty(x.shape[0], weight.num_rows // 2)
        _launch(x, weight.parts[0], y, norm=norm, is_gated=True)
        return y
    gate, up = linear(x, weight, norm=norm).chunk(2, dim=1)
    return functional.silu(gate) * up


def _launch(
    x: Tensor,
    part: Part,
    y: Tensor,
    *,
    norm: Norm | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    select: Tensor | None = None,
    is_gated: bool = False,
) -> None:
    """Fill `y`, which may be some columns of a wider result; `residual` then is the same columns of a wider one."""
    tile = tiles.LINEAR["float32" if x.dtype is torch.float32 else part.kind]
    num_rows, num_outputs = y.shape
    require(max(x.numel(), num_rows * y.stride(0)) < 2**31, "numbers of a tensor", x.numel(), "less than", 2**31)
    grid = (triton.cdiv(num_rows, tile.num_rows), triton.cdiv(num_outputs, tile.num_outputs))
    _linear_kernel[grid](
        x,
        select,
        None if norm is None else norm.weight,
        part.values,
        part.scales,
        part.minimums,
        bias,
        residual,
        y,
        num_rows,
        num_outputs,
        x.shape[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        0.0 if norm is None else norm.epsilon,
        KIND=part.kind,
        IS_GATED=is_gated,
        HAS_SELECT=select is not None,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_R=tile.num_rows,
        BLOCK_N=tile.num_outputs,
        BLOCK_K=tile.num_inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=tiles.MAY_FUSE,
    )


def _part(matrix: EncodedMatrix, device: torch.device) -> Part:
    """Bring one matrix to the device; a quantised one's scales go to a tensor of their own, so that loads align."""
    check(matrix)
    data = matrix.data.to(device)
    if matrix.encoding in DTYPES:
        return Part("float32" if matrix.encoding is Encoding.F32 else "half", data)
    num_blocks = matrix.num_columns // BLOCK
    blocks = data.view(matrix.num_rows, num_blocks, BLOCK_BYTES[matrix.encoding])
    scales = _halves(blocks[..., 0:2])
    match matrix.encoding:
        case Encoding.Q4_0:
            return Part("q4", blocks[..., 2:].flatten(1), scales, scales * -8)
        case Encoding.Q4_1:
            return Part("q4", blocks[..., 4:].flatten(1), scales, _halves(blocks[..., 2:4]))
        case _:
            return Part("q8", blocks[..., 2:].flatten(1).view(torch.int8), scales)


def _halves(pairs: Tensor) -> Tensor:
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _stack(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join neighbours that are written in one way, so that one launch serves them."""
    groups = itertools.groupby(parts, key=lambda part: (part.kind, part.values.dtype))
    return tuple(_join(list(group)) for _, group in groups)


def _join(parts: Sequence[Part]) -> Part:
    def cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Part(
        parts[0].kind,
        torch.cat([part.values for part in parts]),
        cat([part.scales for part in parts]),
        cat([part.minimums for part in parts]),
    )


def _weight(
    parts: tuple[Part, ...],
    matrices: Sequence[EncodedMatrix],
    *,
    device: torch.device,
    bias: Tensor | None = None,
    is_gated: bool = False,
) -> GpuWeight:
    return GpuWeight(
        num_rows=sum(each.num_rows for each in matrices),
        num_columns=matrices[0].num_columns,
        num_bytes=sum(tensor.nbytes for part in parts for tensor in part.tensors()),
        backend=Backend.GPU,
        bias=None if bias is None else bias.to(device),
        is_gated=is_gated,
        parts=parts,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr: tl.tensor,
    select_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    value_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    y_stride: tl.tensor,
    epsilon: tl.tensor,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_SELECT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program makes one tile [BLOCK_R, BLOCK_N] of the result. Rows run fastest: neighbours share a weight tile."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = r < num_rows
    is_output = n < num_outputs
    source = r
    if HAS_SELECT:
        source = tl.load(select_ptr + r, mask=is_row, other=0)
    x_rows = x_ptr + source * x_stride

    factor = tl.full([BLOCK_R], 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_x = is_row[:, None] & (k < num_inputs)[None, :]
            x = tl.load(x_rows[:, None] + k[None, :], mask=is_x, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        factor = 1.0 / tl.sqrt(squares / num_inputs + epsilon)

    y = _multiply(
        x_rows, is_row, factor, norm_ptr, value_ptr, scale_ptr, minimum_ptr, first, is_output, num_inputs,
        KIND, HAS_NORM, BLOCK_R, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if IS_GATED:  # the rows of `up` stand below those of `gate`
        up = _multiply(
            x_rows, is_row, factor, norm_ptr, value_ptr, scale_ptr, minimum_ptr, first + num_outputs, is_output,
            num_inputs, KIND, HAS_NORM, BLOCK_R, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = y / (1.0 + tl.exp(-y)) * up

    is_y = is_row[:, None] & is_output[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=is_output, other=0.0)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + r[:, None] * residual_stride + n[None, :], mask=is_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + r[:, None] * y_stride + n[None, :], y.to(y_ptr.dtype.element_ty), mask=is_y)


@triton.jit
def _multiply(
    x_rows: tl.tensor,  # [BLOCK_R] pointers
    is_row: tl.tensor,
    factor: tl.tensor,  # [BLOCK_R] of the norm
    norm_ptr: tl.tensor,
    value_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    first: tl.tensor,  # row of the weight where the tile begins
    is_output: tl.tensor,
    num_inputs: tl.tensor,
    KIND: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Sum over K in tiles, in order."""
    y = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    n = tl.arange(0, BLOCK_N)
    if KIND == "q4":
        value_ptr += first * (num_inputs // 2)
        minimum_ptr += first * (num_inputs // 32)
    else:
        value_ptr += first * num_inputs
    if KIND != "half" and KIND != "float32":  # noqa: PLR1714 Triton compiles no `in`
        scale_ptr += first * (num_inputs // 32)
    dtype: tl.constexpr = x_rows.dtype.element_ty
    for start in range(0, num_inputs, BLOCK_K):
        if KIND == "q4":
            # A byte holds columns j and j + 16 of its block: one product for all low nibbles, one for all high ones.
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            k = byte // 16 * 32 + byte % 16
            is_weight = is_output[None, :] & (k < num_inputs)[:, None]
            packed = tl.load(value_ptr + n[None, :] * (num_inputs // 2) + byte[:, None], mask=is_weight, other=0)
            block = n[None, :] * (num_inputs // 32) + (byte // 16)[:, None]
            scale = tl.load(scale_ptr + block, mask=is_weight, other=0.0).to(tl.float32)
            minimum = tl.load(minimum_ptr + block, mask=is_weight, other=0.0).to(tl.float32)
            low = ((packed & 15).to(tl.float32) * scale + minimum).to(dtype)
            high = ((packed >> 4).to(tl.float32) * scale + minimum).to(dtype)
            x = _load_x(x_rows, is_row, factor, norm_ptr, k, num_inputs, HAS_NORM)
            y = tl.dot(x, low, y, input_precision="ieee")
            x = _load_x(x_rows, is_row, factor, norm_ptr, k + 16, num_inputs, HAS_NORM)
            y = tl.dot(x, high, y, input_precision="ieee")
        else:
            k = start + tl.arange(0, BLOCK_K)
            is_weight = is_output[None, :] & (k < num_inputs)[:, None]
            weight = tl.load(value_ptr + n[None, :] * num_inputs + k[:, None], mask=is_weight, other=0)
            if KIND == "q8":
                block = n[None, :] * (num_inputs // 32) + (k // 32)[:, None]
                scale = tl.load(scale_ptr + block, mask=is_weight, other=0.0).to(tl.float32)
                weight = weight.to(tl.float32) * scale
            x = _load_x(x_rows, is_row, factor, norm_ptr, k, num_inputs, HAS_NORM)
            y = tl.dot(x, weight.to(dtype), y, input_precision="ieee")
    return y


@triton.jit
def _load_x(
    x_rows: tl.tensor,
    is_row: tl.tensor,
    factor: tl.tensor,
    norm_ptr: tl.tensor,
    k: tl.tensor,
    num_inputs: tl.tensor,
    HAS_NORM: tl.constexpr,
) -> tl.tensor:
    """Load columns k of the rows, normed, in the dtype of x."""
    is_column = k < num_inputs
    x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
    if HAS_NORM:
        weight = tl.load(norm_ptr + k, mask=is_column, other=0.0)
        x = (x.to(tl.float32) * factor[:, None] * weight[None, :]).to(x.dtype)
    return x
