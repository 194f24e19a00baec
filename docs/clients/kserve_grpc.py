"""KServe's client over gRPC: python kserve_grpc.py localhost:8001 digits 3.png ...

pip install kserve. It has no call for a model's metadata: these are the names of `digits`.
"""

import asyncio
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput

server, model, *names = sys.argv[1:]
files = np.array([Path(name).read_bytes() for name in names], np.object_)


async def main() -> None:
    images = InferInput("pixels", [len(names)], "BYTES")
    images.set_data_from_numpy(files)
    best = RequestedOutput("probabilities", {"classification": 1})
    async with InferenceGRPCClient(server) as client:
        answer = await client.infer(InferRequest(model, [images], request_outputs=[best]))
    for name, (text,) in zip(names, answer.outputs[0].as_numpy(), strict=True):
        probability, _, label = text.decode().split(":", 2)
        print(name, label, probability[:6])


asyncio.run(main())
