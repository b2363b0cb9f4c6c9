import pytest

from server.cli.bench.provenance import command_line, machine, provenance


@pytest.mark.parametrize("arguments", [["bench", "--token", "s3cret"], ["bench", "--token=s3cret", "--rate", "2"]])
def test_a_token_is_not_written_down(arguments: list[str]) -> None:
    """However it was given."""
    assert "s3cret" not in command_line(arguments)
    assert "***" in command_line(arguments)


def test_a_command_can_be_typed_again() -> None:
    """What the shell would take apart is quoted."""
    assert command_line(["bench", "--goodput", "ttft:1 tpot:2"]) == "pathfox bench --goodput 'ttft:1 tpot:2'"


def test_a_result_says_where_it_is_from() -> None:
    """Cores, memory, system, load; versions of this client and of what it stands on."""
    seen = provenance(["bench"])

    assert seen.keys() == {"date", "command", "machine", "versions"}
    assert machine()["cpu"]
    assert isinstance(machine()["memory_bytes"], int)
