"""The server: gRPC in front, ONNX Runtime behind, batches between. It never imports TensorFlow.

Packages, highest layer first: `server`; `api`, `lifecycle`, `observers`; `transport`, `registry`,
`object_store`; `ipc`, `telemetry`; `engine`, `rollout`; `artifacts`; then the modules `backoff`,
`duty_cycle`, `errors`, `settings` and `tasks`. A package imports lower layers only.
Callers: `convoy` and `convoy_training`.
"""

import os

# Off, the thread that polls reads and writes the sockets of servers itself. Since grpcio 1.80 others do
# it for it, and handing over to them costs a fifth of a small call on one core (benchmarks/README.md).
# gRPC reads this once, as it is imported.
_EXPERIMENT = "event_engine_listener"

_asked = os.environ.get("GRPC_EXPERIMENTS", "")
if _EXPERIMENT not in _asked:
    os.environ["GRPC_EXPERIMENTS"] = ",".join(filter(None, (_asked, f"-{_EXPERIMENT}")))

# ONNX Runtime, from 1.29 on, tells its makers of each session (names and hashes of graphs among it), and
# keeps a number for this machine under ~/.cache. It reads this once, as it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
