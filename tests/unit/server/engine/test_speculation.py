"""When drafts pay. Costs are injected, never measured here."""

from collections.abc import Mapping

import numpy as np
import pytest

from server.engine.costs import StepCosts
from server.engine.sequence import Seniority, Sequence, Submission
from server.engine.speculation import MAX_DRAFT_TOKENS, MAX_SEQUENCES, Speculation
from server.messages import GenerateRequest, SamplingParams

CYCLE = [1, 2, 3, 4, 5] * 4
"""Every token of it is foreseen."""
PLAIN = list(range(20))


class Costs(StepCosts):
    """What steps take by their rows, of a plain step's time."""

    def __init__(self, ratios: Mapping[int, float]) -> None:
        super().__init__()
        self._ratios = ratios

    def ratio(self, num_plain_rows: int, num_rows: int) -> float | None:
        """Return what the test says; what it does not say is dear."""
        del num_plain_rows
        return self._ratios.get(num_rows, 99.0)


def sequence(tokens: list[int], serial: int = 0) -> Sequence:
    """Make a sequence that has emitted nothing."""
    request = GenerateRequest("r", tuple(tokens), SamplingParams(seed=0, max_tokens=200))
    submission = Submission(request, serial, np.array(tokens, dtype=np.int32), submitted_s=0.0)
    return Sequence(submission, 0, seniority=Seniority(0, 2, serial, 0), max_sequence_tokens=400)


def roomy(_: Sequence) -> int:
    """Return that any draft fits."""
    return 100


def counts(speculation: Speculation, sequences: list[Sequence], max_rows: int = 256) -> list[int]:
    """Return how many tokens are drafted for each sequence."""
    chosen = dict(speculation.choose(sequences, roomy, max_rows))
    return [chosen.get(each, 0) for each in sequences]


def test_drafts_as_many_rows_as_pay_best() -> None:
    """Where each token comes at a rate of 0.9, 4 rows give 3.4 tokens for 1.2, and 8 give 5.7 for 2.2."""
    costs = Costs({2: 1.1, 4: 1.2, 8: 2.2})
    text = sequence(CYCLE)

    assert counts(Speculation(costs), [text]) == [3]
    assert text.token_ids[20:23].tolist() == [1, 2, 3]
    assert text.num_tokens == 20


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [({}, CYCLE), ({2: 1.9, 4: 3.5}, CYCLE), ({2: 1.0, 4: 1.0}, PLAIN), ({2: 1.82}, CYCLE)],
    ids=["dear rows", "gain below one", "nothing repeats", "gain below the margin"],
)
def test_drafts_nothing_where_it_does_not_pay(ratios: Mapping[int, float], tokens: list[int]) -> None:
    """Neither for a text that does not repeat nor where rows cost what they give."""
    assert counts(Speculation(Costs(ratios)), [sequence(tokens)]) == [0]


def test_drafted_rows_go_to_the_sequences_that_repeat() -> None:
    """The rows of a step are shared by what they are worth, and its size is one of a few."""
    assert counts(Speculation(Costs({8: 1.1})), [sequence(PLAIN), sequence(CYCLE)]) == [0, 6]
    assert counts(Speculation(Costs({8: 1.1})), [sequence(CYCLE), sequence(CYCLE)]) == [3, 3]


def test_a_step_stays_within_its_budget() -> None:
    """No more rows than the step may have, nor more drafts than a sequence has room for."""
    costs = Costs(dict.fromkeys((2, 4, 8, 16, 32), 1.0))

    assert counts(Speculation(costs), [sequence(CYCLE)], max_rows=5) == [3]
    assert counts(Speculation(costs), [sequence(CYCLE)]) == [MAX_DRAFT_TOKENS]
    assert Speculation(costs).choose([sequence(CYCLE)], lambda _: 0, 256) == []


def test_many_sequences_are_left_alone() -> None:
    """Their rows keep the cores busy: a drafted row is no longer nearly free, and nothing is looked up."""
    texts = [sequence(CYCLE, number) for number in range(MAX_SEQUENCES + 1)]
    speculation = Speculation(Costs(dict.fromkeys((4, 8, 16), 1.0)))

    assert counts(speculation, texts) == [0] * len(texts)
    assert all(each.drafter is None for each in texts)
    assert sum(counts(speculation, texts[:-1])) > 0


def test_a_sequence_that_goes_on_differently_is_left_alone() -> None:
    """Drafts that were wrong again and again are not computed any more, and learning it costs no row."""
    speculation = Speculation(Costs({2: 1.3}))
    text = sequence([1, 2, 3, 4, 5, 6, 7, 8] * 2)
    assert counts(speculation, [text]) == [1]
    for token_id in range(100, 112):
        text.accept(token_id)
        for repeated in (1, 2, 3, 4, 5, 6, 7, 8):
            text.accept(repeated)
        speculation.choose([text], roomy, 256)

    assert counts(speculation, [text]) == [0]
