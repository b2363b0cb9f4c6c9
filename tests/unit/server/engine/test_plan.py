"""What a step computes, and what is left of it when drafts were wrong."""

import numpy as np
import pytest

from server.engine.plan import Outcome, Plan
from server.engine.sequence import Seniority, Sequence, Submission
from server.messages import GenerateRequest, SamplingParams


def sequence(serial: int, draft: list[int]) -> Sequence:
    """Make a sequence that decodes: 3 tokens, of which the last is not computed, and a draft. 9 ends it, 8 stops it."""
    sampling = SamplingParams(seed=0, max_tokens=20, eos_token_ids=(9,), stop_token_ids=(8,))
    submission = Submission(
        GenerateRequest("r", (1, 2, 3), sampling), serial, np.array([1, 2, 3], dtype=np.int32), submitted_s=0.0
    )
    made = Sequence(submission, 0, seniority=Seniority(0, 2, serial, 0), max_sequence_tokens=100)
    made.num_computed = 2
    made.token_ids[3 : 3 + len(draft)] = draft
    return made


def plan_of(*chunks: tuple[Sequence, int]) -> Plan:
    """Plan chunks."""
    plan = Plan()
    for each, count in chunks:
        plan.add(each, count)
    return plan


def test_a_token_is_chosen_behind_every_drafted_one() -> None:
    """Samples have the positions of the tokens to come, and see the drafted tokens before them as output."""
    drafting, plain = sequence(1, [5, 6]), sequence(2, [])

    plan = plan_of((plain, 1), (drafting, 3))

    assert [(each.sequence, each.position) for each in plan.samples] == [
        (plain, 3),
        *((drafting, p) for p in (3, 4, 5)),
    ]
    assert plan.sample_rows == [0, 1, 2, 3]
    assert [each.output.tolist() for each in plan.samples] == [[], [], [5], [5, 6]]
    assert (plan.num_rows, plan.num_drafted_tokens) == (4, 2)


@pytest.mark.parametrize(
    ("draft", "chosen", "num_kept"),
    [
        ([5, 6, 7], [5, 6, 7, 4], 4),
        ([5, 6, 7], [5, 6, 4, 4], 3),
        ([5, 6, 7], [4, 6, 7, 4], 1),
        ([5, 9, 7], [5, 9, 7, 4], 2),
        ([8, 6, 7], [8, 6, 7, 4], 1),
        ([5, 6, 7], [5, -1, 7, 4], 2),
    ],
    ids=["all right", "last wrong", "first wrong", "ends", "stops", "no distribution"],
)
def test_keeps_what_plain_steps_would_have_given(draft: list[int], chosen: list[int], num_kept: int) -> None:
    """Rows count up to the first that a wrong draft, or the end of the completion, comes before."""
    drafting, plain = sequence(1, draft), sequence(2, [])
    plan = plan_of((plain, 1), (drafting, 4), (plain, 1))
    outcome = Outcome([2, *chosen, 3], [None] * 6, [])

    kept = plan.settle(outcome)

    assert kept == [0, *range(1, 1 + num_kept), 5]
    assert outcome.token_ids == [2, *chosen[:num_kept], 3]
    assert len(outcome.logprobs) == num_kept + 2
    assert [position for _, position in plan.samples] == [3, *range(3, 3 + num_kept), 3]
    assert [count for _, count in plan.chunks] == [1, num_kept, 1]
    assert plan.num_rows == 6


def test_a_plan_cut_by_request_has_no_drafts() -> None:
    """What failed together is run again without guessed tokens: they may be to blame."""
    drafting = sequence(1, [5, 6])

    parts = plan_of((drafting, 3)).split()

    assert [part.chunks for part in parts.values()] == [[(drafting, 1)]]
