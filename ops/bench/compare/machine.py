"""What the machine is, and how busy others keep it."""

import contextlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
L3_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

num_cores = os.cpu_count() or 1


def describe() -> dict[str, str | int | list[str]]:
    """Return what a reader of the results needs to know of the machine."""
    facts = _processor()
    return {
        "processor": facts.get("model name", platform.processor()),
        "family_model_stepping": "/".join(facts.get(each, "?") for each in ("cpu family", "model", "stepping")),
        "cores": num_cores,
        "isa": [flag for flag in ISA_FLAGS if flag in flags()],
        "l3_cache": _first_line(L3_CACHE),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "governor": _first_line(GOVERNOR),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def flags() -> set[str]:
    """Return the instruction sets that the processor has."""
    return set(_processor().get("flags", "").split())


def _first_line(file: Path) -> str:
    return file.read_text().strip() if file.exists() else "not shown by this machine"


def _processor() -> dict[str, str]:
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def busy_s() -> float:
    """Return how long the machine's cores were busy since it started, also with what its host took away."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def cpu_s(process_ids: Iterable[int]) -> float:
    """Return the CPU time of processes and of the children that they have waited for."""
    return sum(map(_cpu_s, process_ids))


def _cpu_s(process_id: int) -> float:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICKS_PER_S
    return 0.0
