"""The code that `make protos` generates from protos/*.proto.

Public names: the messages and stubs of `classifier_pb2`, `classifier_pb2_grpc`, `inference_pb2` and
`inference_pb2_grpc`.
Callers: `convoy.client`, `convoy.models`, `convoy.bench`, and the server's `api`.
"""
