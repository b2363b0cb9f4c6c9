"""The front end as a whole: one grpc.aio server, what it is made of, and how it starts, drains and stops."""

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc

from pathfox.v1 import admin_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from server import telemetry
from server.config import Config, ServerConfig
from server.errors import StartupError
from server.frontend import layers
from server.frontend.admin_service import AdminService, DrainReport
from server.frontend.admission import Admission
from server.frontend.credentials import Credentials
from server.frontend.generation_service import GenerationService
from server.frontend.generations import Generations
from server.frontend.health import HealthService
from server.frontend.interceptor import Interceptor
from server.frontend.model_service import ModelService
from server.frontend.models import Models
from server.frontend.prompts import Prompts
from server.frontend.reflection import add_reflection
from server.messages import Load

log = structlog.get_logger(__name__)

SERVICES = ("pathfox.v1.GenerationService", "pathfox.v1.ModelService", "pathfox.v1.AdminService")
HEALTH_SERVICE = "grpc.health.v1.Health"

COMPRESSIONS = {
    "none": grpc.Compression.NoCompression,
    "deflate": grpc.Compression.Deflate,
    "gzip": grpc.Compression.Gzip,
}

CLOSE_GRACE_S = 1.0
"""For statuses of ended calls to reach their clients, after the drain."""


class FrontEnd:
    """A process's public face. To be made on a running event loop.

    Args:
        config: the whole tree; the parts are handed to those that need them.
        models: what to serve. Their sources are started and stopped by whoever made them.
    """

    def __init__(self, config: Config, models: Models) -> None:
        self._config = config.server
        self._telemetry_config = config.telemetry
        self._models = models
        version = importlib.metadata.version("pathfox-server")
        self._tracing = telemetry.Tracing(config.telemetry, version=version)
        self.generations = Generations(
            config.server,
            Admission(config.admission),
            Prompts(config.server.num_text_threads),
            emits_legacy=self._tracing.emits_legacy,
        )
        self.health = HealthService(SERVICES)
        self._server = self._make_server()
        self._register(version, config.admission.max_queued_requests)
        self._collector = telemetry.LoadCollector(self._loads)
        self._metrics: telemetry.MetricsServer | None = None
        self._draining: asyncio.Task[DrainReport] | None = None
        self._is_grace_over = asyncio.Event()
        self._is_started = False
        self.port = 0
        """Known after `start`."""

    @property
    def metrics_port(self) -> int | None:
        """Where Prometheus finds the metrics, when it may."""
        return self._metrics.port if self._metrics else None

    async def start(self) -> int:
        """Listen, and say that we serve; return the port.

        Raises:
            StartupError: the address cannot be bound or must not be, or TLS files cannot be read.
        """
        self.port = self._bind()
        if self._telemetry_config.metrics_port is not None:
            host, port = self._telemetry_config.metrics_host, self._telemetry_config.metrics_port
            try:
                self._metrics = telemetry.MetricsServer(host, port)
            except OSError as error:
                raise StartupError(f"telemetry.metrics_port: cannot listen on {host}:{port}: {error}") from None
            log.info(telemetry.METRICS_STARTED, host=host, port=self._metrics.port)
        telemetry.REGISTRY.register(self._collector)
        loop = asyncio.get_running_loop()
        telemetry.EVENT_LOOP_TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
        await self._server.start()
        self._is_started = True
        self.health.set_serving(is_serving=True)
        log.info(telemetry.SERVER_STARTED, host=self._config.host, port=self.port)
        return self.port

    async def drain(self, grace_s: float | None = None) -> DrainReport:
        """Stop accepting, let streams finish within the grace, end what is left.

        Joins the drain that is going on; a grace that ends earlier than that one's shortens it. Goes on when its caller
        is cancelled. What is not a generation is still answered, so that status and health can be seen until the end.

        Args:
            grace_s: None = the configured grace, or what is left of that of the drain that is going on.
        """
        if self._draining is None:
            grace_s = self._config.drain_grace_s if grace_s is None else grace_s
            self._draining = asyncio.create_task(self._drain(grace_s), name="drain")
        if grace_s is not None:
            # Each caller's grace has a timer of its own; the first one to run out counts.
            asyncio.get_running_loop().call_later(grace_s, self.hurry)
        return await asyncio.shield(self._draining)

    def hurry(self) -> None:
        """Let no drain wait any longer, neither the one that is going on nor a later one."""
        self._is_grace_over.set()

    async def stop(self, grace_s: float | None = None) -> None:
        """Drain, then close everything. Returns within the grace and two seconds.

        A call beside another one joins it, and may shorten its grace; one after it finds nothing to do.
        """
        if self._is_started:
            await self.drain(grace_s)
        if self._is_started:
            self._is_started = False
            self.health.close()
            telemetry.REGISTRY.unregister(self._collector)
            telemetry.EVENT_LOOP_TASKS.set_function(lambda: 0)  # else the registry, which outlives us, keeps the loop
        await self._server.stop(CLOSE_GRACE_S)
        self.generations.prompts.close()
        if self._metrics is not None:
            self._metrics.close()
        await asyncio.to_thread(self._tracing.close)  # it waits for the collector
        log.info(telemetry.SERVER_STOPPED, port=self.port)

    async def _drain(self, grace_s: float) -> DrainReport:
        began_s = time.monotonic()
        before = self.generations.num_finished
        log.info(telemetry.DRAIN_STARTED, grace_s=grace_s, alive=self.generations.num_alive)
        self.health.set_serving(is_serving=False)
        self.generations.begin_drain()
        waits = [asyncio.create_task(self.generations.wait_idle()), asyncio.create_task(self._is_grace_over.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self.generations.end_all()
        # Handlers that can still write say UNAVAILABLE; those of clients that do not read end with the server.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_GRACE_S):
                await self.generations.wait_idle()
        report = DrainReport(self.generations.num_finished - before, self.generations.num_ended)
        duration_s = time.monotonic() - began_s
        telemetry.DRAIN_SECONDS.observe(duration_s)
        log.info(
            telemetry.DRAIN_FINISHED,
            duration_s=round(duration_s, 3),
            finished=report.num_finished,
            ended=report.num_ended,
        )
        return report

    def _make_server(self) -> grpc.aio.Server:
        config = self._config
        credentials = None if config.credentials_file is None else Credentials.from_file(config.credentials_file)
        interceptor = Interceptor(
            [
                layers.observe(self._tracing.tracer),
                layers.translate,
                layers.authenticate(credentials),
                layers.limit(config.default_deadline_s),
            ]
        )
        return grpc.aio.server(
            interceptors=[interceptor],
            options=_options(config),
            maximum_concurrent_rpcs=config.max_concurrent_rpcs,
            compression=COMPRESSIONS[config.compression],
        )

    def _register(self, version: str, max_queued_requests: int) -> None:
        models, generations = self._models, self.generations
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(models, generations), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(models, generations, max_message_bytes=self._config.max_message_bytes), self._server
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(models, generations, self.drain, version=version, max_queued_requests=max_queued_requests),
            self._server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if self._config.enable_reflection:
            add_reflection(self._server, (*SERVICES, HEALTH_SERVICE))

    def _bind(self) -> int:
        config = self._config
        check_address(config)
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.port}"
        tls = read_tls(config)
        try:
            if tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, tls)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (server.host, server.port): {error}") from None

    def _loads(self) -> Iterator[tuple[str, Load]]:
        return ((model.pinned_name, model.load()) for model in self._models)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return channel arguments: limits, keepalive, HTTP/2 windows."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Without it a second process could take the port and half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(config.min_client_ping_interval_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(config.min_client_ping_interval_s * 1000)),
        # Calls without a token for minutes are normal here; a client that pings during one is not to be cut off.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.lookahead_bytes", config.stream_window_bytes),
    ]


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(config: ServerConfig) -> None:
    """Find out before a model is loaded whether we may and can listen where we are told to.

    Raises:
        StartupError: names the address and what is wrong with it.
    """
    check_exposure(config)
    if config.host.startswith("unix:"):
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        place = f"{config.host}:{config.port} (server.host, server.port)"
        raise StartupError(f"cannot listen on {place}: {error.strerror}") from None


def check_exposure(config: ServerConfig) -> None:
    """Refuse to listen where others can reach us without TLS and credentials.

    Raises:
        StartupError: names what to set.
    """
    if is_loopback(config.host) or config.insecure:
        return
    missing = [
        name
        for name, value in (
            ("server.tls_certificate_file", config.tls_certificate_file),
            ("server.tls_key_file", config.tls_key_file),
            ("server.credentials_file", config.credentials_file),
        )
        if value is None
    ]
    if missing:
        raise StartupError(
            f"will not listen on {config.host}, which others can reach: set {', '.join(missing)}, or --insecure"
        )


def check_files(config: ServerConfig) -> None:
    """Find out before a model is loaded whether the files of TLS and of credentials can be used.

    Raises:
        StartupError: names the file and what is wrong with it.
    """
    read_tls(config)
    if config.credentials_file is not None:
        Credentials.from_file(config.credentials_file)


def read_tls(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Read the TLS files; None when there is to be no TLS.

    Raises:
        StartupError: one of the two files is not set, or one cannot be read.
    """
    if config.tls_certificate_file is None and config.tls_key_file is None:
        return None
    if config.tls_certificate_file is None or config.tls_key_file is None:
        raise StartupError("TLS needs both server.tls_certificate_file and server.tls_key_file")

    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise StartupError(f"{path}: {error.strerror}") from None

    authorities = None if config.tls_client_ca_file is None else read(config.tls_client_ca_file)
    return grpc.ssl_server_credentials(
        [(read(config.tls_key_file), read(config.tls_certificate_file))],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )
