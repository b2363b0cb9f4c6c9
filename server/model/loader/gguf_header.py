"""The head of a GGUF file: metadata, and where each tensor lies. Reads bytes that nobody has vouched for.

Every length is checked against what is left of the file before anything is read or allocated, so a corrupt file costs
no more time or memory than its own size. (`gguf.GGUFReader` checks none, and takes 1.6 s for the vocabulary of SmolLM2
where this takes 0.06 s; the package still gives the tables of types and undoes quantisation.)

Source: the GGUF specification, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NESTING = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20


class GgufError(ValueError):
    """The bytes are not a GGUF file that this reader knows; the message is one line."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is written."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Outputs before inputs: the reverse of the file's order."""
    offset: int
    """From the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that a GGUF file says of itself."""

    metadata: dict[str, object]
    """Numbers, booleans, strings, and lists of them."""
    tensors: dict[str, TensorInfo]


def read_header(data: mmap.mmap) -> GgufHeader:
    """Read the head of a mapped file and check that all its tensors lie within it.

    Raises:
        GgufError: It is no GGUF file, of another version, truncated or corrupt.
    """
    cursor = _Cursor(data)
    if cursor.take(4, "the magic") != MAGIC:
        raise GgufError("not a GGUF file")
    version = cursor.number(_U32)
    if version not in VERSIONS:
        raise GgufError(f"GGUF version: got {version}, want {' or '.join(map(str, VERSIONS))}, little-endian")
    num_tensors, num_values = cursor.number(_U64), cursor.number(_U64)
    metadata: dict[str, object] = {}
    for _ in range(cursor.bounded(num_values, 8 + 4 + 1, "metadata count")):
        key = cursor.text()
        if key in metadata:
            raise GgufError(f"metadata {key}: stands twice")
        metadata[key] = _read_value(cursor, cursor.number(_U32), key)
    infos = [_read_tensor_info(cursor) for _ in range(cursor.bounded(num_tensors, 8 + 4 + 8 + 4 + 8, "tensor count"))]
    return GgufHeader(metadata, _place(infos, cursor.position, len(data), _alignment(metadata)))


@dataclass(slots=True)
class _Cursor:
    data: mmap.mmap
    position: int = 0

    def take(self, size: int, what: str) -> bytes:
        start = self.position
        self.position = start + self.bounded(size, 1, what)
        return self.data[start : self.position]

    def number(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self.take(layout.size, "a number"))[0])

    def text(self) -> str:
        data = self.take(self.number(_U64), "a string")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise GgufError(f"corrupt: a string at byte {self.position - len(data)} is not UTF-8") from error

    def bounded(self, count: int, smallest: int, what: str) -> int:
        """Return a count of things of at least so many bytes, if what is left of the file can hold them."""
        left = len(self.data) - self.position
        if count * smallest > left:
            raise GgufError(
                f"truncated or corrupt: {what} at byte {self.position} asks for {count}, {left} bytes are left"
            )
        return count


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_SCALARS: dict[int, np.dtype[np.generic]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}


def _read_value(cursor: _Cursor, kind: int, key: str, nesting: int = 0) -> object:
    if kind == GGUFValueType.STRING:
        return cursor.text()
    if kind in _SCALARS:
        return np.frombuffer(cursor.take(_SCALARS[kind].itemsize, key), _SCALARS[kind])[0].item()
    if kind == GGUFValueType.ARRAY and nesting < MAX_NESTING:
        return _read_array(cursor, key, nesting)
    raise GgufError(f"corrupt: metadata {key} has the unknown type {kind}")


def _read_array(cursor: _Cursor, key: str, nesting: int) -> list[object]:
    kind, count = cursor.number(_U32), cursor.number(_U64)
    if kind in _SCALARS:
        size = _SCALARS[kind].itemsize
        data = cursor.take(cursor.bounded(count, size, key) * size, key)
        return list(np.frombuffer(data, _SCALARS[kind]).tolist())
    read: Callable[[], object]
    if kind == GGUFValueType.STRING:
        read, smallest = cursor.text, 8
    else:
        read, smallest = (lambda: _read_value(cursor, kind, key, nesting + 1)), 12
    return [read() for _ in range(cursor.bounded(count, smallest, key))]


def _read_tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    name = cursor.text()
    num_dimensions = cursor.number(_U32)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise GgufError(f"corrupt: tensor {name} has {num_dimensions} dimensions")
    shape = tuple(reversed([cursor.number(_U64) for _ in range(num_dimensions)]))
    code, offset = cursor.number(_U32), cursor.number(_U64)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise GgufError(f"tensor {name}: unknown type {code}") from error
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block_size:
        raise GgufError(
            f"corrupt: tensor {name} has shape {shape}, want a multiple of {block_size} inputs for {kind.name}"
        )
    return name, TensorInfo(kind, shape, offset, math.prod(shape) // block_size * block_bytes)


def _alignment(metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and 8 <= alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not isinstance(alignment, int) or not is_power:
        raise GgufError(f"general.alignment: got {alignment!r}, want a power of two")
    return alignment


def _place(infos: list[tuple[str, TensorInfo]], position: int, file_size: int, alignment: int) -> dict[str, TensorInfo]:
    start = -(-position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, info in infos:
        if name in tensors:
            raise GgufError(f"tensor {name}: stands twice")
        if info.offset % alignment:
            raise GgufError(f"corrupt: tensor {name} at offset {info.offset}, want a multiple of {alignment}")
        end = start + info.offset + info.num_bytes
        if end > file_size:
            raise GgufError(f"truncated: tensor {name} ends at byte {end}, the file at {file_size}")
        tensors[name] = TensorInfo(info.kind, info.shape, start + info.offset, info.num_bytes)
    return tensors
