"""Takes the samples: one measure after the other, in each of them one contender after the other, round by round.

The load of other processes is watched during each sample. One that was disturbed is taken again; one that stays
disturbed is kept, marked, and left out of the medians.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ops.bench.compare import machine
from ops.bench.compare.contenders import Contender
from ops.bench.compare.prompts import WARM_UP, Measure

MAX_OTHERS_SHARE = 0.06
"""Of the cores; whatever others use beyond it spoils a sample."""
MAX_TRIES = 4
MIN_SAMPLE_S = 1.0
"""A sample repeats its measure for so long: the kernel counts CPU time in ticks of 10 ms."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender, one measure, one round."""

    contender: str
    measure: str
    round: int
    tokens_per_s: float
    """The median of the repeats."""
    others_share: float
    """Of the cores that other processes, and idle contenders, used meanwhile."""
    tries: int

    @property
    def is_disturbed(self) -> bool:
        """Whether others used too much even at the best of all tries."""
        return self.others_share > MAX_OTHERS_SHARE


def take_rounds(
    contenders: Sequence[Contender],
    measures: Sequence[Measure],
    count: int,
    *,
    on_sample: Callable[[Sample], None],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Sample]:
    """Take all samples; tells of each as it comes."""
    for contender in contenders:
        contender.rate(WARM_UP, 0)
    samples = []
    for number in range(1, count + 1):
        for measure in measures:
            for contender in contenders:
                samples.append(take(contender, measure, number, clock=clock))
                on_sample(samples[-1])
    return samples


def take(contender: Contender, measure: Measure, number: int, *, clock: Callable[[], float]) -> Sample:
    """Take one sample, again while others disturb it; the cleanest try counts."""
    tries: list[Sample] = []
    while len(tries) < MAX_TRIES and (not tries or tries[-1].is_disturbed):
        seed = number * MAX_TRIES + len(tries)
        others_s = machine.busy_s() - contender.cpu_s()
        rates: list[float] = []
        begun = clock()
        while not rates or clock() - begun < MIN_SAMPLE_S:
            rates.append(contender.rate(measure, seed * 1000 + len(rates)))
        duration_s = clock() - begun
        others_s = machine.busy_s() - contender.cpu_s() - others_s
        share = max(0.0, others_s / (duration_s * machine.num_cores))
        tries.append(Sample(contender.name, measure.name, number, median(rates), round(share, 4), len(tries) + 1))
    best = min(tries, key=lambda each: each.others_share)
    return replace(best, tries=len(tries))
