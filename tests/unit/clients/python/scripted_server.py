"""A server on 127.0.0.1 that answers every RPC of the contract as a test's script says."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from pathfox.v1 import admin_pb2, generation_pb2, model_pb2

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in (generation_pb2, model_pb2, admin_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

Answer = Callable[..., object]


def fail(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    *details: Message,
    trailers: tuple[tuple[str, str], ...] = (),
) -> None:
    """End a call as the front end does: a status, its google.rpc details, the request id."""
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    context.set_trailing_metadata(
        (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", "call-1"), *trailers)
    )
    context.abort(code, message)


def retry_info(delay_s: float) -> Message:
    """Write when to come back."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMicroseconds(round(delay_s * 1e6))
    return info


@dataclass
class Script(grpc.GenericRpcHandler):
    """What the server answers, and what it was sent."""

    answers: dict[str, Answer] = field(default_factory=dict)
    """By method name: (request or iterator of requests, context) -> reply or iterator of replies."""
    seen: list[tuple[str, object]] = field(default_factory=list)
    """(method path, request) of each call; a stream of requests is None."""
    metadata: list[dict[str, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """A call has ended, in whatever way."""
    address: str = ""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Find what answers a method."""
        path = handler_call_details.method
        method = METHODS.get(path)
        if method is None:
            return None
        reply_type = GetMessageClass(method.output_type)

        def answer(request: object, context: grpc.ServicerContext) -> object:
            self.seen.append((path, request if isinstance(request, Message) else None))
            self.metadata.append(dict(context.invocation_metadata()))
            context.add_callback(self.ended.set)
            script = self.answers.get(method.name)
            if script is not None:
                return script(request, context)
            return iter(()) if method.server_streaming else reply_type()

        if method.client_streaming:
            kind = grpc.stream_stream_rpc_method_handler
        elif method.server_streaming:
            kind = grpc.unary_stream_rpc_method_handler
        else:
            kind = grpc.unary_unary_rpc_method_handler
        return kind(answer, GetMessageClass(method.input_type).FromString, reply_type.SerializeToString)

    def requests(self, name: str) -> list[object]:
        """Return the requests of one method, in order."""
        return [request for path, request in self.seen if path.endswith(f"/{name}")]


WAIT_S = 10
"""For what comes at once, unless it is broken."""


def endless(_request: object, context: grpc.ServicerContext) -> Iterator[generation_pb2.GenerateResponse]:
    """Stream until the client goes."""
    gone = threading.Event()
    context.add_callback(gone.set)
    yield generation_pb2.GenerateResponse(request_id="r", started=generation_pb2.Started(fingerprint="f"))
    gone.wait(WAIT_S)
