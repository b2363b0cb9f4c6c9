"""Where figures come from: the command, the machine and the versions, so that a result can be judged and repeated."""

import importlib.metadata
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("pathfox-server", "grpcio", "protobuf")
HIDDEN = "***"


def provenance(arguments: Sequence[str]) -> dict[str, object]:
    """Return all of it, by the names that stand in a result."""
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "command": command_line(arguments),
        "machine": machine(),
        "versions": versions(),
    }


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as one could type it, its token hidden."""
    shown = [f"--token={HIDDEN}" if each.startswith("--token=") else each for each in arguments]
    for place, argument in enumerate(arguments[:-1]):
        if argument == "--token":
            shown[place + 1] = HIDDEN
    return shlex.join(["pathfox", *shown])


def machine() -> dict[str, object]:
    """Describe this machine: the client's, and on loopback the server's too."""
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average_1m": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Return the versions of this client and of what it stands on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _cpu_name() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
