"""Keras -> ONNX: the network as it is served."""

from typing import Any

import keras
import tensorflow as tf
import tf2onnx
from onnx import numpy_helper

from convoy_training.evaluation.scores import STRAIGHT, Predict, Scaling
from convoy_training.export.quantization import rounded

INPUT, OUTPUT = "pixels", "probabilities"
OPSET = 17


def round_weights(network: keras.Model) -> None:
    """Rounds kernels to what int8 graphs have for them, see `variants.rounded`."""
    for layer in network._flatten_layers():
        if (kernel := getattr(layer, "kernel", None)) is not None:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            kernel.assign(rounded(kernel.numpy(), depthwise))


def logits_function(network: keras.Model, *, mirror: bool = False) -> Predict:
    """`network` as a function of uint8 `[N, H, W, C]` to logits float32 `[N, classes]`.

    With `mirror` they are the mean of those of each image and of its mirror image.
    """

    @tf.function(input_signature=[tf.TensorSpec([None, *network.input_shape[1:]], tf.uint8)])
    def infer(pixels: tf.Tensor) -> tf.Tensor:
        return _logits(network, pixels, mirror)

    return lambda pixels: infer(tf.constant(pixels)).numpy()


def serving_function(
    network: keras.Model, scaling: Scaling = STRAIGHT, *, mirror: bool = False
) -> Any:
    """`network` as it will be served: uint8 `[N, H, W, C]` in, softmax probabilities out, scaled by
    `scaling`. `mirror`: see `logits_function`.
    """

    @tf.function(
        input_signature=[tf.TensorSpec([None, *network.input_shape[1:]], tf.uint8, name=INPUT)]
    )
    def serve(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = _logits(network, pixels, mirror)
        if scaling.bend != 1:
            # Rounding must not make a logarithm of more than 0, of which there is no power.
            surprise = tf.nn.relu(-tf.nn.log_softmax(logits))
            logits = -tf.pow(surprise, scaling.bend)
        if scaling.temperature != 1:
            logits /= scaling.temperature
        return {OUTPUT: tf.nn.softmax(logits)}

    return serve


def _logits(network: keras.Model, pixels: tf.Tensor, mirror: bool) -> tf.Tensor:
    if mirror:
        width = network.input_shape[2]
        # What ONNX has for it. As one batch twice as large, the network stands in the graph once.
        mirrored = tf.gather(pixels, tf.range(width - 1, -1, -1), axis=2)
        pixels = tf.concat([pixels, mirrored], axis=0)
    logits = network(tf.cast(pixels, tf.float32), training=False)
    return sum(tf.split(logits, 2)) / 2 if mirror else logits


def predict(serve: Any) -> Predict:
    """A `serving_function` as a function of pixels to probabilities."""
    return lambda pixels: serve(tf.constant(pixels))[OUTPUT].numpy()


def to_onnx(serve: Any) -> bytes:
    """The ONNX file of a `serving_function`, its batch axis free."""
    model, _ = tf2onnx.convert.from_function(serve, serve.input_signature, opset=OPSET)
    # It holds how many functions TensorFlow had made before, so that the same network would have
    # another file after a run that was killed.
    model.graph.ClearField("doc_string")
    # Constants from outside of layers, such as the means that a backbone's preprocessing takes away,
    # come out as inputs.
    traced = serve.get_concrete_function()
    for inner, outer in zip(traced.graph.internal_captures, traced.captured_inputs, strict=True):
        for source in [value for value in model.graph.input if value.name == inner.name]:
            model.graph.input.remove(source)
            constant = numpy_helper.from_array(outer.numpy(), inner.name)
            model.graph.initializer.append(constant)
    return bytes(model.SerializeToString())
