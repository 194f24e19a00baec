"""Keras -> ONNX, and the proof that the file answers as the network does."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf2onnx

from service.bundle import Parity, Probabilities
from service.images import Pixels
from service.model import Model
from training.evaluate import answers

INPUT, OUTPUT = "pixels", "probabilities"
OPSET = 17


def serving_function(network: keras.Model) -> Any:
    """`network` as it will be served: uint8 `[N, H, W, C]` in, softmax probabilities out."""

    @tf.function(
        input_signature=[tf.TensorSpec([None, *network.input_shape[1:]], tf.uint8, name=INPUT)]
    )
    def serve(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = network(tf.cast(pixels, tf.float32), training=False)
        return {OUTPUT: tf.nn.softmax(logits)}

    return serve


def to_onnx(serve: Any) -> bytes:
    """The ONNX file of a `serving_function`, its batch axis free."""
    model, _ = tf2onnx.convert.from_function(serve, serve.input_signature, opset=OPSET)
    return bytes(model.SerializeToString())


def verify(serve: Any, onnx: bytes, images: Pixels, max_batch_size: int) -> Parity:
    """Compares the network with the ONNX file under the code that will serve it.

    On `images` and on all-black and all-white pixels, at batch sizes 1, 3 and the largest: a free
    batch axis that is only free for one size shows here.
    """
    extremes = np.stack([np.zeros_like(images[0]), np.full_like(images[0], 255)])
    inputs = np.concatenate([images, extremes])
    if len(inputs) < max_batch_size:  # or the largest batch would not be tried
        inputs = np.resize(inputs, (max_batch_size, *inputs.shape[1:]))
    expected = answers(lambda pixels: serve(tf.constant(pixels))[OUTPUT].numpy(), inputs)
    model = Model(onnx, device="cpu")
    sizes = sorted({1, 3, max_batch_size})
    difference, agreement = 0.0, 1.0
    for size in sizes:
        given = _in_batches(model, inputs, size)
        # max() of NaN is NaN, which fails every comparison of the gate.
        difference = float(np.maximum(difference, np.abs(given - expected).max()))
        agreement = min(agreement, float((given.argmax(1) == expected.argmax(1)).mean()))
    return Parity(difference, agreement, len(inputs), sizes)


def _in_batches(model: Model, inputs: Pixels, size: int) -> Probabilities:
    return np.concatenate(
        [model.run(inputs[start : start + size]) for start in range(0, len(inputs), size)]
    )
