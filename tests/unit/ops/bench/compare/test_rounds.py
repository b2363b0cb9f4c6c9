from collections.abc import Iterator
from typing import Self

import pytest

from ops.bench.compare import machine
from ops.bench.compare.prompts import Measure, draw
from ops.bench.compare.rounds import MAX_TRIES, Sample, take, take_rounds

MEASURE = Measure("8 streams", 8, 16, 4)


class Metronome:
    """A contender that always takes a second, with a clock and a machine to match."""

    name = "metronome"

    def __init__(self, others_s: Iterator[float]) -> None:
        self.now_s = self.busy_s = 0.0
        self.versions: dict[str, str] = {}
        self.seeds: list[int] = []
        self._others_s = others_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return

    def rate(self, measure: Measure, seed: int) -> float:
        self.seeds.append(seed)
        self.now_s += 1
        if measure is MEASURE:
            self.busy_s += next(self._others_s)
        return 100.0 + len(self.seeds)

    def cpu_s(self) -> float:
        return 0.0


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, whatever runs the tests."""
    monkeypatch.setattr(machine, "num_cores", 2)


def taken(contender: Metronome, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Take one sample on a machine that is as busy as the contender says."""
    monkeypatch.setattr(machine, "busy_s", lambda: contender.busy_s)
    return take(contender, MEASURE, 1, clock=lambda: contender.now_s)


@pytest.mark.usefixtures("cores")
def test_a_disturbed_sample_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try lost a quarter of the cores to others, the second nothing: the second counts."""
    sample = taken(Metronome(iter([0.5, 0.0])), monkeypatch)
    assert (sample.tries, sample.others_share, sample.tokens_per_s) == (2, 0.0, 102.0)


@pytest.mark.usefixtures("cores")
def test_the_cleanest_try_counts_when_all_are_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last try the sample is kept, and says that it is disturbed."""
    sample = taken(Metronome(iter([0.5, 0.2, 0.4, 0.6])), monkeypatch)
    assert (sample.tries, sample.is_disturbed, sample.others_share) == (MAX_TRIES, True, 0.1)


def test_no_prompt_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds differ between repeats, tries and rounds: a prefix cache has nothing to find."""
    contender = Metronome(iter([0.5] * 50))
    monkeypatch.setattr(machine, "busy_s", lambda: contender.busy_s)
    take_rounds([contender], [MEASURE], 3, on_sample=lambda _: None, clock=lambda: contender.now_s)
    assert len(set(contender.seeds)) == len(contender.seeds)


def test_prompts_are_the_same_for_everybody_and_differ_by_part() -> None:
    """The same question gives the same prompts; the short and the long generation do not share any."""
    assert draw(MEASURE, 7, part=0) == draw(MEASURE, 7, part=0)
    assert not {tuple(each) for each in draw(MEASURE, 7, part=0)} & {tuple(each) for each in draw(MEASURE, 7, part=1)}
