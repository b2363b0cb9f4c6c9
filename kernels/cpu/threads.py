"""How many threads this process may keep busy. Read anew at every start: masks and quotas change."""

import math
import os
import pathlib
from collections.abc import Iterator

from kernels.cpu import cgroups

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def default_num_threads() -> int:
    """Return the physical cores that the affinity mask allows, bounded by the cgroups' quota; at least 1."""
    cores = _num_physical_cores(_allowed_cpus())
    return max(1, min([cores, *(int(quota) for quota in _cgroup_quotas())]))


def max_num_threads() -> int:
    """Return the logical processors that the affinity mask allows, bounded by the cgroups' quota; at least 1.

    More threads than these would wait for each other's processors in the middle of every op.
    """
    return max(1, min([len(_allowed_cpus()), *(math.ceil(quota) for quota in _cgroup_quotas())]))


def _allowed_cpus() -> list[int]:
    """Return the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _num_physical_cores(cpus: list[int]) -> int:
    """Count cores: hyperthreads of one core share its vector units, and a second one does not help."""
    cores = set()
    for cpu in cpus:
        siblings = pathlib.Path(SIBLINGS.format(cpu))
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    return len(cores)


def _cgroup_quotas() -> Iterator[float]:
    """Yield the processors that each group around this process grants, of those that set a limit."""
    for folder in cgroups.folders("cpu"):
        v2, v1 = folder / "cpu.max", folder / "cpu.cfs_quota_us"
        if v2.exists():
            quota, _, period = v2.read_text().partition(" ")
        elif v1.exists():
            quota, period = v1.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
        else:
            continue
        if quota not in {"max", "-1"}:
            yield int(quota) / int(period)
