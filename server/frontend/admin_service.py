"""AdminService: for those who run the server. The interceptors let the admin role in, and nobody else."""

import time
from collections.abc import Awaitable
from typing import NamedTuple, Protocol

from pathfox.v1 import admin_pb2 as pb
from pathfox.v1 import admin_pb2_grpc
from server.errors import InvalidRequest, NotFound, NotSupported
from server.frontend import frames
from server.frontend.generations import Generations
from server.frontend.interceptor import Context
from server.frontend.models import Models
from server.messages import Criticality


class DrainReport(NamedTuple):
    """What became of the requests that were alive when a drain began."""

    num_finished: int
    num_ended: int


class Drain(Protocol):
    """Drains the front end, or joins the drain that is going on, which a shorter grace shortens."""

    def __call__(self, grace_s: float | None, /) -> Awaitable[DrainReport]:
        """Return what to wait for; None = the configured grace."""
        ...


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """Status and control of this front end."""

    def __init__(
        self, models: Models, generations: Generations, drain: Drain, *, version: str, max_queued_requests: int
    ) -> None:
        self._models = models
        self._generations = generations
        self._drain = drain
        self._version = version
        self._max_queued_requests = max_queued_requests
        self._started_s = time.monotonic()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: ARG002, N802
        """Report load, limits and health as they are now."""
        admission = self._generations.admission
        return pb.GetStatusResponse(
            version=self._version,
            uptime=frames.duration(time.monotonic() - self._started_s),
            is_draining=self._generations.is_draining,
            active_requests=self._generations.num_alive,
            engines=[frames.write_engine(model) for model in self._models],
            bulkheads=[
                pb.BulkheadStatus(
                    criticality=criticality.name,
                    running_tokens=admission.bulkheads.by_class[criticality],
                    max_running_tokens=admission.bulkheads.ceilings[criticality],
                    queued_requests=admission.num_queued(criticality),
                    max_queued_requests=self._max_queued_requests,
                )
                for criticality in Criticality
            ],
        )

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: ARG002, N802
        """Stop accepting, let streams finish within the grace, end what is left."""
        grace_s: float | None = None
        if request.HasField("grace"):
            grace_s = request.grace.seconds + request.grace.nanos / 1e9
            if grace_s < 0:
                raise InvalidRequest.of("grace", seen=f"{grace_s} s", limit="0 s or more")
        report = await self._drain(grace_s)
        return pb.DrainResponse(finished_requests=report.num_finished, ended_requests=report.num_ended)

    async def SetTraffic(self, request: pb.SetTrafficRequest, context: Context) -> pb.SetTrafficResponse:  # noqa: ARG002, N802
        """Refuse: there is one version of each model."""
        raise NotSupported("this front end serves one version of each model; there is no traffic to spread")

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:  # noqa: ARG002, N802
        """List the engines in this process: each is its own replica."""
        return pb.ListReplicasResponse(
            replicas=[
                pb.Replica(
                    replica_id=f"in-process/{model.pinned_name}",
                    address="in-process",
                    model_version=model.pinned_name,
                    fingerprint=model.info.fingerprint,
                    is_draining=self._generations.is_draining,
                    engine=frames.write_engine(model),
                )
                for model in self._models
            ]
        )

    async def ListCircuits(self, request: pb.ListCircuitsRequest, context: Context) -> pb.ListCircuitsResponse:  # noqa: ARG002, N802
        """List no circuits: nothing outside this process is depended on."""
        return pb.ListCircuitsResponse()

    async def ResetCircuit(self, request: pb.ResetCircuitRequest, context: Context) -> pb.ResetCircuitResponse:  # noqa: ARG002, N802
        """Find no circuit."""
        raise NotFound("circuit", request.name, hint="this front end has none")
