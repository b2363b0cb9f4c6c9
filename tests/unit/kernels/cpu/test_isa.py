import pathlib

import pytest

from kernels.cpu import isa
from kernels.cpu.isa import Isa

AVX2 = "fma f16c avx2"
AVX512 = "avx512f avx512bw avx512vl avx512dq avx512_vnni"


@pytest.mark.parametrize(
    ("machine", "flags", "wanted"),
    [
        ("x86_64", f"sse {AVX2} {AVX512}", (Isa.AVX512, Isa.AVX2, Isa.PORTABLE)),
        ("x86_64", f"{AVX2} avx512f", (Isa.AVX2, Isa.PORTABLE)),
        ("x86_64", "sse avx2", (Isa.PORTABLE,)),
        ("aarch64", f"{AVX2} {AVX512}", (Isa.PORTABLE,)),
    ],
)
def test_reads_what_the_processor_has(
    machine: str, flags: str, wanted: tuple[Isa, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instruction set is offered only with all its features, the fastest first."""
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(isa, "CPU_INFO", info)
    monkeypatch.setattr(isa.platform, "machine", lambda: machine)

    assert wanted == isa.supported()
