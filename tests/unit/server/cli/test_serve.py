import gc
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from kernels.cpu import library, threads
from server.cli.serve import start_collecting, use_threads

pytestmark = pytest.mark.usefixtures("needs_compiler")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Leave the ops as many threads as they had."""
    before = library.num_threads()
    yield
    library.set_num_threads(before)


def test_more_threads_than_processors_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server runs with as many as may run, and one warning names the setting, what was asked and what it got."""
    monkeypatch.setattr(threads, "max_num_threads", lambda: 1)
    with capture_logs() as logs:
        use_threads(64)

    (warning,) = logs
    assert library.num_threads() == 1
    assert (warning["event"], warning["log_level"]) == ("threads_reduced", "warning")
    assert (warning["setting"], warning["asked"], warning["used"]) == ("engine.num_threads", 64, 1)


def test_threads_that_may_run_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of a number that fits, hyperthreads included."""
    monkeypatch.setattr(threads, "max_num_threads", lambda: 4)
    with capture_logs() as logs:
        use_threads(3)

    assert (library.num_threads(), logs) == (3, [])


def test_threads_without_ops_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no C++ ops can be built the server starts on the reference, whatever number was asked for."""
    monkeypatch.setattr(library, "is_available", lambda: False)
    monkeypatch.setattr(library, "set_num_threads", lambda _: pytest.fail("there are no ops"))

    use_threads(1)


def test_collecting_starts_when_a_start_has_put_it_off() -> None:
    """What the start made is never walked over again; a process that collects already is left alone."""
    before = gc.get_freeze_count()
    start_collecting()
    untouched = gc.get_freeze_count() - before
    gc.disable()
    try:
        start_collecting()
        is_on, num_frozen = gc.isenabled(), gc.get_freeze_count()
    finally:
        gc.unfreeze()
        gc.enable()

    assert (untouched, is_on) == (0, True)
    assert num_frozen > before + 1000
