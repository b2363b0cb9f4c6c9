"""Connections to one server, and what a gRPC error on them means for the load."""

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from server.cli.bench.target import CallFailed
from server.errors import ConfigError

ASK_TIMEOUT_S = 2.0
"""For questions that a server answers from memory."""
STATUS_DETAILS = "grpc-status-details-bin"
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel, where grpc would share one
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """Open channels to one server."""

    address: str
    channels: tuple[grpc.aio.Channel, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    """What every call carries."""


@contextlib.asynccontextmanager
async def connect(
    address: str, *, token: str | None = None, tls: bool = False, count: int = 1
) -> AsyncIterator[Connection]:
    """Open channels for the body."""
    async with contextlib.AsyncExitStack() as stack:
        channels = []
        for _ in range(count):
            if tls:
                channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=OPTIONS)
            else:
                channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            channels.append(await stack.enter_async_context(channel))
        yield Connection(address, tuple(channels), (("authorization", f"Bearer {token}"),) if token else ())


def check_loopback(address: str) -> None:
    """Refuse to put load on another machine.

    Raises:
        ConfigError: says which option allows it.
    """
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost" and not address.startswith("unix:"):
        raise ConfigError(f"--address: {address} is not this machine; --allow-remote, if it is yours to load")


@contextlib.contextmanager
def grpc_errors_as_failures() -> Iterator[None]:
    """Raise `CallFailed` where the body's call ends with a gRPC status."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise CallFailed(error.code().name, error.details() or "", is_refusal=_says_when_to_come_back(error)) from None


def _says_when_to_come_back(error: grpc.aio.AioRpcError) -> bool:
    """Tell whether the status carries RetryInfo: the server is well and has no room."""
    metadata: Any = error.trailing_metadata() or ()  # pairs, whatever its stubs say
    packed = dict(metadata).get(STATUS_DETAILS)
    if not isinstance(packed, bytes):
        return False
    with contextlib.suppress(DecodeError):
        details = status_pb2.Status.FromString(packed).details
        return any(each.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for each in details)
    return False
