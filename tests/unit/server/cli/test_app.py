import socket
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "triton",
    "transformers",
    "matplotlib",
    "numpy",
    "tokenizers",
    "kernels",
    "server.engine",
    "server.model",
)
"""What a client has no use for."""
RUN_AND_LIST = """
import sys
from server.cli.app import app
try:
    app()
except SystemExit as ended:
    code = ended.code
print(code, *(name for name in {names} if name in sys.modules), file=sys.stderr)
"""


def imported_by(*arguments: str, names: tuple[str, ...] = HEAVY) -> tuple[int, list[str]]:
    """Run a command in a new process; return its exit code and which of the modules it imported."""
    script = RUN_AND_LIST.format(names=names)
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=50, check=True, input=""
    )
    code, *found = ended.stderr.splitlines()[-1].split()
    return int(code), found


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["status"], ["bench"], ["serve"], ["demo"]])
def test_help_is_light(command: list[str]) -> None:
    """Reading what there is loads neither torch nor a model's room."""
    assert imported_by(*command, "--help") == (0, [])


@pytest.mark.parametrize("command", [["generate", "Hello"], ["status"], ["bench", "--requests", "1"]])
def test_clients_are_light(command: list[str], nobody: str) -> None:
    """A command that calls a server loads nothing that computes."""
    code, found = imported_by(*command, "--address", nobody)

    assert code != 0
    assert found == []


def test_a_server_imports_what_it_computes_with_and_no_more() -> None:
    """A server needs torch; transformers, matplotlib and, without a GPU, Triton are not."""
    script = f"import sys, server.cli.serve; print(*(name for name in {HEAVY} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True)

    assert not {"transformers", "matplotlib", "triton"} & set(ended.stdout.split())
