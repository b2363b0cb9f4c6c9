"""Where load goes: several connections to one server, and what it serves."""

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from pathfox.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from server.errors import ConfigError, StartupError

ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how to reach it."""

    address: str
    token: str | None = None
    tls: bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def check_loopback(self) -> None:
        """Refuse to put load on another machine.

        Raises:
            ConfigError: says which option allows it.
        """
        host = self.address.rpartition(":")[0].strip("[]")
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host).is_loopback:
                return
        if host != "localhost" and not self.address.startswith("unix:"):
            raise ConfigError(f"--address: {self.address} is not this machine; --allow-remote, if it is yours to load")

    @contextlib.asynccontextmanager
    async def open(self, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
        """Open connections for the body: one each, where grpc would share one."""
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
            ("grpc.max_receive_message_length", -1),
        )
        async with contextlib.AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self._channel(options)) for _ in range(count)]

    def _channel(self, options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
        if self.tls:
            return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(), options=options)
        return grpc.aio.insecure_channel(self.address, options=options)

    async def model(self, channel: grpc.aio.Channel, name: str | None) -> model_pb2.Model:
        """Ask what is served.

        Raises:
            StartupError: nobody answers, or there is no such model.
        """
        stub = model_pb2_grpc.ModelServiceStub(channel)
        with self._said_clearly():
            request = model_pb2.GetModelRequest(model=name)
            return (await stub.GetModel(request, timeout=ASK_TIMEOUT_S, metadata=self.metadata)).model

    async def tokens_of(self, channel: grpc.aio.Channel, name: str | None, text: str) -> list[int]:
        """Let the server tokenise a text.

        Raises:
            StartupError: it cannot.
        """
        stub = model_pb2_grpc.ModelServiceStub(channel)
        with self._said_clearly():
            request = model_pb2.TokenizeRequest(model=name, text=text)
            return list((await stub.Tokenize(request, timeout=ASK_TIMEOUT_S, metadata=self.metadata)).token_ids)

    @contextlib.contextmanager
    def _said_clearly(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise StartupError(f"cannot bench {self.address}: {error.code().name}: {error.details()}") from None


def stubs(channels: list[grpc.aio.Channel]) -> "list[generation_pb2_grpc.GenerationServiceAsyncStub]":
    """Make a stub on each channel."""
    return [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
