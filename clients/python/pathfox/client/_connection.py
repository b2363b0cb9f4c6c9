"""How a client reaches a server: address, encryption, credential, and what a channel is set to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

ChannelOption = tuple[str, int | str]

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption, and who trusts whom. All fields are PEM data."""

    ca_certificates: bytes | None = None
    """Who may sign the server's certificate; None = the authorities that grpc brings along."""
    client_key: bytes | None = None
    """With `client_certificate`: this client proves who it is (mutual TLS)."""
    client_certificate: bytes | None = None
    server_name: str | None = None
    """The name in the server's certificate, where it is not the one in the address."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything that makes a channel, of either kind."""

    address: str
    token: str | None = None
    tls: Tls | bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def open(self) -> grpc.Channel:
        """Open a blocking channel; it connects when the first call needs it."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=self._options())
        return grpc.secure_channel(self.address, credentials, options=self._options())

    def open_async(self) -> grpc.aio.Channel:
        """Open a channel on the running event loop."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self._options())
        return grpc.aio.secure_channel(self.address, credentials, options=self._options())

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not self.tls:
            return None
        tls = self.tls if isinstance(self.tls, Tls) else Tls()
        return grpc.ssl_channel_credentials(tls.ca_certificates, tls.client_key, tls.client_certificate)

    def _options(self) -> Sequence[ChannelOption]:
        options: dict[str, int | str] = {
            "grpc.max_receive_message_length": _MAX_MESSAGE_BYTES,
            # A model may think for minutes without a frame: pings find out whether anybody is still there.
            "grpc.keepalive_time_ms": 30_000,
            "grpc.keepalive_timeout_ms": 10_000,
            "grpc.http2.max_pings_without_data": 0,
            # Retries are decided in `_retry.py`, where it is known what a second sending means.
            "grpc.enable_retries": 0,
        }
        if isinstance(self.tls, Tls) and self.tls.server_name:
            options["grpc.ssl_target_name_override"] = self.tls.server_name
        return _pairs(options)


def _pairs(options: Mapping[str, int | str]) -> tuple[ChannelOption, ...]:
    return tuple(options.items())
