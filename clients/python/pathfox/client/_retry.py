"""When a failed call is sent again, and when it is left alone.

The rule, for every call: only while nothing of the answer has been seen, only within the caller's `timeout_s`, and only
as long as the client's retry budget lasts (a tenth of the calls that succeed, so that a server in trouble is not met
with a multiple of its load).

- A call that does not change anything (models, tokenize, score, status ...) is sent again after RESOURCE_EXHAUSTED and
  UNAVAILABLE.
- A generation is sent again only when the server itself said when to come back (`RetryInfo`): it refused without
  beginning. A connection that broke leaves open whether it began; then it is sent again only with an
  `idempotency_key`, by which the server attaches to the first run instead of beginning a second.
- A conversation (`chat`) and what steers the server (drain, traffic) are never sent again.
"""

import enum
import random
import threading
import time
from dataclasses import dataclass

import grpc

from pathfox.client._errors import Failure, error_from, read_failure

_RETRIABLE = frozenset((grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE))
_BUDGET = 10.0
_EARNED_BY_SUCCESS = 0.1
_GROWTH = 2.0


class Repeat(enum.Enum):
    """What a second sending of a call means."""

    SAFE = enum.auto()
    IF_INVITED = enum.auto()
    NEVER = enum.auto()


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a client is. `Retry(max_attempts=1)` never sends a call twice."""

    max_attempts: int = 3
    initial_backoff_s: float = 0.1
    """Where the server does not say when to come back: twice as long each time, of which a random part is waited."""
    max_wait_s: float = 10.0
    """A server that says to come back later than this is not waited for."""


class Budget:
    """Retries that a client may still make; each costs one, each success earns a tenth. Shared by threads."""

    def __init__(self) -> None:
        self._left = _BUDGET
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Spend one retry, if there is one."""
        with self._lock:
            if self._left < 1:
                return False
            self._left -= 1
            return True

    def earn(self) -> None:
        """Count a success."""
        with self._lock:
            self._left = min(_BUDGET, self._left + _EARNED_BY_SUCCESS)


class Attempts:
    """The sendings of one call: how much time the next one has, and whether there is a next one."""

    def __init__(self, retry: Retry, budget: Budget, repeat: Repeat, timeout_s: float | None) -> None:
        self._retry = retry
        self._budget = budget
        self._repeat = repeat
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._made = 0
        self._has_begun = False

    def remaining_s(self) -> float | None:
        """Return what is left of the caller's time, for the next sending."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def begun(self) -> None:
        """Note that a part of the answer has been seen: from now on nothing is sent again."""
        self._has_begun = True

    def succeeded(self) -> None:
        """Note the end of a good call."""
        self._budget.earn()

    def wait_s(self, error: grpc.RpcError) -> float:
        """Return how long to wait before the next sending.

        Raises:
            PathfoxError: there is none; this is how the call ended.
        """
        failure = read_failure(error)
        self._made += 1
        wait_s = self._wait_after(failure)
        if wait_s is None:
            raise error_from(failure) from error
        return wait_s

    def _wait_after(self, failure: Failure) -> float | None:
        invited_s = failure.retry_after_s
        may_repeat = self._repeat is Repeat.SAFE or (self._repeat is Repeat.IF_INVITED and invited_s is not None)
        if (
            self._has_begun
            or not may_repeat
            or failure.code not in _RETRIABLE
            or self._made >= self._retry.max_attempts
            or str(failure.trailers.get("grpc-retry-pushback-ms", "")).startswith("-")
        ):
            return None
        backoff_s = self._retry.initial_backoff_s * _GROWTH ** (self._made - 1)
        wait_s = random.uniform(0, backoff_s) if invited_s is None else invited_s  # noqa: S311 (spreads load)
        remaining_s = self.remaining_s()
        if wait_s > self._retry.max_wait_s or (remaining_s is not None and wait_s >= remaining_s):
            return None
        return wait_s if self._budget.take() else None
