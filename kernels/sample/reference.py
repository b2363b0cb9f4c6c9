"""The sampler in plain PyTorch: sorts each row and says what the fast ones must choose.

Probabilities are integers: a token's weight is exp((logit - largest) / temperature) in units of 2^-40, so a sum of
them is exact in any order and a row's choice cannot depend on how a sum was split. Only `exp` may round differently.
Shapes: L rows, V vocabulary, k top tokens.
"""

import torch
from torch import Tensor

from kernels.sample import philox
from kernels.sample.rows import MIN_TEMPERATURE, SampledRows, SamplingRows

WEIGHT_OF_ONE = float(1 << 40)


def sample(logits: Tensor, rows: SamplingRows) -> SampledRows:
    """Choose a token for each row."""
    edited = _edit(logits, rows)
    token_ids = edited.argmax(dim=-1) if rows.is_all_greedy else _choose(edited, rows)
    is_poisoned = find_poisoned(logits) | find_poisoned(edited)
    return report(logits, token_ids.masked_fill(is_poisoned, -1), rows.logprobs, rows.max_logprobs)


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> SampledRows:
    """Report on tokens that were chosen before."""
    asked = torch.full_like(token_ids, num_top)
    return report(logits, token_ids.to(torch.int64).masked_fill(find_poisoned(logits), -1), asked, num_top)


def find_poisoned(logits: Tensor) -> Tensor:
    """Return which rows hold no distribution, `[L]` bool."""
    largest = logits.amax(dim=-1)  # amax passes NaN on
    return ~largest.isfinite()


def report(logits: Tensor, token_ids: Tensor, asked: Tensor, max_asked: int) -> SampledRows:
    """Fill in log probabilities, ranks and top tokens of the raw logits, for the rows that asked."""
    num_rows, vocabulary = logits.shape
    num_top = min(max(max_asked, 0), vocabulary)
    if max_asked < 0:
        none = logits.new_full((num_rows,), torch.nan)
        no_top = logits.new_empty((num_rows, 0))
        return SampledRows(token_ids.int(), none, torch.zeros_like(none, dtype=torch.int32), no_top.int(), no_top)
    is_asked = (asked >= 0) & (token_ids >= 0)
    chosen = token_ids.clamp(min=0)[:, None]
    largest = logits.amax(dim=-1, keepdim=True)
    total = _weigh(logits - largest).sum(dim=-1, keepdim=True)
    log_total = largest.double() + (total.double() / WEIGHT_OF_ONE).log()
    value = logits.gather(1, chosen)
    ids = torch.arange(vocabulary, device=logits.device)
    is_before = (logits > value) | ((logits == value) & (ids < chosen))
    top_logits, top_ids = (each[:, :num_top] for each in logits.sort(dim=-1, descending=True, stable=True))
    is_wanted = is_asked[:, None] & (ids[:num_top] < asked[:, None])
    return SampledRows(
        token_ids=token_ids.int(),
        logprobs=(value.double() - log_total).float()[:, 0].masked_fill(~is_asked, torch.nan),
        ranks=(is_before.sum(dim=-1).int() + 1).masked_fill(~is_asked, 0),
        top_token_ids=top_ids.int().masked_fill(~is_wanted, -1),
        top_logprobs=(top_logits.double() - log_total).float().masked_fill(~is_wanted, torch.nan),
    )


def _edit(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Apply logit bias, bans, then repetition, frequency and presence penalties."""
    if not rows.has_edits:
        return logits
    edited = logits.clone()
    edited[rows.bias.row_of_each(), rows.bias.token_ids.long()] += rows.bias_values
    edited[rows.banned.row_of_each(), rows.banned.token_ids.long()] = -torch.inf

    counts = torch.zeros_like(edited)
    output = (rows.output.row_of_each(), rows.output.token_ids.long())
    counts.index_put_(output, torch.ones(1, device=logits.device), accumulate=True)
    is_seen = counts > 0
    is_seen[rows.prompt.row_of_each(), rows.prompt.token_ids.long()] = True

    penalty = rows.repetition_penalty[:, None]
    edited = torch.where(is_seen, torch.where(edited > 0, edited / penalty, edited * penalty), edited)
    edited = edited - rows.frequency_penalty[:, None] * counts
    return edited - rows.presence_penalty[:, None] * (counts > 0)


def _choose(edited: Tensor, rows: SamplingRows) -> Tensor:
    """Draw from the kept tokens of each row, `[L]` int64; a greedy row keeps one token."""
    vocabulary = edited.shape[1]
    values, ids = edited.sort(dim=-1, descending=True, stable=True)  # stable: of equals the lower id first
    is_greedy = rows.temperature < MIN_TEMPERATURE
    inverse = (1.0 / rows.temperature.masked_fill(is_greedy, 1.0)).clamp(min=torch.finfo(torch.float32).tiny)
    weights = _weigh((values - values[:, :1]) * inverse[:, None])

    top_k = torch.where(rows.top_k > 0, rows.top_k, vocabulary).masked_fill(is_greedy, 1)
    weights = weights.masked_fill(torch.arange(vocabulary, device=edited.device) >= top_k[:, None], 0)
    before = weights.cumsum(dim=-1) - weights
    target = (rows.top_p.double() * weights.sum(dim=-1).double()).ceil().to(torch.int64).clamp(min=1)
    is_beyond = (before >= target[:, None]) & (rows.top_p < 1)[:, None]
    least = (rows.min_p.double().clamp(max=1.0) * WEIGHT_OF_ONE).round().to(torch.int64)
    weights = weights.masked_fill(is_beyond | (weights < least[:, None]), 0)

    by_id = torch.zeros_like(weights).scatter_(1, ids, weights).cumsum(dim=-1)
    bits = philox.draw(rows.seed.view(torch.int64), rows.index.long(), rows.position)
    threshold = philox.scale(by_id[:, -1], *bits)
    return torch.searchsorted(by_id, threshold[:, None], right=True)[:, 0].clamp(max=vocabulary - 1)


def _weigh(exponents: Tensor) -> Tensor:
    """Return exp of what is at most 0 as whole numbers of 2^-40; NaN (a poisoned row) becomes 0."""
    return (exponents.exp().double().nan_to_num(0.0) * WEIGHT_OF_ONE).round().to(torch.int64)
