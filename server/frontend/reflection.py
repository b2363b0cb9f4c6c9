"""grpc.reflection, v1alpha and v1, so that grpcurl and its like need no protos.

grpcio-reflection has v1alpha only. The two differ in the package's name alone, so v1 is served by the same servicer,
and its descriptors are a renamed copy.
"""

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

OLD_PACKAGE = "grpc.reflection.v1alpha"
NEW_PACKAGE = "grpc.reflection.v1"
SERVICE = "ServerReflection"


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Register both versions for these services and for themselves."""
    names = [f"{package}.{SERVICE}" for package in (OLD_PACKAGE, NEW_PACKAGE)]
    _add_new_descriptors()
    servicer = reflection.aio.ReflectionServicer((*services, *names))  # type: ignore[attr-defined] # is there, untyped
    for name in names:
        method = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}),))


def _add_new_descriptors() -> None:
    """Add v1's file to the pool that the servicer answers from, once."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(f"{NEW_PACKAGE}.{SERVICE}")
    except KeyError:
        copy = FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(copy)
        copy.name = copy.name.replace("v1alpha", "v1")
        copy.package = NEW_PACKAGE
        for message in copy.message_type:
            for field in message.field:
                if not field.type_name:
                    continue  # an assignment would make it present
                field.type_name = field.type_name.replace(OLD_PACKAGE, NEW_PACKAGE)
        for service in copy.service:
            for method in service.method:
                method.input_type = method.input_type.replace(OLD_PACKAGE, NEW_PACKAGE)
                method.output_type = method.output_type.replace(OLD_PACKAGE, NEW_PACKAGE)
        pool.AddSerializedFile(copy.SerializeToString())
