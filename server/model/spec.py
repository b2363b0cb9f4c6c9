"""What a model is, in numbers: everything that fixes its mathematics except the weights."""

import enum
import math
from dataclasses import dataclass

import torch

PAGE_SIZE_TOKENS = 16
"""Of mixers whose keys need no neighbour: a half-filled page wastes little, a channel of it is half a cache line."""


class RopeScalingKind(enum.StrEnum):
    """How rotation frequencies were stretched for longer contexts."""

    NONE = "none"
    LINEAR = "linear"
    """All frequencies divided by `factor`."""
    LLAMA3 = "llama3"
    """Slow rotations divided by `factor`, fast ones kept, a ramp between the two."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of a `RopeScalingKind`, by the names of published configurations."""

    kind: RopeScalingKind = RopeScalingKind.NONE
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return the stretched frequencies (radians a token, float64)."""
        match self.kind:
            case RopeScalingKind.NONE:
                return frequencies
            case RopeScalingKind.LINEAR:
                return frequencies / self.factor
            case RopeScalingKind.LLAMA3:
                turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
                kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
                kept = kept.clamp(0, 1)
                return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions."""

    theta: float
    """Base of the frequencies."""
    is_interleaved: bool
    """A pair is two neighbours (GGUF's Llama order); otherwise element i and i + D / 2 (Hugging Face)."""
    scaling: RopeScaling = RopeScaling()

    def frequencies(self, head_size: int) -> torch.Tensor:
        """Return radians a token for each pair, `[D / 2]` float64."""
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
        return self.scaling.apply(self.theta**-exponents)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention with grouped key/value heads (multi-head where the counts are equal)."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    has_bias: bool
    """Of q, k, v and the output."""
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer."""

    family: str
    vocabulary_size: int
    hidden_size: int
    num_layers: int
    context_length_tokens: int
    norm_epsilon: float
    attention: AttentionSpec
    ffn_size: int
    tie_embeddings: bool
    page_size_tokens: int = PAGE_SIZE_TOKENS
