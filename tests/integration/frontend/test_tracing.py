import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from pathfox.v1 import generation_pb2 as pb
from tests.fixtures.front_ends import read, saying, served, serving

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def Export(  # noqa: N802 the name in the proto
        self, request: otlp.ExportTraceServiceRequest, context: grpc.aio.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        """Take spans."""
        del context
        self.spans += [span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()


async def test_a_request_is_a_span_of_the_callers_trace() -> None:
    """With an endpoint configured, a generation's span joins the caller's trace, by the GenAI names."""
    collector = Collector()
    server = grpc.aio.server()
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()

    async with serving(served(saying("hello")), options={"telemetry.otlp_endpoint": endpoint}) as world:
        metadata = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
        await read(world.generation.Generate(pb.GenerateRequest(text="x"), metadata=metadata))
    await server.stop(None)

    (span,) = collector.spans
    attributes = {each.key: each.value for each in span.attributes}
    assert span.trace_id.hex() == TRACE_ID
    assert attributes["gen_ai.request.model"].string_value == "m"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 5
    assert attributes["gen_ai.usage.input_tokens"].int_value == 1
