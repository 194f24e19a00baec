"""The server: gRPC in front, ONNX Runtime behind, batches between. Never imports TensorFlow."""

import os

# Off, the thread that polls reads and writes the sockets of servers itself. Since grpcio 1.80 others do
# it for it, and handing over to them costs a fifth of a small call on one core (benchmarks/README.md).
# gRPC reads this once, as it is imported.
_EXPERIMENT = "event_engine_listener"

_asked = os.environ.get("GRPC_EXPERIMENTS", "")
if _EXPERIMENT not in _asked:
    os.environ["GRPC_EXPERIMENTS"] = ",".join(filter(None, (_asked, f"-{_EXPERIMENT}")))
