"""Checks of what an op is given: they raise `ShapeError` with both values. Nothing is checked inside kernels."""

from typing import NoReturn

import torch
from torch import Tensor, dtype


class ShapeError(ValueError):
    """An op was given tensors that do not fit together, or that it has no kernel for."""


def require(
    condition: bool,  # noqa: FBT001 reads like an assertion
    what: str,
    seen: object,
    wanted: object,
    limit: object = "",
) -> None:
    """Raise `ShapeError` naming `what`, the value seen and the value wanted, unless the condition holds."""
    if not condition:
        refuse(what, seen, wanted, limit)


def refuse(what: str, seen: object, wanted: object, limit: object = "") -> NoReturn:
    """Raise `ShapeError` naming `what`, the value seen and the value wanted."""
    tail = f" {limit}" if limit != "" else ""
    raise ShapeError(f"{what}: got {seen}, want {wanted}{tail}")


def require_floats(name: str, tensor: Tensor) -> None:
    """Check for contiguous float32, of any shape, without the cost of a message."""
    if tensor.dtype is not torch.float32:
        refuse(f"{name}.dtype", tensor.dtype, torch.float32)
    if not tensor.is_contiguous():
        refuse(f"{name} in memory", "gaps or another order", "contiguous")


def require_tensor(name: str, tensor: Tensor, *, shape: tuple[int | None, ...], dtypes: tuple[dtype, ...]) -> None:
    """Check rank, sizes (None = any), dtype and contiguity of one tensor."""
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        want is None or want == have for have, want in zip(sizes, shape, strict=False)
    )
    if not fits:
        refuse(f"{name}.shape", sizes, shape)
    if tensor.dtype not in dtypes:
        refuse(f"{name}.dtype", tensor.dtype, dtypes)
    if not tensor.is_contiguous():
        refuse(f"{name} in memory", "gaps or another order", "contiguous")
