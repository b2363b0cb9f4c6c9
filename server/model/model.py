"""A loaded model: from rows to logits. Composes ops of `kernels`; knows nothing of requests, files or sampling.

R rows, L logit rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import Backend, use_backend
from kernels.embed import embed
from kernels.linear import LinearWeight, linear
from kernels.rms_norm import Norm
from server.model.ffn import FeedForward
from server.model.memory import Field, LayerMemory
from server.model.mixers import ClosingPages, Mixer
from server.model.rows import Rows
from server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """One block: mix along the sequence, then change each row by itself."""

    mixer: Mixer
    ffn: FeedForward


class Network(NamedTuple):
    """What a family builds: the weights, packed for one backend."""

    embedding: LinearWeight
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: LinearWeight
    """The same object as `embedding` where they are tied."""


@dataclass(frozen=True)
class Model:
    """A network with its spec, and the facts that a server needs of both. Immutable: any thread may run it."""

    spec: ModelSpec
    network: Network
    device: torch.device
    num_parameters: int
    weights_digest: bytes
    """Of the files' contents."""
    eos_token_ids: tuple[int, ...]
    """End a turn."""
    generation_defaults: Mapping[str, float]
    """temperature, top_p, top_k, min_p, repetition_penalty: all five, resolved."""

    def forward(self, rows: Rows, memory: Sequence[LayerMemory]) -> Tensor:
        """Advance the rows' sequences and return logits `[L, V]` float32.

        Writes the rows' entries into `memory` (one per layer). The bits of a row depend on its sequence up to it only.
        """
        with use_backend(self.backend):
            x = embed(rows.token_ids, self.network.embedding)
            for layer, layer_memory in zip(self.layers, memory, strict=True):
                x = layer.mixer.forward(x, rows, layer_memory)
                x = layer.ffn.forward(x)
            return linear(x, self.network.head, norm=self.network.final_norm, select=rows.logit_rows).float()

    def close(self, memory: Sequence[LayerMemory], pages: ClosingPages) -> None:
        """Turn open pages into closed ones in every layer."""
        with use_backend(self.backend):
            for layer, layer_memory in zip(self.layers, memory, strict=True):
                layer.mixer.close(layer_memory, pages)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Return the layers in the order of computation."""
        return self.network.layers

    @property
    def backend(self) -> Backend:
        """Return the implementation that the weights are packed for, and that `forward` runs on."""
        return self.network.embedding.backend

    @property
    def is_row_invariant(self) -> bool:
        """Return whether the prefix law holds on this backend."""
        return self.backend is not Backend.REFERENCE

    @property
    def mixer_kinds(self) -> tuple[str, ...]:
        """Return the kinds of mixers, each once, in the order of the layers."""
        return tuple(dict.fromkeys(layer.mixer.kind for layer in self.layers))

    @cached_property
    def page_fields(self) -> tuple[tuple[Field, ...], ...]:
        """Return what a closed page holds, per layer."""
        return tuple(layer.mixer.page_fields for layer in self.layers)

    @cached_property
    def tail_fields(self) -> tuple[tuple[Field, ...], ...]:
        """Return what an open page keeps outside the pool, per layer."""
        return tuple(layer.mixer.tail_fields for layer in self.layers)

    @cached_property
    def page_bytes(self) -> int:
        """Return the size of a page over all layers."""
        return sum(field.num_bytes for fields in self.page_fields for field in fields)
