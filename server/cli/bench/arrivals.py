"""When requests are due: an open loop keeps its times whatever the server does, a closed loop waits for answers."""

import itertools
import math
import random


def due_times_s(
    count: int,
    *,
    rate_per_s: float = math.inf,
    burstiness: float = 1.0,
    ramp_to_per_s: float | None = None,
    seed: int = 0,
) -> list[float]:
    """Return when each request is due, in seconds after the start; vLLM's meaning of every word.

    Gaps follow a gamma distribution with the mean 1 / rate. Without a ramp they are stretched so that the last request
    is due after exactly count / rate: runs of different seeds then offer the same load.

    Args:
        count: of requests.
        rate_per_s: requests per second on average; infinite = a closed loop: all are due at once, and concurrency
            decides.
        burstiness: shape of the gamma distribution: below 1 in bursts, 1 = Poisson, above 1 more even, infinite = even.
        ramp_to_per_s: the rate rises (or falls) to this one, in equal steps from request to request.
        seed: same seed, same times.
    """
    if math.isinf(rate_per_s):
        return [0.0] * count
    source = random.Random(seed)  # noqa: S311 not a secret
    step_per_s = 0.0 if ramp_to_per_s is None else (ramp_to_per_s - rate_per_s) / max(count - 1, 1)
    gaps_s = [_gap(source, burstiness) / (rate_per_s + step_per_s * place) for place in range(count)]
    stretch = 1.0 if ramp_to_per_s is not None else count / rate_per_s / math.fsum(gaps_s)
    return [due_s * stretch for due_s in itertools.accumulate(gaps_s)]


def mean_rate_per_s(rate_per_s: float, ramp_to_per_s: float | None) -> float:
    """Return how many requests come per second over a whole run: of a ramp, the logarithmic mean of its ends."""
    if ramp_to_per_s is None or ramp_to_per_s == rate_per_s:
        return rate_per_s
    return (ramp_to_per_s - rate_per_s) / math.log(ramp_to_per_s / rate_per_s)


def _gap(source: random.Random, burstiness: float) -> float:
    """Draw a gap in units of its mean."""
    return 1.0 if math.isinf(burstiness) else source.gammavariate(burstiness, 1 / burstiness)
