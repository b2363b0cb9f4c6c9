"""Where Linux keeps the limits of the groups around this process, of cgroups' versions 1 and 2."""

import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path("/sys/fs/cgroup")
OWN_GROUPS = pathlib.Path("/proc/self/cgroup")


def folders(controller: str) -> Iterator[pathlib.Path]:
    """Yield the folders of a controller (`cpu`, `memory`), from this process's group up to the root.

    A container may see the path of its group on the host and only its own group mounted: what does not exist is left
    out by the caller.
    """
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = ROOT / controllers  # version 2 names no controllers
        for group in (pathlib.PurePosixPath(path), *pathlib.PurePosixPath(path).parents):
            yield root / str(group).lstrip("/")
