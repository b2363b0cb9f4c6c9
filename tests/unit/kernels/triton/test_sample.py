"""The sampler of the GPU backend."""

import pytest
import torch

from kernels.sample import SamplingRow, SamplingRows, reference, sample, score


def test_greedy_takes_the_first_of_the_largest(device: torch.device) -> None:
    """Across blocks, ties go to the lower id; rows without a distribution answer -1."""
    logits = torch.zeros(5, 9000)
    logits[0, [8999, 4500]] = 2.0
    logits[1, 8191] = 1.0
    logits[2, 5000] = torch.nan
    logits[3, 1] = torch.inf
    logits[4] = -torch.inf
    rows = SamplingRows.stack([SamplingRow(temperature=0.0)] * 5).to(device)

    assert sample(logits.to(device), rows).token_ids.tolist() == [4500, 8191, -1, -1, -1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mixed_batch_matches_the_reference(device: torch.device, temperature: float) -> None:
    """Penalties, limits and log probabilities come out as the reference says, row by row."""
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        SamplingRow(temperature=temperature, seed=1, logprobs=3),
        SamplingRow(temperature=temperature, seed=2, top_k=9, top_p=0.8),
        SamplingRow(temperature=temperature, seed=3, min_p=0.05, logit_bias={5: 3.0}),
        SamplingRow(temperature=0.0, repetition_penalty=1.3, output_token_ids=[int(logits[3].argmax())]),
    ]

    seen = sample(logits.to(device), SamplingRows.stack(rows).to(device))

    expected = reference.sample(logits, SamplingRows.stack(rows))
    assert seen.token_ids.tolist() == expected.token_ids.tolist()
    assert seen.ranks.tolist() == expected.ranks.tolist()
    torch.testing.assert_close(seen.logprobs.cpu(), expected.logprobs, equal_nan=True)


def test_score_matches_the_reference(device: torch.device) -> None:
    """Given tokens are reported on."""
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    token_ids = torch.tensor([0, 99, 5], dtype=torch.int32)

    seen = score(logits.to(device), token_ids.to(device), 2)

    expected = reference.score(logits, token_ids, 2)
    assert seen.top_token_ids.tolist() == expected.top_token_ids.tolist()
    torch.testing.assert_close(seen.logprobs.cpu(), expected.logprobs)
