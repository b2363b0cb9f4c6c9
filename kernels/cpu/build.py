"""Builds the C++ ops into the user's cache: `python -m kernels.cpu.build [--force] [--compiler zig] [--isa avx2]`.

An object's place is named by a digest of the sources and flags, the instruction set and the compiler, so that a change
of any makes a new one, and it is moved there when it is whole, so that processes may build at once.
"""

import argparse
import contextlib
import enum
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import platformdirs

from kernels.cpu.isa import FEATURES, Isa, best

SOURCES = pathlib.Path(__file__).parent / "src"
SYSTEM_COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fvisibility-inlines-hidden",
    # What a compiler must not do to floats: fuse a * b + c by itself. Sums are never reordered without -ffast-math.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-sanitize=undefined",
    "-w",
)


class BuildError(Exception):
    """The C++ ops could not be built; the message says with what, and what the compiler said."""


class CompilerChoice(enum.StrEnum):
    """Which compiler to use."""

    AUTO = "auto"
    """The system's, else zig's."""
    SYSTEM = "system"
    ZIG = "zig"


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]
    version: str
    """The first line that `--version` prints."""

    @property
    def name(self) -> str:
        """A short name that is fit for a file: what it is, and a digest of which one."""
        kind = "zig" if "ziglang" in self.command else pathlib.Path(self.command[0]).name.replace("+", "p")
        return f"{kind}-{hashlib.blake2b(self.version.encode(), digest_size=4).hexdigest()}"


def find_compiler(choice: CompilerChoice = CompilerChoice.AUTO) -> Compiler | None:
    """Return the compiler of this choice, or None when there is none."""
    if choice is not CompilerChoice.ZIG:
        for name in SYSTEM_COMPILERS:
            if path := shutil.which(name):
                return _compiler((path,))
    if choice is not CompilerChoice.SYSTEM and importlib.util.find_spec("ziglang") is not None:
        return _compiler((sys.executable, "-m", "ziglang", "c++"))
    return None


def find_object(isa: Isa) -> pathlib.Path | None:
    """Return an object built earlier from these sources, by whichever compiler, or None."""
    objects = sorted(_folder().glob(f"{isa}-*.so"))
    return objects[-1] if objects else None


def build(
    isa: Isa,
    *,
    choice: CompilerChoice = CompilerChoice.AUTO,
    is_forced: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Return the object for an instruction set, building it unless it is there.

    Args:
        isa: the instruction set.
        choice: the compiler.
        is_forced: build even if the object is there.
        report: told what is done, one line each.

    Raises:
        BuildError: no compiler, or it failed.
    """
    compiler = find_compiler(choice)
    if compiler is None:
        wanted = {
            CompilerChoice.AUTO: f"{', '.join(SYSTEM_COMPILERS)} or the ziglang wheel",
            CompilerChoice.ZIG: "the ziglang wheel",
        }
        raise BuildError(f"no C++ compiler: looked for {wanted.get(choice, ', '.join(SYSTEM_COMPILERS))}")
    target = _folder() / f"{isa}-{compiler.name}.so"
    if target.exists() and not is_forced:
        report(f"C++ ops for {isa} are built ({compiler.version})")
        return target
    started = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = _compile(compiler, isa, pathlib.Path(scratch), report)
        whole.replace(target)
    report(f"C++ ops for {isa} built in {time.monotonic() - started:.1f} s ({compiler.version})")
    return target


def _compile(compiler: Compiler, isa: Isa, scratch: pathlib.Path, report: Callable[[str], None]) -> pathlib.Path:
    """Compile every source, some at once, and link them."""
    flags = (*FLAGS, *(f"-m{feature}" for feature in FEATURES[isa]))
    sources = sorted(SOURCES.glob("*.cpp"))

    def compile_one(source: pathlib.Path) -> str:
        _run([*compiler.command, *flags, "-c", str(source), "-o", str(scratch / f"{source.stem}.o")])
        return source.name

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        for done, name in enumerate(workers.map(compile_one, sources), start=1):
            report(f"C++ ops for {isa}: {done}/{len(sources)} {name}")
    whole = scratch / "whole.so"
    _run(
        [
            *compiler.command,
            "-shared",
            "-pthread",
            *(str(each) for each in sorted(scratch.glob("*.o"))),
            "-o",
            str(whole),
        ]
    )
    return whole


def _run(command: Sequence[str]) -> None:
    """Run a compiler; raise with the end of what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 our own words
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")


def _compiler(command: tuple[str, ...]) -> Compiler | None:
    """Ask a command for its version; None when it does not run."""
    with contextlib.suppress(OSError):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)  # noqa: S603 our own words
        if done.returncode == 0:
            return Compiler(command, done.stdout.partition("\n")[0])
    return None


def _folder() -> pathlib.Path:
    """Return the folder of objects of these sources and flags."""
    digest = hashlib.blake2b("\0".join((*FLAGS, *(f"{isa}{FEATURES[isa]}" for isa in Isa))).encode(), digest_size=8)
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in {".cpp", ".h"}:
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return platformdirs.user_cache_path("pathfox") / "kernels" / digest.hexdigest()


def main() -> int:
    """Build from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.cpu.build", description="Build the C++ ops into the user's cache."
    )
    parser.add_argument("--force", action="store_true", help="build even if they are built")
    parser.add_argument("--compiler", type=CompilerChoice, choices=list(CompilerChoice), default=CompilerChoice.AUTO)
    parser.add_argument("--isa", type=Isa, choices=list(Isa), default=best(), help="default: the best of this machine")
    given = parser.parse_args()

    def report(line: str) -> None:
        sys.stderr.write(f"\r\033[K{line}" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()

    try:
        build(given.isa, choice=given.compiler, is_forced=given.force, report=report)
    except BuildError as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    sys.stderr.write("\n" if sys.stderr.isatty() else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
