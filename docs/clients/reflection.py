"""What a server has, as it tells itself, and a call made of that: no file of ours is needed.

python reflection.py localhost:8001 convoy.v1.ImageClassifier/ListModels '{}'

pip install grpcio grpcio-reflection. As `grpcurl -plaintext` with the same arguments.
"""

import sys

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

server, *what = sys.argv[1:]
with grpc.insecure_channel(server) as channel:
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    if not what:
        for name in database.get_services():
            print(name)
            for method in pool.FindServiceByName(name).methods:
                stream = "stream " if method.client_streaming else ""
                print(f"  {method.name}({stream}{method.input_type.full_name})")
    else:
        path, request = what
        service, name = path.split("/")
        method = pool.FindServiceByName(service).FindMethodByName(name)
        call = channel.unary_unary(
            f"/{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        message = json_format.Parse(request, GetMessageClass(method.input_type)())
        print(json_format.MessageToJson(call(message, timeout=60)))
