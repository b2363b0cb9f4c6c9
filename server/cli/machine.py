"""What is asked of this machine next to what it has: found out before a model is loaded, and named where it is more."""

import os
from collections.abc import Iterator

import structlog
import torch

from kernels.cpu import cgroups, library, threads
from server.config import EngineConfig
from server.errors import ConfigError

log = structlog.get_logger(__name__)


def check_machine(config: EngineConfig) -> None:
    """Set what this process may use up, as configured.

    Raises:
        ConfigError: there is no such device, or the page pool could never fit into memory.
    """
    check_device(config.device)
    limit_bytes = memory_bytes()
    if torch.device(config.device).type == "cpu" and config.page_pool_bytes > limit_bytes:
        # It takes memory only as it fills: without this the process would be killed for it in the middle of its work.
        raise ConfigError(
            f"engine.page_pool_bytes: got {config.page_pool_bytes}, this process may use {limit_bytes} bytes in all"
        )
    if config.num_threads is not None:
        use_threads(config.num_threads)


def check_device(name: str) -> None:
    """Find out whether there is such a device.

    Raises:
        ConfigError: torch knows no device of this name, or cannot use it here.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"engine.device: cannot use {name!r}: {reason}") from None


def use_threads(count: int) -> None:
    """Let the CPU ops use so many threads, or as many as may run here, and say so."""
    limit = threads.max_num_threads()
    if count > limit:
        reason = "this process may use no more processors (affinity mask, cgroup quota)"
        log.warning("threads_reduced", setting="engine.num_threads", asked=count, used=limit, reason=reason)
    if library.is_available():
        library.set_num_threads(min(count, limit))


def memory_bytes() -> int:
    """Return this machine's memory, bounded by the limits of all cgroups around this process."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def _memory_limits() -> Iterator[int]:
    for folder in cgroups.folders("memory"):
        for file in (folder / "memory.max", folder / "memory.limit_in_bytes"):  # versions 2 and 1
            if file.exists() and (limit := file.read_text().strip()) != "max":
                yield int(limit)
