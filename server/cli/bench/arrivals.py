"""When requests are due: an open loop keeps its times whatever the server does, a closed loop waits for answers."""

import enum
import random

from server.errors import ConfigError


class Process(enum.StrEnum):
    """How the gaps of an open loop are drawn."""

    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"


def due_times_s(
    count: int, *, rate_per_s: float | None, process: Process = Process.POISSON, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Return when each request is due, in seconds after the start.

    Args:
        count: of requests.
        rate_per_s: requests per second on average; None = a closed loop: all are due at once, and concurrency decides.
        process: of the gaps, which all have the mean 1 / rate.
        burstiness: shape of the gamma distribution: below 1 in bursts, 1 = Poisson, above 1 more even.
        seed: same seed, same times.

    Raises:
        ConfigError: a rate or burstiness that is not above 0.
    """
    if rate_per_s is None:
        return [0.0] * count
    if not 0 < rate_per_s < float("inf"):
        raise ConfigError(f"--rate: got {rate_per_s:g}, want a number above 0")
    if not 0 < burstiness < float("inf"):
        raise ConfigError(f"--burstiness: got {burstiness:g}, want a number above 0")
    draw = random.Random(seed)  # noqa: S311 not a secret
    shape = burstiness if process is Process.GAMMA else 1.0
    due_s, times_s = 0.0, []
    for _ in range(count):
        times_s.append(due_s)
        is_even = process is Process.CONSTANT
        due_s += 1 / rate_per_s if is_even else draw.gammavariate(shape, 1 / (rate_per_s * shape))
    return times_s
