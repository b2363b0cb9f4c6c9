"""What is installed is what was tested: the wheel holds every package, the C++ sources and the stubs."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOK = """
import kernels, pathfox.client, pathfox.v1.generation_pb2, server.frontend.server, server.engine.engine
from kernels.cpu import build
assert kernels.__file__.startswith({place!r}), kernels.__file__
assert any(build.SOURCES.glob("*.cpp"))
"""


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """Unpacked elsewhere, the wheel imports without this checkout, and its C++ sources are in it."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(place)
    look = f"import sys; sys.path.insert(0, {str(place)!r})" + LOOK.format(place=str(place))
    seen = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert seen.returncode == 0, seen.stderr
