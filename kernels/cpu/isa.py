"""The instruction sets that the C++ ops are built for, and which of them this machine has.

All of them give the same bits; they differ in speed only.
"""

import enum
import pathlib
import platform


class Isa(enum.StrEnum):
    """An instruction set with an object of its own."""

    AVX512 = "avx512"
    """AVX-512 with VNNI (server x86 from Ice Lake and Zen 4 on)."""
    AVX2 = "avx2"
    """AVX2 with FMA and F16C (x86 from Haswell and Zen on)."""
    PORTABLE = "portable"
    """Plain C++, vectorised by the compiler; meant for machines other than x86."""


AVX2_FEATURES = ("avx2", "fma", "f16c")
AVX512_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
FEATURES = {Isa.AVX512: AVX2_FEATURES + AVX512_FEATURES, Isa.AVX2: AVX2_FEATURES, Isa.PORTABLE: ()}
"""The compiler's names of what each object uses."""

X86 = ("x86_64", "AMD64")
CPU_INFO = pathlib.Path("/proc/cpuinfo")


def supported() -> tuple[Isa, ...]:
    """Return the instruction sets that run on this machine, the fastest first."""
    has = _cpu_features()
    return tuple(isa for isa in Isa if has.issuperset(FEATURES[isa]))


def best() -> Isa:
    """Return the fastest instruction set of this machine."""
    return supported()[0]


def is_x86() -> bool:
    """Say whether this is a machine that could have the x86 sets."""
    return platform.machine() in X86


def missing(wanted: Isa) -> list[str]:
    """Return the features that an instruction set asks for and this machine lacks."""
    has = _cpu_features()
    return [feature for feature in FEATURES[wanted] if feature not in has]


def _cpu_features() -> frozenset[str]:
    """Read this processor's features, under the compiler's names; none where they cannot be told."""
    if not is_x86() or not CPU_INFO.exists():
        return frozenset()
    for line in CPU_INFO.read_text().splitlines():
        name, _, features = line.partition(":")
        if name.strip() == "flags":
            return frozenset(features.replace("avx512_vnni", "avx512vnni").split())
    return frozenset()
