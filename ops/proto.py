"""Generates the stubs that are committed beside the .proto files, or checks that they are fresh.

The proto path is the Python path (`protos/` is on it), so nothing that is generated needs rewriting.

Example:
    .venv/bin/python ops/proto.py            write the stubs
    .venv/bin/python ops/proto.py --check    exit 1 and name what is stale
"""

import pathlib
import sys
import tempfile

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent / "protos"
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(folder: pathlib.Path) -> None:
    """Write the stubs of every .proto under `protos/` into a folder, at their own paths."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{folder}" for kind in ("mypy", "mypy_grpc")]
    # protoc finds its mypy plugins on PATH, which an interpreter called by its path does not set.
    plugins = [
        f"--plugin=protoc-gen-{name}={pathlib.Path(sys.executable).parent / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{WELL_KNOWN}", *plugins, *outputs, *sources]) != 0:
        raise SystemExit("protoc failed; its complaint stands above")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Return the stubs under a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for kind in GENERATED for path in folder.rglob(kind)}


def main() -> int:
    """Write or check; return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        fresh_folder = pathlib.Path(name)
        generate(fresh_folder)
        fresh, committed = contents(fresh_folder), contents(ROOT)
    stale = sorted(path for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    if "--check" in sys.argv[1:]:
        for path in stale:
            sys.stderr.write(f"protos/{path} is stale: run `make proto`\n")
        return 1 if stale else 0
    for path in stale:
        if path in fresh:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_bytes(fresh[path])
        else:
            (ROOT / path).unlink()
    print(f"{len(fresh)} stubs, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
