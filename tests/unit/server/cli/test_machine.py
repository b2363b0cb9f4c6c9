from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kernels.cpu import cgroups, library, threads
from server.cli.machine import check_machine, memory_bytes, use_threads
from server.config import EngineConfig
from server.errors import ConfigError

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


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/", "memory.max"),
        ("0::/outer/inner", "outer/memory.max"),
        ("3:cpu:/b\n2:memory:/a", "memory/a/memory.limit_in_bytes"),
    ],
)
def test_a_pool_that_can_never_fit_is_refused(
    own: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page pool larger than the memory of the machine, or of a cgroup around, is an error that names both."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    unlimited = memory_bytes()
    (tmp_path / "own").write_text(own)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text("max\n")
    assert memory_bytes() == unlimited
    limit.write_text("1000000\n")

    check_machine(EngineConfig(page_pool_bytes=1_000_000))
    with pytest.raises(ConfigError, match="page_pool_bytes: got 1000001, this process may use 1000000 bytes"):
        check_machine(EngineConfig(page_pool_bytes=1_000_001))


def test_a_device_that_is_not_there_is_refused() -> None:
    """A device that torch does not know, or cannot use here, is an error that names it."""
    with pytest.raises(ConfigError, match=r"engine\.device: cannot use 'abacus'"):
        check_machine(EngineConfig(device="abacus"))
