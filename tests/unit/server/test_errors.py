import pickle

import pytest

from server import errors

EXAMPLES: list[errors.PathfoxError] = [
    errors.PathfoxError("a"),
    errors.InvalidRequest.of("field", seen="x" * 1000, limit="short"),
    errors.InvalidRequest([errors.violation("a", seen=1, limit="2"), errors.violation("b", seen=3, limit="4")]),
    errors.ContextLengthExceeded(prompt_tokens=9, max_tokens=1, limit=8),
    errors.IdempotencyMismatch([errors.violation("idempotency_key", seen="k", limit="the same body")]),
    errors.NotFound("model", "m", hint="known: a"),
    errors.FailedPrecondition("a"),
    errors.Unauthenticated("a"),
    errors.PermissionDenied("a"),
    errors.Conflict("a", current_version=7),
    errors.Overloaded("a", retry_after_s=1.5, subject="tenant"),
    errors.DeadlineUnmeetable("a", subject="deadline"),
    errors.Unavailable("a", retry_after_s=None, subject="DRAINING"),
    errors.DeadlineExceeded("a"),
    errors.NotSupported("a"),
    errors.SourceLost("a"),
    errors.StartupError("a"),
    errors.ConfigError("a"),
    errors.ModelLoadError("/path", "problem"),
    errors.Internal("a"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_survives_pickle(error: errors.PathfoxError) -> None:
    """An error keeps its type, words and facts across processes."""
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 our own bytes

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.metadata() == error.metadata()


def test_every_class_is_tried() -> None:
    """A new class comes with an example here."""

    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert below(errors.PathfoxError) - {errors._ComeBackLater} == {type(error) for error in EXAMPLES}


def test_a_long_value_is_cut() -> None:
    """What a client sent comes back short enough for a log line."""
    seen = errors.violation("f", seen="x" * 10_000, limit="short").seen

    assert len(seen) == errors.MAX_SEEN_CHARACTERS
