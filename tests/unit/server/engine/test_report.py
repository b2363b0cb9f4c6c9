"""Measured rates, and laps by phase."""

import pytest

from server.engine.report import RATE_MEMORY_S, Phase, Rate, Stopwatch


def test_is_zero_until_measured() -> None:
    """A rate that nobody measured is 0, not a division by it."""
    assert Rate().tokens_per_s == 0.0


def test_a_steady_rate_is_reported_as_it_is() -> None:
    """Equal steps give their own rate."""
    rate = Rate()
    for _ in range(50):
        rate.add(32, 0.25)

    assert rate.tokens_per_s == pytest.approx(128.0)


def test_forgets_what_is_long_ago() -> None:
    """After a few time constants only the new rate is left."""
    rate = Rate()
    rate.add(1000, 1.0)
    for _ in range(10):
        rate.add(10, RATE_MEMORY_S)

    assert rate.tokens_per_s == pytest.approx(10 / RATE_MEMORY_S, rel=0.01)


def test_laps_add_up_to_the_time_that_was_not_slept() -> None:
    """Every moment belongs to one phase, but for those that are skipped; what was taken is not reported twice."""
    now_s = 100.0
    watch = Stopwatch(lambda: now_s)
    for phase, seconds in ((Phase.INTAKE, 1.0), (Phase.SCHEDULE, 2.0), (Phase.KERNELS, 4.0), (Phase.KERNELS, 8.0)):
        now_s += seconds
        watch.lap(phase)
    now_s += 1000.0
    watch.skip()
    now_s += 16.0
    watch.lap(Phase.DELIVER)

    assert watch.take() == {Phase.INTAKE: 1.0, Phase.SCHEDULE: 2.0, Phase.KERNELS: 12.0, Phase.DELIVER: 16.0}
    assert watch.take() == {}
