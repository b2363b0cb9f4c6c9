"""What a family of models is: the seam between a checkpoint and a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from server.model.checkpoint import Checkpoint, Layout
from server.model.model import Network
from server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one family are read."""

    name: str
    """In the public contract."""
    architectures: Mapping[Layout, str]
    """What the family's checkpoints call themselves, per layout."""
    read_spec: Callable[[Checkpoint], ModelSpec]
    """Read the configuration; refuse, by the key's name, what would change the mathematics."""
    build: Callable[[ModelSpec, Checkpoint, torch.device], Network]
    """Read and pack all weights; refuse tensors that are left over."""
