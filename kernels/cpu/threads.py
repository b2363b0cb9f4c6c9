"""How many threads this process may keep busy. Read anew at every start: masks and quotas change."""

import math
import os
import pathlib
from collections.abc import Iterator

CGROUPS = pathlib.Path("/sys/fs/cgroup")
OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
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
    for folder in _cgroup_folders():
        v2, v1 = folder / "cpu.max", folder / "cpu.cfs_quota_us"
        if v2.exists():
            quota, _, period = v2.read_text().partition(" ")
        elif v1.exists():
            quota, period = v1.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
        else:
            continue
        if quota not in {"max", "-1"}:
            yield int(quota) / int(period)


def _cgroup_folders() -> Iterator[pathlib.Path]:
    """Yield the folders of the CPU controller, from this process's group up to the root.

    A container may see the path of its group on the host and only its own group mounted: what does not exist is left
    out by the caller.
    """
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers  # version 2 names no controllers
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            yield root / str(group).lstrip("/")
