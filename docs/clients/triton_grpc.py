"""tritonclient over gRPC: python triton_grpc.py localhost:8001 digits 3.png ...

pip install tritonclient[grpc]
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

server, model, *names = sys.argv[1:]
with triton.InferenceServerClient(server) as client:
    said = client.get_model_metadata(model)
    # The image files as they are; the server decodes and resizes.
    images = triton.InferInput(said.inputs[0].name, [len(names)], "BYTES")
    images.set_data_from_numpy(np.array([Path(name).read_bytes() for name in names], np.object_))
    # The best class of each, as value:index:label, in place of all probabilities.
    best = triton.InferRequestedOutput(said.outputs[0].name, class_count=1)
    answer = client.infer(model, [images], outputs=[best])
    for name, (text,) in zip(names, answer.as_numpy(best.name()), strict=True):
        probability, _, label = text.decode().split(":", 2)
        print(name, label, probability[:6])
