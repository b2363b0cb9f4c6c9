"""The layers around every call, outermost first: what is observed, how errors are said, who may call, for how long."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server import telemetry
from server.errors import DeadlineExceeded, InvalidRequest, PermissionDenied
from server.frontend.caller import Caller, Role
from server.frontend.credentials import Credentials, Grant
from server.frontend.interceptor import Context, Layer, metadata_of
from server.frontend.status import is_known, reply_to

log = structlog.get_logger(__name__)

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."
ADMIN = "/pathfox.v1.AdminService/"
ENDLESS = ("/pathfox.v1.GenerationService/Chat", HEALTH + "Watch", REFLECTION)
"""Calls that may last for ever; every answer in a Chat still has a deadline."""

LOCAL_TENANT = "default"
MAX_LOGGED_FIELDS = 16
TRACE_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_PROPAGATOR = TraceContextTextMapPropagator()


def observe(tracer: trace.Tracer) -> Layer:
    """Write one log line, the metrics and one span for each call; take and hand on its trace."""

    @contextlib.asynccontextmanager
    async def layer(caller: Caller, context: Context) -> AsyncIterator[None]:
        metadata = metadata_of(context)
        parent = metadata.get("traceparent", "")
        caller.trace_parent = parent if TRACE_PARENT.fullmatch(parent) else None
        caller.span = tracer.start_span(
            caller.method.removeprefix("/"), context=_PROPAGATOR.extract(metadata), kind=trace.SpanKind.SERVER
        )
        if caller.span.is_recording():
            carrier: dict[str, str] = {}
            _PROPAGATOR.inject(carrier, trace.set_span_in_context(caller.span))
            caller.trace_parent = carrier.get("traceparent")
        telemetry.RPCS_INFLIGHT.inc()
        try:
            yield
        except asyncio.CancelledError:
            is_late = caller.deadline_s is not None and time.monotonic() >= caller.deadline_s
            caller.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.BaseError:
            if caller.code is grpc.StatusCode.OK:
                # The client went away in the middle of a write.
                caller.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            telemetry.RPCS_INFLIGHT.dec()
            _record(caller)

    return layer


def _record(caller: Caller) -> None:
    duration_s = time.monotonic() - caller.received_s
    code = caller.code.name
    telemetry.RPC_DURATION.labels(caller.method, code).observe(duration_s)
    caller.span.set_attribute(telemetry.RPC_SYSTEM, "grpc")
    caller.span.set_attribute(telemetry.RPC_METHOD, caller.method)
    caller.span.set_attribute(telemetry.RPC_CODE, caller.code.value[0])
    if caller.code is not grpc.StatusCode.OK:
        caller.span.set_attribute(telemetry.ERROR_TYPE, code)
        caller.span.set_status(trace.StatusCode.ERROR)
    caller.span.end()
    # Probes come every few seconds and say nothing new.
    write = log.debug if caller.method.startswith((HEALTH, REFLECTION)) else log.info
    write(
        telemetry.RPC_FINISHED,
        method=caller.method,
        code=code,
        request_id=caller.request_id,
        tenant=caller.tenant,
        peer=caller.peer,
        duration_s=round(duration_s, 6),
        frames=caller.num_frames,
        **caller.facts,
    )


@contextlib.asynccontextmanager
async def translate(caller: Caller, context: Context) -> AsyncIterator[None]:
    """Turn errors into statuses, and put the request's id into the trailers of every answer."""
    try:
        yield
    except grpc.aio.BaseError:
        # Raised by grpc itself: the call is over, or its handler ended it.
        raise
    except Exception as error:
        reply = reply_to(error, request_id=caller.request_id)
        caller.code = reply.code
        # Reasons and fields only: messages quote what the client sent.
        caller.facts["error"] = reply.reason
        if isinstance(error, InvalidRequest):
            caller.facts["fields"] = [each.field for each in error.violations[:MAX_LOGGED_FIELDS]]
        if not is_known(error):
            log.exception(telemetry.RPC_CRASHED, request_id=caller.request_id, method=caller.method)
        await context.abort(reply.code, reply.message, reply.metadata)
    else:
        context.set_trailing_metadata((("x-request-id", caller.request_id),))


def authenticate(credentials: Credentials | None) -> Layer:
    """Find out who calls, and keep users out of what is the administrator's.

    Without credentials everybody is tenant `default`; with the admin role from loopback, without it from elsewhere.
    """
    find: Callable[[Caller, Context], Grant] = _grant_by_address
    if credentials is not None:
        known = credentials

        def find(_caller: Caller, context: Context) -> Grant:
            return known.find(metadata_of(context).get("authorization"))

    @contextlib.asynccontextmanager
    async def layer(caller: Caller, context: Context) -> AsyncIterator[None]:
        # A probe has no credential, and learns nothing but whether we serve.
        if not caller.method.startswith(HEALTH):
            grant = find(caller, context)
            caller.tenant, caller.role = grant.tenant, grant.role
            if caller.method.startswith(ADMIN) and grant.role is not Role.ADMIN:
                raise PermissionDenied("AdminService needs the admin role")
        yield

    return layer


def _grant_by_address(caller: Caller, _context: Context) -> Grant:
    is_local = caller.peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
    return Grant(LOCAL_TENANT, Role.ADMIN if is_local else Role.USER)


def limit(default_deadline_s: float) -> Layer:
    """Give every call a deadline and hold it to it, whatever it waits for."""

    @contextlib.asynccontextmanager
    async def layer(caller: Caller, context: Context) -> AsyncIterator[None]:
        remaining_s: float | None = context.time_remaining()
        if remaining_s is None and caller.method.startswith(ENDLESS):
            yield
            return
        caller.deadline_s = caller.received_s + (default_deadline_s if remaining_s is None else remaining_s)
        if caller.deadline_s <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed when the call arrived")
        async with asyncio.timeout_at(caller.deadline_s):
            yield

    return layer
