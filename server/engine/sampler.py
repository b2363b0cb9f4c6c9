"""From sequences to `kernels.sample` and back. Keeps sampling parameters as columns by slot, so a step only gathers.

Penalties need no state of their own: they are functions of the sequence's token ids, which lie in one growing array,
so a step hands out views. Knows no pages and no requests.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.sample import MIN_TEMPERATURE, RaggedTokens, SampledRows, SamplingRows, sample, score
from server.engine.chain import TokenArray
from server.engine.plan import Outcome, Plan, Sample
from server.engine.sequence import Sequence
from server.messages import SamplingParams, TokenLogprob

_NO_TOKENS: TokenArray = np.zeros(0, dtype=np.int32)
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class _Gathered(NamedTuple):
    """The sampling parameters of the sequences in some slots, in this order."""

    slots: list[int]
    rows: SamplingRows
    """Without lists of token ids."""
    positions: NDArray[np.int64]
    """The memory of `rows.position`."""
    free_from: int
    """From this position on no row bans the end of its completion."""
    has_extras: bool


class _Extras(TypedDict):
    """Fields of `SamplingRows` that few requests use."""

    bias: RaggedTokens
    bias_values: Tensor
    prompt: RaggedTokens
    output: RaggedTokens


class Sampler:
    """Chooses the next tokens of a plan's sequences.

    Args:
        max_num_seqs: number of slots.
        vocabulary_size: top_k and the number of top tokens are cut to it.
    """

    def __init__(self, max_num_seqs: int, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._floats: Mapping[str, NDArray[np.float32]] = {name: np.zeros(max_num_seqs, np.float32) for name in _FLOATS}
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._index = np.zeros(max_num_seqs, np.int32)
        self._logprobs = np.zeros(max_num_seqs, np.int32)
        self._first_free_position = np.zeros(max_num_seqs, np.int64)
        """From here on the end of a completion is not banned."""
        self._has_extras = np.zeros(max_num_seqs, np.bool_)
        """Has a penalty or a logit bias: the rare rows that a step looks at one by one."""
        self._banned: list[TokenArray] = [_NO_TOKENS] * max_num_seqs
        self._gathered: _Gathered | None = None
        """Of the last step."""

    def load(self, sequence: Sequence) -> None:
        """Take over the parameters of a sequence that was given a slot."""
        sampling, slot = sequence.submission.request.sampling, sequence.slot
        self._gathered = None
        for name, column in self._floats.items():
            column[slot] = getattr(sampling, name)
        self._top_k[slot] = min(sampling.top_k, self._vocabulary_size)
        self._seed[slot] = sampling.seed
        self._index[slot] = sequence.index
        self._logprobs[slot] = -1 if sampling.logprobs is None else min(sampling.logprobs, self._vocabulary_size)
        self._first_free_position[slot] = sequence.num_prompt_tokens + sampling.min_tokens
        self._has_extras[slot] = bool(sampling.logit_bias) or _is_penalised(sampling)
        endings = (*sampling.eos_token_ids, *sampling.stop_token_ids)
        self._banned[slot] = np.array(sorted(set(endings)), dtype=np.int32)

    def run(self, plan: Plan, logits: Tensor) -> Outcome:
        """Choose the samples' tokens and score the spans' rows.

        Args:
            plan: what was computed.
            logits: `[L, V]` of its samples, then of its scored rows.
        """
        num_samples = len(plan.samples)
        outcome = Outcome(token_ids=[], logprobs=[None] * num_samples, scores=[])
        if num_samples:
            rows = self.rows(plan.samples)
            chosen_from = logits[:num_samples] if plan.spans else logits  # a slice that holds all costs 10 us
            sampled = sample(chosen_from, rows.to(logits.device) if logits.is_cuda else rows)
            outcome.token_ids = sampled.token_ids.tolist()
            if rows.max_logprobs >= 0:
                counts = rows.logprobs.tolist()
                outcome.logprobs = _read(sampled, outcome.token_ids, counts)
        if plan.spans:
            outcome.scores = self._score(plan, logits[num_samples:])
        return outcome

    def rows(self, samples: list[Sample]) -> SamplingRows:
        """Gather the sampling parameters of samples, one row each; good until the next call."""
        slots = [sequence.slot for sequence, _ in samples]
        gathered = self._gathered
        if gathered is None or gathered.slots != slots:
            gathered = self._gathered = self._gather(slots)
        positions = [position for _, position in samples]
        gathered.positions[:] = positions
        rows = gathered.rows
        if gathered.has_extras:
            rows = replace(rows, **self._extras(samples))
        if min(positions) < gathered.free_from:
            first_free = self._first_free_position[slots].tolist()
            facts = zip(slots, positions, first_free, strict=True)
            bans = (self._banned[slot] if position < free else _NO_TOKENS for slot, position, free in facts)
            rows = replace(rows, banned=RaggedTokens.of(bans))
        return rows

    def _gather(self, slots: list[int]) -> "_Gathered":
        """Gather what stays the same from step to step while the same sequences are sampled."""
        floats = {name: torch.from_numpy(column[slots]) for name, column in self._floats.items()}
        logprobs, positions = self._logprobs[slots], np.zeros(len(slots), np.int64)
        none = RaggedTokens.of([_NO_TOKENS] * len(slots))
        rows = SamplingRows(
            **floats,
            top_k=torch.from_numpy(self._top_k[slots]),
            seed=torch.from_numpy(self._seed[slots]),
            index=torch.from_numpy(self._index[slots]),
            position=torch.from_numpy(positions),
            logprobs=torch.from_numpy(logprobs),
            prompt=none,
            output=none,
            bias=none,
            bias_values=torch.zeros(0),
            banned=none,
            max_logprobs=int(logprobs.max()),
            is_all_greedy=bool(floats["temperature"].max() < MIN_TEMPERATURE),
        )
        free_from, has_extras = int(self._first_free_position[slots].max()), bool(self._has_extras[slots].any())
        return _Gathered(slots, rows, positions, free_from, has_extras)

    def _extras(self, samples: list[Sample]) -> "_Extras":
        """Gather bias and penalised tokens, which change with every token."""
        sampling = [sequence.submission.request.sampling for sequence, _ in samples]
        values = [value for each in sampling for value in each.logit_bias.values()]
        return _Extras(
            bias=RaggedTokens.of(tuple(each.logit_bias) for each in sampling),
            bias_values=torch.tensor(values, dtype=torch.float32),
            prompt=RaggedTokens.of(
                each.sequence.submission.prompt if params.repetition_penalty != 1.0 else _NO_TOKENS
                for each, params in zip(samples, sampling, strict=True)
            ),
            output=RaggedTokens.of(
                each.output if _is_penalised(params) else _NO_TOKENS
                for each, params in zip(samples, sampling, strict=True)
            ),
        )

    def _score(self, plan: Plan, logits: Tensor) -> list[list[TokenLogprob] | None]:
        wanted = [span.sequence.submission.request.sampling.prompt_logprobs or 0 for span in plan.spans]
        next_tokens = np.concatenate(
            [s.sequence.token_ids[s.first_position + 1 : s.first_position + 1 + s.num_rows] for s in plan.spans]
        )
        num_top = min(max(wanted), self._vocabulary_size)
        scored = score(logits, torch.from_numpy(next_tokens).to(logits.device), num_top)
        poisoned = scored.token_ids.tolist()
        counts = [min(top, num_top) for top, span in zip(wanted, plan.spans, strict=True) for _ in range(span.num_rows)]
        logprobs = _read(scored, next_tokens.tolist(), counts)
        scores: list[list[TokenLogprob] | None] = []
        row = 0
        for span in plan.spans:
            rows = slice(row, row + span.num_rows)
            scores.append(None if -1 in poisoned[rows] else [each for each in logprobs[rows] if each is not None])
            row += span.num_rows
        return scores


def _is_penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _read(rows: SampledRows, token_ids: list[int], counts: list[int]) -> list[TokenLogprob | None]:
    """Read the rows that asked for log probabilities; -1 = did not ask."""
    facts = zip(
        token_ids,
        counts,
        rows.logprobs.tolist(),
        rows.ranks.tolist(),
        rows.top_token_ids.tolist(),
        rows.top_logprobs.tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
        if count >= 0 and token_id >= 0
        else None
        for token_id, count, logprob, rank, top_ids, top_values in facts
    ]
