"""How many threads this process may keep busy."""

import math
import os
import pathlib

CGROUP_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def default_num_threads() -> int:
    """Return the physical cores that the affinity mask allows, bounded by the cgroup's quota; at least 1."""
    cores = _num_physical_cores(_allowed_cpus())
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def max_num_threads() -> int:
    """Return the logical processors that the affinity mask allows, bounded by the cgroup's quota; at least 1.

    More threads than these would wait for each other's processors in the middle of every op.
    """
    cpus, quota = len(_allowed_cpus()), _cgroup_quota()
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


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


def _cgroup_quota() -> float | None:
    """Return the processors that the cgroup grants, or None for no limit."""
    if not CGROUP_QUOTA.exists():
        return None
    quota, _, period = CGROUP_QUOTA.read_text().partition(" ")
    return None if quota == "max" else int(quota) / int(period)
