import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from server.cli.bench.connection import STATUS_DETAILS, check_loopback, connect, grpc_errors_as_failures
from server.cli.bench.recording import Outcome
from server.cli.bench.target import CallFailed
from server.errors import ConfigError


def status(*details: error_details_pb2.RetryInfo | error_details_pb2.ErrorInfo) -> bytes:
    """Pack a rich status."""
    packed = [any_pb2.Any() for _ in details]
    for each, detail in zip(packed, details, strict=True):
        each.Pack(detail)
    data: bytes = status_pb2.Status(code=8, details=packed).SerializeToString()
    return data


@pytest.mark.parametrize(
    ("trailer", "outcome"),
    [
        (status(error_details_pb2.ErrorInfo(reason="FULL"), error_details_pb2.RetryInfo()), Outcome.REJECTED),
        (status(error_details_pb2.ErrorInfo(reason="TOO_LARGE")), Outcome.FAILED),
        (b"\xff\xff", Outcome.FAILED),
        (None, Outcome.FAILED),
    ],
)
def test_a_refusal_is_what_says_when_to_come_back(trailer: bytes | None, outcome: Outcome) -> None:
    """RESOURCE_EXHAUSTED alone may also mean that a message was too large."""
    trailers = grpc.aio.Metadata(*[(STATUS_DETAILS, trailer)] if trailer is not None else [])
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), trailers, "full", None)

    with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED: full") as raised, grpc_errors_as_failures():
        raise error

    assert raised.value.outcome is outcome


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.9.1:1", "unix:/tmp/x"])
def test_this_machine_may_be_loaded(address: str) -> None:
    """Loopback, by any name."""
    check_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1:1", "example.com:443", "0.0.0.0:1", "dns:///x:1"])
def test_another_machine_wants_a_word(address: str) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match="is not this machine; --allow-remote"):
        check_loopback(address)


async def test_every_channel_is_a_connection_and_carries_the_token() -> None:
    """As many channels as asked for; the token goes with every call."""
    async with connect("127.0.0.1:1", token="t", count=3) as connection:  # noqa: S106 no secret
        assert len({id(channel) for channel in connection.channels}) == 3
        assert connection.metadata == (("authorization", "Bearer t"),)
