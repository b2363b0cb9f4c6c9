"""Weights from a Hugging Face folder: one *.safetensors file, or shards with an index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.weights import EncodedMatrix, Encoding
from server.errors import ModelLoadError

INDEX = "model.safetensors.index.json"
ENCODINGS: Mapping[torch.dtype, Encoding] = {
    torch.float32: Encoding.F32,
    torch.float16: Encoding.F16,
    torch.bfloat16: Encoding.BF16,
}


class Shard(Protocol):
    """An open safetensors file, as far as it is used here."""

    def keys(self) -> list[str]:
        """Return the names of its tensors."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        ...

    def get_slice(self, name: str) -> "ShapeOnly":
        """Open a tensor without reading it."""
        ...


class ShapeOnly(Protocol):
    """A tensor that has not been read."""

    def get_shape(self) -> list[int]:
        """Return its shape."""
        ...


@dataclass(frozen=True)
class SafetensorsFolder:
    """A `WeightFile` over the shards of a folder, each mapped into memory."""

    path: Path
    shards: Mapping[Path, Shard]
    files: Mapping[str, Path]
    """Which shard holds which tensor."""

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFolder":
        """Open all shards of a folder.

        Raises:
            ModelLoadError: There are none, one that the index names is missing, or one is not a whole safetensors file.
        """
        index = _read_index(path)
        names = sorted(set(index.values())) if index else sorted(each.name for each in path.glob("*.safetensors"))
        if not names:
            raise ModelLoadError(str(path), "no *.safetensors in this folder")
        shards = {path / name: _open_shard(path / name) for name in names}
        files = {tensor: file for file, shard in shards.items() for tensor in shard.keys()}  # noqa: SIM118 - no mapping
        lost = sorted(name for name in index if name not in files)
        if lost:
            raise ModelLoadError(str(path / index[lost[0]]), f"tensor {lost[0]}: the index says it is here, it is not")
        return cls(path, shards, files)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `WeightFile`."""
        return {name: tuple(self.shards[file].get_slice(name).get_shape()) for name, file in self.files.items()}

    def matrix(self, name: str) -> EncodedMatrix:
        """See `WeightFile`."""
        data = self._read(name)
        return EncodedMatrix(ENCODINGS[data.dtype], data.shape[0], data.shape[1], data, name)

    def vector(self, name: str) -> Tensor:
        """See `WeightFile`."""
        return self._read(name).float().clone()

    def _read(self, name: str) -> Tensor:
        data: Tensor = self.shards[self.files[name]].get_tensor(name)
        if data.dtype not in ENCODINGS:
            seen = str(data.dtype).removeprefix("torch.")
            raise ModelLoadError(
                str(self.files[name]), f"tensor {name}: got type {seen}, want float32, float16 or bfloat16"
            )
        return data.contiguous()


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Raises:
        ModelLoadError: It cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(str(path), error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(str(path), f"not JSON: {error}".splitlines()[0]) from error
    if not isinstance(value, dict):
        raise ModelLoadError(str(path), f"got a JSON {type(value).__name__}, want an object")
    return value


def _read_index(path: Path) -> dict[str, str]:
    if not (path / INDEX).exists():
        return {}
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(str(path / INDEX), "weight_map: missing or not an object")
    for name, file in weight_map.items():
        # A name, not a path: an index must not reach outside its folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelLoadError(
                str(path / INDEX), f"weight_map.{name}: got {file!r}, want the name of a file beside it"
            )
    return weight_map


def _open_shard(path: Path) -> Shard:
    if not path.is_file():
        raise ModelLoadError(str(path), "this shard is missing")
    try:
        shard: Shard = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(str(path), f"not a whole safetensors file: {error}".splitlines()[0]) from error
    return shard
