"""What steps take, as they say it."""

import pytest

from server.engine.costs import FIXED_ROWS, MEMORY_STEPS, NUM_KEPT, NUM_TRUSTED, StepCosts


def note(costs: StepCosts, num_rows: int, *durations_s: float) -> None:
    """Tell of steps."""
    for duration_s in durations_s:
        costs.note(num_rows, duration_s)


def test_knows_nothing_without_a_plain_step() -> None:
    """What drafts cost is relative to a step without; one of another size, or too few of this one, say nothing."""
    costs = StepCosts()
    note(costs, 2, *[0.01] * NUM_TRUSTED)
    note(costs, 1, *[0.01] * (NUM_TRUSTED - 1))

    assert costs.ratio(1, 4) is None


def test_expects_the_usual_of_what_was_not_tried() -> None:
    """A size that was not measured follows from the next smaller one that was."""
    costs = StepCosts()
    note(costs, 1, *[0.01] * NUM_TRUSTED)
    assert costs.ratio(1, 8) == pytest.approx((8 + FIXED_ROWS) / (1 + FIXED_ROWS))

    note(costs, 4, *[0.01] * NUM_TRUSTED)
    assert costs.ratio(1, 8) == pytest.approx((8 + FIXED_ROWS) / (4 + FIXED_ROWS))
    assert costs.ratio(1, 4) == pytest.approx(1)


def test_takes_the_middle_of_the_last_steps() -> None:
    """Outliers change nothing, and a lasting change is followed."""
    costs = StepCosts()
    note(costs, 1, *[0.01] * NUM_TRUSTED)
    note(costs, 4, *[9.0] * 2, *[0.03] * (NUM_TRUSTED - 2))
    assert costs.ratio(1, 4) == pytest.approx(3)

    note(costs, 4, *[0.02] * NUM_KEPT)
    assert costs.ratio(1, 4) == pytest.approx(2)


def test_forgets_what_was_not_seen_for_long() -> None:
    """So that what did not pay once is tried again."""
    costs = StepCosts()
    note(costs, 4, *[0.1] * NUM_TRUSTED)
    note(costs, 1, *[0.01] * MEMORY_STEPS)
    assert costs.ratio(1, 4) == pytest.approx(10)

    note(costs, 1, 0.01)

    assert costs.ratio(1, 4) == pytest.approx((4 + FIXED_ROWS) / (1 + FIXED_ROWS))
