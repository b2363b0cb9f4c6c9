import itertools
import math
import statistics

import pytest

from server.cli.bench.arrivals import due_times_s, mean_rate_per_s

COUNT = 20_000


def gaps(burstiness: float) -> list[float]:
    """Draw many arrivals at 50/s and return the times between them."""
    times = due_times_s(COUNT, rate_per_s=50, burstiness=burstiness, seed=1)
    return [later - sooner for sooner, later in itertools.pairwise(times)]


def test_a_closed_loop_has_no_times() -> None:
    """Without a rate all requests are due at once."""
    assert due_times_s(3) == [0.0, 0.0, 0.0]


def test_the_same_seed_gives_the_same_times() -> None:
    """Times are a function of the seed."""
    assert due_times_s(50, rate_per_s=5, seed=7) == due_times_s(50, rate_per_s=5, seed=7)
    assert due_times_s(50, rate_per_s=5, seed=7) != due_times_s(50, rate_per_s=5, seed=8)


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0, math.inf])
def test_the_last_request_is_due_exactly_when_the_rate_says(burstiness: float) -> None:
    """Whatever was drawn, N requests at R per second take N / R seconds, and none is due before the one ahead of it."""
    times = due_times_s(100, rate_per_s=4, burstiness=burstiness, seed=3)

    assert times[-1] == pytest.approx(25)
    assert times == sorted(times)
    assert times[0] > 0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gamma_distribution(burstiness: float) -> None:
    """Gaps have the mean 1 / rate and the variance of a gamma distribution: mean squared / burstiness."""
    seen = gaps(burstiness)

    assert statistics.fmean(seen) == pytest.approx(1 / 50, rel=1e-3)
    assert statistics.variance(seen) == pytest.approx((1 / 50) ** 2 / burstiness, rel=0.1)


def test_infinite_burstiness_is_even() -> None:
    """All gaps are the same."""
    assert gaps(math.inf) == pytest.approx([1 / 50] * (COUNT - 1))


def test_a_ramp_goes_from_one_rate_to_the_other() -> None:
    """The first gap is that of --rate, the last one that of --ramp-to."""
    times = due_times_s(5, rate_per_s=1, ramp_to_per_s=5, burstiness=math.inf)

    assert times == pytest.approx(list(itertools.accumulate([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])))


@pytest.mark.parametrize("ends", [(2.0, 10.0), (10.0, 2.0), (3.0, 3.0), (3.0, None)])
def test_the_mean_rate_says_how_long_a_run_takes(ends: tuple[float, float | None]) -> None:
    """Requests by the mean rate are the time until the last one."""
    times = due_times_s(1000, rate_per_s=ends[0], ramp_to_per_s=ends[1], burstiness=math.inf)

    assert times[-1] == pytest.approx(1000 / mean_rate_per_s(*ends), rel=0.01)
