"""When drafts pay: how many rows of guessed tokens a step of decode rows takes along.

A plain step of B sequences has B rows and gives B tokens. With drafts it has R rows, takes c(R) times as long, and
gives one token more for every draft that is right as far as those before it in its sequence are. If the drafts of a
sequence are right at rate a, its j-th draft counts with probability a^j, so the R - B drafted rows of the largest a^j
are worth most, and tokens a second change by

    gain(R) = (1 + sum of their a^j / B) / c(R)

The R of the largest gain is taken if that is more than `MARGIN`, else no draft. Both sides are measured: c by
`StepCosts`, a by `Drafter`. With many sequences a row costs more, with a text that does not repeat a is small: one
formula says no. By the prefix law the answer is the same in every case.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from server.engine.costs import StepCosts
from server.engine.drafts import Drafter, Rates
from server.engine.sequence import Sequence

STEP_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""R: few values, so that each is measured often, and whoever records the shape of a batch records few."""
MAX_DRAFT_TOKENS = 15
MAX_LOOKUPS = 8
"""So many sequences, in turn, are looked at in one step: some 0.1 ms."""
MARGIN = 1.05
"""A gain within the error of measurement is none."""
BEST_RATE = 0.95
"""If even drafts as good as this do not pay, nobody looks for any."""


class Speculation:
    """Chooses the drafts of a step.

    Args:
        costs: told by the caller what steps took.
    """

    def __init__(self, costs: StepCosts | None = None) -> None:
        self.costs = costs or StepCosts()
        self._rates = Rates()
        self._turn = 0

    def choose(
        self, sequences: Many[Sequence], room: Callable[[Sequence], int], max_rows: int
    ) -> list[tuple[Sequence, int]]:
        """Write drafts behind the tokens of sequences; return which have some, and how many.

        Args:
            sequences: all that have one row in the step.
            room: how many drafted tokens a sequence can take.
            max_rows: of the step.
        """
        num_plain = len(sequences)
        sizes = self._payable_sizes(num_plain, max_rows)
        if not sizes:
            return []
        chances = self._chances(sequences, room)
        best_gain, best_rows = MARGIN, 0
        for num_rows, cost in sizes:
            num_drafted = num_rows - num_plain
            expected = sum(chance for chance, _ in chances[:num_drafted])
            gain = (1 + expected / num_plain) / cost
            if num_drafted <= len(chances) and gain > best_gain:
                best_gain, best_rows = gain, num_drafted
        counts: dict[Sequence, int] = {}
        for _, sequence in chances[:best_rows]:
            counts[sequence] = counts.get(sequence, 0) + 1
        return list(counts.items())

    def _payable_sizes(self, num_plain: int, max_rows: int) -> list[tuple[int, float]]:
        """Return the sizes that pay if all drafts are good, and their costs."""
        sizes: list[tuple[int, float]] = []
        most_rows = min(max_rows, num_plain + min(num_plain, MAX_LOOKUPS) * MAX_DRAFT_TOKENS)
        for num_rows in STEP_ROWS:
            if num_plain < num_rows <= most_rows:
                cost = self.costs.ratio(num_plain, num_rows)
                if cost is not None and 1 + BEST_RATE * (num_rows - num_plain) / num_plain > MARGIN * cost:
                    sizes.append((num_rows, cost))
        return sizes

    def _chances(self, sequences: Many[Sequence], room: Callable[[Sequence], int]) -> list[tuple[float, Sequence]]:
        """Look some sequences up; return the probability of each token that could be drafted, best first."""
        chances: list[tuple[float, Sequence]] = []
        for place in range(min(len(sequences), MAX_LOOKUPS)):
            sequence = sequences[(self._turn + place) % len(sequences)]
            if sequence.drafter is None:
                sequence.drafter = Drafter(self._rates)
            draft = sequence.drafter.draft(sequence.known_tokens, MAX_DRAFT_TOKENS)
            if draft is None:
                continue
            count = min(room(sequence), MAX_DRAFT_TOKENS)
            sequence.token_ids[draft.position : draft.position + count] = draft.token_ids[:count]
            rate = sequence.drafter.rate(draft)
            chances += [(rate**power, sequence) for power in range(1, count + 1)]
        self._turn += MAX_LOOKUPS
        chances.sort(key=_by_chance)
        return chances


def _by_chance(chance: tuple[float, Sequence]) -> float:
    return -chance[0]
