import pathlib
import re
import tomllib
from importlib.metadata import packages_distributions

import pytest

import kernels

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = [
    folder
    for top in ("protos", "server", "kernels", "clients", "tests", "ops")
    for folder in [ROOT / top, *(ROOT / top).glob("*/")]
    if folder.is_dir() and any(folder.glob("*.*")) and folder.name not in {"__pycache__", "pathfox"}
]
PAGES = [*ROOT.glob("*.md"), *(page for room in ROOMS for page in room.rglob("*.md"))]
PINNED = re.compile(r"^[A-Za-z0-9._\[\]-]+==[^\s=]+( ?; .+)?$")


def test_kernels_is_our_package() -> None:
    """`kernels` is imported from this project and not from the package of that name that others publish."""
    owners = set(packages_distributions().get("kernels", ["pathfox-server"]))  # an editable install lists no packages

    assert owners == {"pathfox-server"}
    assert pathlib.Path(kernels.__file__).is_relative_to(ROOT)


def test_direct_dependencies_are_pinned() -> None:
    """Every direct dependency names one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]

    assert [each for each in named if not PINNED.match(each)] == []


def test_lock_files_name_versions_and_no_addresses() -> None:
    """A lock file is a list of pinned names: no index, no link, no path."""
    for lock in ROOT.glob("*.lock"):
        lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]

        assert [line for line in lines if not PINNED.match(line)] == [], lock.name


PATH = re.compile(r"`((?:server|kernels|protos|clients|tests|ops)/[A-Za-z0-9_./-]+\.[a-z]+)`|\]\(([A-Za-z0-9_./-]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_files_that_exist(page: pathlib.Path) -> None:
    """Every path in a page of ours leads somewhere."""
    named = [whole or near for whole, near in PATH.findall(page.read_text())]

    assert [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()] == []


def test_every_room_says_what_it_is() -> None:
    """Each folder has a README of one page."""
    assert [str(room.relative_to(ROOT)) for room in ROOMS if not (room / "README.md").is_file()] == []
