"""What steps take, as they say it."""

import pytest

from server.engine.costs import EXPECTED_SHARE, MEMORY_STEPS, NUM_KEPT, NUM_TRIED, StepCosts


def test_knows_nothing_without_a_plain_step() -> None:
    """What drafts cost is relative to a step without; one of another number of sequences says nothing."""
    costs = StepCosts()
    costs.note(2, 2, 0.01)

    assert costs.ratio(1, 4) is None


def test_expects_rows_to_be_cheap_until_they_were_tried() -> None:
    """Hope makes the engine try; of the first tries a bad one does not end it, and a good one is believed."""
    costs = StepCosts()
    costs.note(1, 1, 0.01)
    assert costs.ratio(1, 4) == pytest.approx(1 + 2 * EXPECTED_SHARE)

    costs.note(1, 4, 0.5)
    assert costs.ratio(1, 4) == pytest.approx(1 + 2 * EXPECTED_SHARE)
    costs.note(1, 4, 0.012)
    assert costs.ratio(1, 4) == pytest.approx(1.2)


def test_takes_the_middle_of_the_last_steps() -> None:
    """An outlier changes nothing, and a lasting change is followed."""
    costs = StepCosts()
    costs.note(1, 1, 0.01)
    for duration_s in [9.0] * 2 + [0.03] * (NUM_TRIED - 2):
        costs.note(1, 4, duration_s)
    assert costs.ratio(1, 4) == pytest.approx(3)

    for _ in range(NUM_KEPT):
        costs.note(1, 4, 0.02)
    assert costs.ratio(1, 4) == pytest.approx(2)


def test_forgets_what_was_not_seen_for_long() -> None:
    """So that what did not pay once is tried again."""
    costs = StepCosts()
    for _ in range(NUM_TRIED):
        costs.note(1, 4, 0.1)
    for _ in range(MEMORY_STEPS):
        costs.note(1, 1, 0.01)
    assert costs.ratio(1, 4) == pytest.approx(10)

    costs.note(1, 1, 0.01)

    assert costs.ratio(1, 4) == pytest.approx(1 + 2 * EXPECTED_SHARE)
