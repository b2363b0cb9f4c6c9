import pathlib
import stat

import platformdirs
import pytest

from kernels.cpu import build, isa
from kernels.cpu.build import BuildError, CompilerChoice
from kernels.cpu.isa import Isa

SOURCE = """
#include <cstdint>
extern "C" int32_t answer() { return 42; }
"""


@pytest.fixture(autouse=True)
def tiny_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """One small source, and a cache of its own."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return sources


@pytest.mark.usefixtures("needs_compiler")
def test_builds_once() -> None:
    """The second build finds what the first one made; a forced one replaces it; nothing else is left behind."""
    first = build.build(Isa.PORTABLE)
    made = first.stat().st_mtime_ns
    second = build.build(Isa.PORTABLE)
    kept = second.stat().st_mtime_ns
    forced = build.build(Isa.PORTABLE, is_forced=True)

    assert first == second == forced == build.find_object(Isa.PORTABLE)
    assert made == kept < forced.stat().st_mtime_ns
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.usefixtures("needs_compiler")
def test_a_changed_source_is_another_object(tiny_library: pathlib.Path) -> None:
    """Objects of other sources are never taken for these."""
    before = build.build(Isa.PORTABLE)
    (tiny_library / "answer.cpp").write_text(SOURCE.replace("42", "43"))

    assert build.find_object(Isa.PORTABLE) is None
    assert before.parent != build.build(Isa.PORTABLE).parent


@pytest.mark.usefixtures("needs_compiler")
def test_says_what_the_compiler_said(tiny_library: pathlib.Path) -> None:
    """A source that does not compile gives the compiler's words, and leaves no object."""
    (tiny_library / "answer.cpp").write_text("this is no C++")

    with pytest.raises(BuildError, match=r"answer\.cpp:1:1: error"):
        build.build(Isa.PORTABLE)
    assert build.find_object(Isa.PORTABLE) is None


def test_says_what_it_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any compiler the error names those that would do."""
    monkeypatch.setattr(build, "find_compiler", lambda _: None)

    with pytest.raises(BuildError, match="ziglang"):
        build.build(Isa.PORTABLE)


def test_a_compiler_that_does_not_run_is_none(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that cannot say its version is not used."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build.shutil, "which", lambda _: str(broken))

    assert build.find_compiler(CompilerChoice.SYSTEM) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zig_builds_it() -> None:
    """The ziglang wheel is enough of a compiler."""
    pytest.importorskip("ziglang")

    assert "zig" in build.build(isa.best(), choice=CompilerChoice.ZIG).name
