"""What a family reads of a model's files: named facts and named weights. Loaders implement it once per file format."""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kernels.weights import EncodedMatrix
from server.errors import ModelLoadError


class Layout(enum.StrEnum):
    """Whose names and whose order of channels a checkpoint has."""

    HUGGING_FACE = "hugging_face"
    GGUF = "gguf"


class Facts:
    """The configuration of a model, typed on access; whatever is wrong is refused by the key's name."""

    def __init__(self, path: Path, values: Mapping[str, object], *, prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Return whether the key is there and not null."""
        return self._values.get(self._prefix + key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a positive number")
        return float(value)

    def share(self, key: str, default: float) -> float:
        """Return a finite number that is not negative; whole numbers stay whole."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise self.wrong(key, "a number, not negative")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def section(self, key: str) -> "Facts":
        """Return the facts of a nested object; those of an empty one where the key is absent or null."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Facts(self.path, {f"{key}.{name}": each for name, each in value.items()}, prefix=f"{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one token id or a list of them as a tuple; empty where the key is absent or null."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def require(self, key: str, *, one_of: Sequence[object] = ()) -> None:
        """Refuse a key whose value asks for mathematics that is not there; absent and null are always fine."""
        if self.has(key) and self._values[self._prefix + key] not in one_of:
            raise self.wrong(key, " or ".join(map(repr, one_of)) if one_of else "absent")

    def wrong(self, key: str, wanted: str) -> ModelLoadError:
        """Make the error that names a key, the value seen and what would be right."""
        seen = self._values.get(self._prefix + key)
        shown = "nothing" if seen is None else repr(seen)[:80]
        return ModelLoadError(str(self.path), f"{self._prefix}{key}: got {shown}, want {wanted}")

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(self._prefix + key)
        return default if value is None else value


class WeightFile(Protocol):
    """The tensors of one model, in one file format. Nothing is read before it is asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name; outputs before inputs."""
        ...

    def matrix(self, name: str) -> EncodedMatrix:
        """Read a tensor of two dimensions, encoded as the file has it."""
        ...

    def vector(self, name: str) -> Tensor:
        """Read a tensor of one dimension as float32."""
        ...


Progress = Callable[[int, int], None]
"""Called with (weights read, weights in all)."""


class Checkpoint:
    """A model's files as a family reads them: every tensor checked, counted and ticked off."""

    def __init__(
        self, path: Path, layout: Layout, facts: Facts, weights: WeightFile, progress: Progress | None = None
    ) -> None:
        self.path = path
        self.layout = layout
        self.facts = facts
        self._weights = weights
        self._shapes = weights.shapes
        self._num_weights = sum(map(math.prod, self._shapes.values()))
        self._progress = progress
        self._read: set[str] = set()
        self.num_parameters = 0
        """How many weights have been read, each once."""

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._shapes

    def num_rows(self, name: str) -> int:
        """Return the first dimension of a tensor, for facts that a format leaves to its shapes."""
        self._require(name)
        return self._shapes[name][0]

    def matrix(self, name: str, num_rows: int, num_columns: int) -> EncodedMatrix:
        """Read a matrix as the file encodes it.

        Raises:
            ModelLoadError: It is missing, of another shape, or of a type that nothing here can read.
        """
        self._take(name, (num_rows, num_columns))
        return self._weights.matrix(name)

    def vector(self, name: str, size: int) -> Tensor:
        """Read a vector as float32. Raises as `matrix` does."""
        self._take(name, (size,))
        return self._weights.vector(name)

    def require_all_read(self, ignored: tuple[str, ...] = ()) -> None:
        """Refuse tensors that the family did not ask for: a model is not what it seems to be if some are left over.

        Args:
            ignored: Patterns (fnmatch) of names that carry nothing.
        """
        left = [name for name in self._shapes if name not in self._read]
        unknown = sorted(name for name in left if not any(fnmatch(name, pattern) for pattern in ignored))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ModelLoadError(str(self.path), f"tensor {unknown[0]}{more}: unknown to this family of models")

    def _require(self, name: str) -> None:
        if not self.has(name):
            raise ModelLoadError(str(self.path), f"tensor {name}: missing")

    def _take(self, name: str, wanted: tuple[int, ...]) -> None:
        self._require(name)
        seen = self._shapes[name]
        if seen != wanted:
            raise ModelLoadError(str(self.path), f"tensor {name}: got shape {seen}, want {wanted}")
        if name not in self._read:
            self._read.add(name)
            self.num_parameters += math.prod(seen)
        if self._progress is not None:
            self._progress(self.num_parameters, self._num_weights)
