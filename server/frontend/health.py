"""grpc.health.v1: whether this front end serves, as a whole and by service.

Our own servicer: the one of grpcio-health-checking holds a lock while it writes to a watcher, so one watcher that stops
reading would hold up every change of state, a drain's among them; and its watches never end, so a stop waits for them.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.errors import NotFound, Unavailable
from server.frontend.interceptor import Context

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # has no types
    """Answers probes. Not serving until told to."""

    def __init__(self, services: Iterable[str]) -> None:
        self._statuses = dict.fromkeys(("", *services), NOT_SERVING)
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, *, is_serving: bool) -> None:
        """Say so for all services at once."""
        self._statuses = dict.fromkeys(self._statuses, SERVING if is_serving else NOT_SERVING)
        self._tell()

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        self._tell()

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        """Answer once."""
        if request.service not in self._statuses:
            raise NotFound("service", request.service)
        return health_pb2.HealthCheckResponse(status=self._statuses[request.service])

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer now and after each change; a watcher that reads slowly sees the last state only."""
        said: int | None = None
        while not self._is_closed:
            changed = self._changed
            status = self._statuses.get(request.service, SERVICE_UNKNOWN)
            if status != said:
                yield health_pb2.HealthCheckResponse(status=status)
                said = status
            await changed.wait()
        raise Unavailable("this front end is shutting down", subject="SHUTDOWN")

    def _tell(self) -> None:
        """Wake the watchers, and let them wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
