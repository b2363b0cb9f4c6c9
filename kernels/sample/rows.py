"""What the sampler is told about each row, and what it answers: structs of arrays.

Owns the shapes and dtypes at this border. Does not know sequences, requests or the model.
Shapes: L rows of logits, V vocabulary, k the largest number of top tokens that any row asks for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5
"""Below it a row is greedy: dividing by less would only sharpen what is already certain."""

MAX_VOCABULARY = 1 << 20
"""Masses are sums of weights of at most 2^40, kept under 2^60."""

TokenIds = Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]]
"""A list of token ids; an int32 array is taken without a loop in Python."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row's token is chosen."""

    temperature: float = 1.0
    """Below `MIN_TEMPERATURE` = the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """Key of the generator, 0 .. 2^64 - 1."""
    index: int = 0
    """Which of a request's n completions."""
    position: int = 0
    """Of the token to choose, counted from the prompt's first token."""
    logprobs: int = -1
    """-1 = none; 0 = the chosen token's; k = those of the k most probable too."""
    prompt_token_ids: TokenIds = ()
    """May be left empty unless the repetition penalty is used."""
    output_token_ids: TokenIds = ()
    """May be left empty unless a penalty is used."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_token_ids: TokenIds = ()


@dataclass(frozen=True, slots=True)
class RaggedTokens:
    """A list of token ids for each row, end to end."""

    offsets: Tensor
    """`[L + 1]` int32: row r has `token_ids[offsets[r]:offsets[r + 1]]`."""
    token_ids: Tensor
    """`[total]` int32."""

    @classmethod
    def of(cls, lists: Iterable[TokenIds]) -> "RaggedTokens":
        """Join one list per row."""
        arrays = [np.asarray(token_ids, dtype=np.int32) for token_ids in lists]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
        np.cumsum([array.size for array in arrays], out=offsets[1:])
        joined = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        return cls(torch.from_numpy(offsets), torch.from_numpy(joined))

    def row_of_each(self) -> Tensor:
        """Return the row that each token id belongs to, `[total]` int64."""
        sizes = self.offsets.diff().to(torch.int64)
        rows = torch.arange(sizes.numel(), device=sizes.device)
        return torch.repeat_interleave(rows, sizes, output_size=self.token_ids.numel())

    def to(self, device: torch.device) -> "RaggedTokens":
        """Return the same lists on a device."""
        return RaggedTokens(self.offsets.to(device), self.token_ids.to(device))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How the tokens of L rows are chosen. Made by `stack`, by the engine once a step."""

    temperature: Tensor  # [L] f32
    top_p: Tensor  # [L] f32
    top_k: Tensor  # [L] int32
    min_p: Tensor  # [L] f32
    repetition_penalty: Tensor  # [L] f32
    presence_penalty: Tensor  # [L] f32
    frequency_penalty: Tensor  # [L] f32
    seed: Tensor  # [L] uint64
    index: Tensor  # [L] int32
    position: Tensor  # [L] int64
    logprobs: Tensor  # [L] int32
    prompt: RaggedTokens
    output: RaggedTokens
    bias: RaggedTokens
    """Each token id at most once a row."""
    bias_values: Tensor  # [total of bias] f32
    banned: RaggedTokens
    max_logprobs: int
    """The largest of `logprobs`: how wide the answer is."""
    is_all_greedy: bool
    """No row draws a random number."""

    @property
    def has_edits(self) -> bool:
        """Some row's logits are changed before the choice."""
        return any(lists.token_ids.numel() > 0 for lists in (self.prompt, self.output, self.bias, self.banned))

    @classmethod
    def stack(cls, rows: Sequence[SamplingRow]) -> "SamplingRows":
        """Turn one struct per row into one array per field, on the CPU."""

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

        bias_values = [value for row in rows for value in row.logit_bias.values()]
        return cls(
            temperature=column("temperature", torch.float32),
            top_p=column("top_p", torch.float32),
            top_k=column("top_k", torch.int32),
            min_p=column("min_p", torch.float32),
            repetition_penalty=column("repetition_penalty", torch.float32),
            presence_penalty=column("presence_penalty", torch.float32),
            frequency_penalty=column("frequency_penalty", torch.float32),
            seed=column("seed", torch.uint64),
            index=column("index", torch.int32),
            position=column("position", torch.int64),
            logprobs=column("logprobs", torch.int32),
            prompt=RaggedTokens.of(row.prompt_token_ids for row in rows),
            output=RaggedTokens.of(row.output_token_ids for row in rows),
            bias=RaggedTokens.of(tuple(row.logit_bias) for row in rows),
            bias_values=torch.tensor(bias_values, dtype=torch.float32),
            banned=RaggedTokens.of(row.banned_token_ids for row in rows),
            max_logprobs=max((row.logprobs for row in rows), default=-1),
            is_all_greedy=all(row.temperature < MIN_TEMPERATURE for row in rows),
        )

    def to(self, device: torch.device) -> "SamplingRows":
        """Return the same rows on a device."""
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        return SamplingRows(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()})


@dataclass(frozen=True, slots=True)
class SampledRows:
    """What was chosen for L rows. A row whose logits hold no distribution is poisoned: its token id is -1."""

    token_ids: Tensor
    """`[L]` int32; -1 = poisoned: a logit is NaN or +inf, or none is left above -inf. Its request fails alone."""
    logprobs: Tensor
    """`[L]` f32, natural, of the raw logits; NaN where the row asked for none."""
    ranks: Tensor
    """`[L]` int32 in the raw logits, 1 = the most probable; 0 where the row asked for none."""
    top_token_ids: Tensor
    """`[L, k]` int32, most probable first; -1 beyond what the row asked for."""
    top_logprobs: Tensor
    """`[L, k]` f32; NaN beyond what the row asked for."""
