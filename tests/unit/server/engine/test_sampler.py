"""From sequences to sampling rows and back."""

from dataclasses import fields

import numpy as np
import torch

from kernels.sample import RaggedTokens, SamplingRow, SamplingRows
from server.engine.plan import Plan, Sample
from server.engine.sampler import Sampler
from server.engine.sequence import Seniority, Sequence, Submission
from server.messages import GenerateRequest, SamplingParams

V = 40


def sequence(slot: int, sampling: SamplingParams, prompt: list[int], output: list[int], index: int = 0) -> Sequence:
    """Make a sequence in a slot."""
    emitted = tuple(tuple(output) if i == index else () for i in range(index + 1))
    request = GenerateRequest("r", tuple(prompt), sampling, emitted_token_ids=emitted)
    submission = Submission(request, slot, np.array(prompt, dtype=np.int32), submitted_s=0.0)
    made = Sequence(submission, index, seniority=Seniority(0, 2, slot, index), max_sequence_tokens=100)
    made.slot = slot
    return made


def samples(sequences: list[Sequence]) -> list[Sample]:
    """Return the next token of each sequence."""
    return [Sample(each, each.num_tokens) for each in sequences]


def assert_same(seen: SamplingRows, wanted: SamplingRows) -> None:
    """Compare every field, dtypes included."""
    for each in fields(SamplingRows):
        left, right = getattr(seen, each.name), getattr(wanted, each.name)
        if isinstance(left, RaggedTokens):
            assert left.offsets.tolist() == right.offsets.tolist(), each.name
            assert left.token_ids.tolist() == right.token_ids.tolist(), each.name
        elif isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, each.name
            assert left.tolist() == right.tolist(), each.name
        else:
            assert left == right, each.name


def test_gathers_what_a_row_by_row_description_says() -> None:
    """Columns by slot, gathered, are the same arrays as structs stacked row by row."""
    sampler = Sampler(8, V)
    first = SamplingParams(
        seed=2**64 - 1, max_tokens=9, temperature=0.5, top_p=0.75, top_k=1000, min_p=0.25, logprobs=3
    )
    second = SamplingParams(
        seed=4,
        max_tokens=9,
        temperature=0.0,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={3: 1.5, 1: -2.0},
        min_tokens=3,
        eos_token_ids=(9, 2),
        stop_token_ids=(5,),
    )
    sequences = [sequence(5, second, [1, 2, 3], [4, 5], index=1), sequence(2, first, [6, 7], [])]
    for each in sequences:
        sampler.load(each)

    wanted = SamplingRows.stack(
        [
            SamplingRow(
                temperature=0.0,
                seed=4,
                index=1,
                position=5,
                repetition_penalty=1.5,
                presence_penalty=0.5,
                frequency_penalty=-0.25,
                prompt_token_ids=(1, 2, 3),
                output_token_ids=(4, 5),
                logit_bias={3: 1.5, 1: -2.0},
                banned_token_ids=(2, 5, 9),
            ),
            SamplingRow(temperature=0.5, top_p=0.75, top_k=V, min_p=0.25, seed=2**64 - 1, position=2, logprobs=3),
        ]
    )
    assert_same(sampler.rows(samples(sequences)), wanted)


def test_bans_endings_only_before_min_tokens() -> None:
    """At min_tokens the end of a completion is allowed."""
    sampler = Sampler(2, V)
    params = SamplingParams(seed=1, max_tokens=9, min_tokens=2, eos_token_ids=(7,))
    early, late = sequence(0, params, [1], [2]), sequence(1, params, [1], [2, 3])
    for each in (early, late):
        sampler.load(each)

    banned = sampler.rows(samples([early, late])).banned

    assert banned.offsets.tolist() == [0, 1, 1]
    assert banned.token_ids.tolist() == [7]


def test_a_slot_that_changes_hands_keeps_nothing_of_the_last_one() -> None:
    """Loading a sequence overwrites every column of its slot."""
    sampler = Sampler(1, V)
    strange = SamplingParams(
        seed=9,
        max_tokens=1,
        temperature=0.1,
        top_k=3,
        logit_bias={1: 1.0},
        min_tokens=5,
        stop_token_ids=(3,),
        logprobs=2,
    )
    sampler.load(sequence(0, strange, [1], []))
    plain = sequence(0, SamplingParams(seed=1, max_tokens=1), [1], [])
    sampler.load(plain)

    assert_same(sampler.rows(samples([plain])), SamplingRows.stack([SamplingRow(seed=1, position=1)]))


def test_reads_logprobs_of_the_rows_that_asked() -> None:
    """Each row gets as many top tokens as it asked for, and none if it did not ask."""
    sampler = Sampler(3, V)
    asked = (None, 0, 2)
    sequences = [
        sequence(slot, SamplingParams(seed=1, max_tokens=9, temperature=0.0, logprobs=k), [1], [])
        for slot, k in enumerate(asked)
    ]
    plan = Plan()
    for each in sequences:
        sampler.load(each)
        plan.add(each, 1)
    logits = torch.zeros(3, V)
    logits[:, 8], logits[:, 9] = 5.0, 4.0

    outcome = sampler.run(plan, logits)

    assert outcome.token_ids == [8, 8, 8]
    assert outcome.logprobs[0] is None
    none, two = outcome.logprobs[1:]
    assert none is not None
    assert two is not None
    assert (none.token_id, none.rank, none.top) == (8, 1, ())
    assert [token_id for token_id, _ in two.top] == [8, 9]
    assert two.logprob == two.top[0][1]


def test_scores_the_next_token_of_each_prompt_row() -> None:
    """A span's rows are scored with the token that follows, whatever is sampled in the same step."""
    sampler = Sampler(2, V)
    scored = sequence(0, SamplingParams(seed=1, max_tokens=1, prompt_logprobs=1), [3, 4, 5, 6], [])
    scored.num_computed = 1
    scored.prompt_logprobs = [None]  # type: ignore[list-item]
    plan = Plan()
    sampler.load(scored)
    plan.add(scored, 3)
    logits = torch.zeros(3, V)
    logits[0, 9], logits[1, 5], logits[2, 6] = 40.0, 40.0, -40.0

    outcome = sampler.run(plan, logits)

    assert outcome.token_ids == [9]
    (scores,) = outcome.scores
    assert scores is not None
    assert [(each.token_id, each.rank) for each in scores] == [(5, 1), (6, V)]
