import pytest

from ops.bench.soak import TOLERANCES, flatness

TIMES_S = [2.0 * place for place in range(300)]


@pytest.mark.parametrize("name", TOLERANCES)
def test_what_stays_is_flat_and_what_grows_is_not(name: str) -> None:
    """Growth is what a straight line adds in ten minutes."""
    steady = flatness(name, TIMES_S, [100.0 + place % 2 for place in range(300)])
    growing = flatness(name, TIMES_S, [100.0 + 0.1 * at_s for at_s in TIMES_S])
    assert steady.is_flat
    assert not growing.is_flat
    assert growing.growth == pytest.approx(60.0)


def test_one_spike_is_no_growth() -> None:
    """A moment of load in the middle of a soak says nothing about its slope."""
    assert flatness("tasks", TIMES_S, [300.0 if place == 150 else 100.0 for place in range(300)]).is_flat
