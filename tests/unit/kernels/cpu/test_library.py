import pathlib
from collections.abc import Iterator

import pytest
import torch
from structlog.testing import capture_logs

from kernels.backend import Backend, backend_of
from kernels.cpu import build, isa, library
from kernels.cpu.build import BuildError
from kernels.cpu.isa import Isa
from kernels.linear import linear, pack
from kernels.weights import Encoding
from tests.fixtures.kernels import CPU, random_matrix, random_rows


@pytest.fixture
def without_object(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded nothing, on a machine without a compiler."""

    def fail(*_: object) -> None:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(library, "_active", None)
    monkeypatch.setattr(build, "find_object", lambda _: None)
    monkeypatch.setattr(build, "build", fail)
    library._default.cache_clear()
    library._open.cache_clear()
    yield
    library._default.cache_clear()
    library._open.cache_clear()


@pytest.mark.usefixtures("without_object")
def test_falls_back_to_the_reference_and_says_so_once() -> None:
    """Without an object ops run on the reference; one warning says what is lost and how to mend it."""
    with capture_logs() as logs:
        backends = [backend_of(torch.device("cpu")) for _ in range(3)]

    assert backends == [Backend.REFERENCE] * 3
    assert [(each["event"], each["log_level"]) for each in logs] == [("cpu_kernels_unavailable", "warning")]
    assert "prefix law" in logs[0]["lost"]
    assert "kernels.cpu.build" in logs[0]["remedy"]


@pytest.mark.usefixtures("without_object")
def test_loading_without_an_object_raises() -> None:
    """Who asks for the C++ ops by name gets the reason why there are none."""
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        library.load()


@pytest.mark.usefixtures("needs_compiler")
def test_a_processor_without_avx2_runs_the_portable_object(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is chosen by name, one warning says what is missing and what that costs, and every bit stays the same."""
    weight, x = pack([random_matrix(Encoding.Q4_1, 48, 96)], device=CPU), random_rows(3, 96)
    wanted = linear(x, weight)
    (tmp_path / "cpuinfo").write_text("flags : sse2 sse4_2 avx fma\n")
    monkeypatch.setattr(isa, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "_active", None)
    with capture_logs() as logs:
        seen = [linear(x, weight) for _ in range(2)]

    assert library.active_isa() is Isa.PORTABLE
    assert [(each["event"], each["missing"]) for each in logs] == [("cpu_kernels_portable", ["avx2", "f16c"])]
    assert all(torch.equal(wanted, each) for each in seen)
