"""Weights and facts from a GGUF file, mapped into memory.

Q4_0, Q4_1, Q8_0, F16, BF16 and F32 matrices go on as they are. Every other type that the `gguf` package can undo
(K-quants, Q5, IQ ...) becomes bf16, a slab of rows at a time.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from kernels.weights import EncodedMatrix, Encoding
from server.errors import ModelLoadError
from server.model.loader.gguf_header import GgufError, GgufHeader, TensorInfo, read_header

FLOATS: Mapping[GGMLQuantizationType, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
ENCODINGS: Mapping[GGMLQuantizationType, Encoding] = {
    GGMLQuantizationType.F32: Encoding.F32,
    GGMLQuantizationType.F16: Encoding.F16,
    GGMLQuantizationType.BF16: Encoding.BF16,
    GGMLQuantizationType.Q4_0: Encoding.Q4_0,
    GGMLQuantizationType.Q4_1: Encoding.Q4_1,
    GGMLQuantizationType.Q8_0: Encoding.Q8_0,
}
SLAB_WEIGHTS = 1 << 22
"""Weights that are float32 at one time while a matrix becomes bf16."""


@dataclass(frozen=True)
class GgufFile:
    """A `WeightFile` over a mapped GGUF file. The mapping lives as long as a tensor that shares it."""

    path: Path
    header: GgufHeader
    data: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Map a file and read its head.

        Raises:
            ModelLoadError: It cannot be read, or is not a whole GGUF file.
        """
        try:
            with path.open("rb") as file:
                # Copy-on-write, because torch has no read-only tensors; nobody writes.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return cls(path, read_header(data), data)
        except GgufError as error:
            raise ModelLoadError(str(path), str(error)) from error
        except ValueError as error:
            raise ModelLoadError(str(path), "not a GGUF file: it is empty") from error
        except OSError as error:
            raise ModelLoadError(str(path), error.strerror or str(error)) from error

    @property
    def metadata(self) -> Mapping[str, object]:
        """Return the file's key/value pairs."""
        return self.header.metadata

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightFile`."""
        return {name: info.shape for name, info in self.header.tensors.items()}

    def matrix(self, name: str) -> EncodedMatrix:
        """See `WeightFile`."""
        info = self.header.tensors[name]
        num_rows, num_columns = info.shape
        data = self._bytes(info)
        if info.kind in FLOATS:
            data = data.view(FLOATS[info.kind]).view(info.shape)
            return EncodedMatrix(ENCODINGS[info.kind], num_rows, num_columns, data, name)
        if info.kind in ENCODINGS:
            return EncodedMatrix(ENCODINGS[info.kind], num_rows, num_columns, data.view(num_rows, -1), name)
        return EncodedMatrix(Encoding.BF16, num_rows, num_columns, partial(self._as_bf16, name, info), name)

    def vector(self, name: str) -> Tensor:
        """See `WeightFile`."""
        info = self.header.tensors[name]
        if info.kind not in FLOATS:
            raise ModelLoadError(str(self.path), f"tensor {name}: got type {info.kind.name}, want F32, F16 or BF16")
        return self._bytes(info).view(FLOATS[info.kind]).float().clone()

    def _bytes(self, info: TensorInfo) -> Tensor:
        return torch.frombuffer(self.data, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)

    def _as_bf16(self, name: str, info: TensorInfo) -> Tensor:
        num_rows, num_columns = info.shape
        encoded = self._bytes(info).view(num_rows, -1).numpy()
        result = torch.empty(info.shape, dtype=torch.bfloat16)
        slab = max(1, SLAB_WEIGHTS // num_columns)
        for start in range(0, num_rows, slab):
            result[start : start + slab] = torch.from_numpy(
                self._dequantise(name, encoded[start : start + slab], info.kind)
            )
        return result

    def _dequantise(
        self, name: str, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], kind: GGMLQuantizationType
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        try:
            return np.asarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
        except NotImplementedError as error:
            raise ModelLoadError(str(self.path), f"tensor {name}: nothing here reads type {kind.name}") from error
