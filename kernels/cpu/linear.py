"""Faces of the C++ ops that read weights: packing, products, embedding; and the RMS norm.

Shapes: R rows, L selected rows, K inputs, N outputs.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.checks import refuse, require, require_floats
from kernels.cpu import library, packed, tape
from kernels.linear.weight import LinearWeight
from kernels.rms_norm.norm import Norm
from kernels.weights import EncodedMatrix, Encoding, check

ENCODING_NUMBERS = {encoding: number for number, encoding in enumerate(Encoding)}
"""The order of `Encoding` in `src/weight.h`."""

pack_call = struct.Struct("PPqPPdPP").pack
"""Packs `LinearCall` of `src/linear.cpp`."""
pack_embed = struct.Struct("PPqP").pack
"""Packs `EmbedCall` of `src/tape.cpp`."""
pack_indices = struct.Struct("Pqq").pack
"""Packs `IndicesCall` of `src/tape.cpp`."""


class _Part(ctypes.Structure):
    _fields_: ClassVar = [("blocks", ctypes.c_void_p), ("num_rows", ctypes.c_int64), ("encoding", ctypes.c_int64)]


class _Weight(ctypes.Structure):
    _fields_: ClassVar = [
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("num_parts", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedWeight(LinearWeight):
    """A matrix in blocks of 16 outputs, as `src/weight.h` lays them out."""

    blocks: tuple[Tensor, ...]
    """The bytes of each part."""
    descriptor: ctypes.Structure
    """What C++ reads; points into `blocks`, `parts` and the bias, which live as long as it."""
    parts: ctypes.Array[_Part]
    address: int
    """Of the descriptor."""

    def dequantised(self) -> Tensor:
        """Unpack all rows."""
        return embed(torch.arange(self.num_rows, dtype=torch.int32), self)


def pack(matrices: Sequence[EncodedMatrix], *, device: torch.device, bias: Tensor | None = None) -> LinearWeight:
    """See `kernels.linear.pack`."""
    require(device.type == "cpu", "device", device, "cpu")
    return _pack(matrices, bias=bias, is_gated=False)


def pack_gated(gate: EncodedMatrix, up: EncodedMatrix, *, device: torch.device) -> LinearWeight:
    """See `kernels.linear.pack_gated`."""
    require(device.type == "cpu", "device", device, "cpu")
    return _pack([gate, up], bias=None, is_gated=True)


def linear(
    x: Tensor,
    weight: LinearWeight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    select: Tensor | None = None,
) -> Tensor:
    """See `kernels.linear.linear`."""
    assert isinstance(weight, PackedWeight)
    require_floats("x", x)
    num_rows = x.size(0)
    if select is not None:
        num_rows = select.size(0)
        _check_select(select, x.size(0))
    if residual is not None:
        require_floats("residual", residual)
    out = tape.empty((num_rows, weight.num_rows))
    call = pack_call(
        weight.address,
        x.data_ptr(),
        num_rows,
        0 if select is None else select.data_ptr(),
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.epsilon,
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
    )
    tape.invoke("pathfox_linear", call)
    return out


def gated_linear(x: Tensor, weight: LinearWeight, *, norm: Norm | None = None) -> Tensor:
    """See `kernels.linear.gated_linear`."""
    assert isinstance(weight, PackedWeight)
    require_floats("x", x)
    num_rows = x.size(0)
    out = tape.empty((num_rows, weight.num_rows // 2))
    call = pack_call(
        weight.address,
        x.data_ptr(),
        num_rows,
        0,
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.epsilon,
        0,
        out.data_ptr(),
    )
    tape.invoke("pathfox_gated_linear", call)
    return out


def embed(token_ids: Tensor, weight: LinearWeight) -> Tensor:
    """See `kernels.embed.embed`."""
    assert isinstance(weight, PackedWeight)
    require(token_ids.is_contiguous(), "token_ids in memory", "gaps", "contiguous")
    num_rows = token_ids.size(0)
    out = tape.empty((num_rows, weight.num_columns))

    def complain(bad: int) -> NoReturn:
        refuse("token id", int(token_ids[bad]), "0 ..", weight.num_rows - 1)

    call = pack_embed(weight.address, token_ids.data_ptr(), num_rows, out.data_ptr())
    tape.invoke("pathfox_embed_rows", call, complain)
    return out


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """See `kernels.rms_norm.rms_norm`."""
    require_floats("x", x)
    out = torch.empty_like(x)
    library.load().pathfox_rms_norm(
        x.data_ptr(), x.size(0), x.size(1), norm.weight.data_ptr(), norm.epsilon, out.data_ptr()
    )
    return out


def _pack(matrices: Sequence[EncodedMatrix], *, bias: Tensor | None, is_gated: bool) -> PackedWeight:
    """Pack each matrix and describe them all."""
    blocks = [_blocks(matrix) for matrix in matrices]
    parts = (_Part * len(matrices))()
    for matrix, part, each in zip(matrices, parts, blocks, strict=True):
        part.blocks, part.num_rows, part.encoding = each.data_ptr(), matrix.num_rows, ENCODING_NUMBERS[matrix.encoding]
    num_rows = sum(each.num_rows for each in matrices)
    bias = None if bias is None else bias.contiguous()
    descriptor = _Weight(
        num_rows=num_rows,
        num_columns=matrices[0].num_columns,
        bias=None if bias is None else bias.data_ptr(),
        num_parts=len(matrices),
        parts=ctypes.addressof(parts),
    )
    return PackedWeight(
        num_rows=num_rows,
        num_columns=matrices[0].num_columns,
        num_bytes=sum(each.nbytes for each in blocks),
        backend=Backend.CPU,
        bias=bias,
        is_gated=is_gated,
        blocks=tuple(blocks),
        descriptor=descriptor,
        parts=parts,
        address=ctypes.addressof(descriptor),
    )


def _blocks(matrix: EncodedMatrix) -> Tensor:
    """Pack one matrix, or find it packed."""
    loaded = library.load()
    number, shape = ENCODING_NUMBERS[matrix.encoding], (matrix.num_rows, matrix.num_columns)

    def fill(to: Tensor) -> None:
        check(matrix)
        loaded.pathfox_pack(number, matrix.data.data_ptr(), *shape, to.data_ptr())

    key = f"{matrix.name}:{matrix.encoding}:{shape[0]}x{shape[1]}" if matrix.name else ""
    return packed.blocks(key, loaded.pathfox_packed_bytes(number, *shape), fill)


def _check_select(select: Tensor, num_rows: int) -> None:
    """Check that selected rows exist: C++ does not look."""
    require(select.dim() == 1 and select.is_contiguous(), "select", tuple(select.shape), "contiguous [L]")

    def complain(bad: int) -> NoReturn:
        refuse("selected rows", int(select[bad]), "0 ..", num_rows - 1)

    tape.invoke("pathfox_check_indices", pack_indices(select.data_ptr(), select.size(0), num_rows), complain)
