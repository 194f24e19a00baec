"""The server: gRPC in front, ONNX Runtime behind, batches between. Never imports TensorFlow."""

import os

# Has the thread that polls read and write the sockets of servers itself. Since grpcio 1.80 others do
# it for it, and handing over to them costs a fifth of a small call on one core (benchmarks/README.md).
# gRPC reads this once, as it is imported; whatever a user says of it wins.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
