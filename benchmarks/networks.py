"""The networks of the benchmarks as ONNX files with random weights, made without TensorFlow."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    """Nodes one after the other, each on what the last one gave."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        self._rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last, self.channels = "pixels", channels
        self.input = helper.make_tensor_value_info(
            "pixels", TensorProto.UINT8, ["N", height, width, channels]
        )
        self.add("Cast", to=TensorProto.FLOAT)
        self.add("Mul", self.constant(np.float32(1 / 127.5)))
        self.add("Sub", self.constant(np.float32(1)))
        self.add("Transpose", perm=[0, 3, 1, 2])

    def constant(self, values: np.ndarray | np.generic) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.last, *inputs], [name], name, **attributes))
        self.last = name
        return name

    def normal(self, *shape: int) -> str:
        """He et al., Delving Deep into Rectifiers, 2015: so that signals neither grow nor vanish."""
        scale = (2 / np.prod(shape[1:])) ** 0.5
        return self.constant(self._rng.normal(0, scale, shape).astype(np.float32))

    def convolution(self, filters: int, size: int, stride: int = 1, *, relu: bool = True) -> str:
        weights = self.normal(filters, self.channels, size, size)
        bias = self.constant(np.zeros(filters, np.float32))
        pads = [size // 2] * 4
        self.add("Conv", weights, bias, strides=[stride] * 2, pads=pads, kernel_shape=[size] * 2)
        self.channels = filters
        return self.add("Relu") if relu else self.last

    def pool(self, size: int, stride: int, pads: int = 0) -> None:
        self.add("MaxPool", kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pads] * 4)

    def dense(self, inputs: int, outputs: int) -> None:
        self.add("Gemm", self.normal(outputs, inputs), self.constant(np.zeros(outputs, np.float32)), transB=1)  # fmt: skip

    def model(self, classes: int) -> bytes:
        self.add("Softmax", axis=1)
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(self.nodes, "g", [self.input], [output], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(made)
        return made.SerializeToString()


def cnn() -> bytes:
    """The basic network for 28x28x1: conv 32, pool, conv 64, pool, dense 128, dense 10."""
    graph = _Graph(28, 28, 1)
    graph.convolution(32, 3)
    graph.pool(2, 2)
    graph.convolution(64, 3)
    graph.pool(2, 2)
    graph.add("Flatten")
    graph.dense(7 * 7 * 64, 128)
    graph.add("Relu")
    graph.dense(128, 10)
    return graph.model(10)


def resnet50() -> bytes:
    """ResNet-50 for 224x224x3, its normalisations folded: He et al., Deep Residual Learning, 2015."""
    graph = _Graph(224, 224, 3)
    graph.convolution(64, 7, 2)
    graph.pool(3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            before, channels = graph.last, graph.channels
            graph.convolution(width, 1)
            graph.convolution(width, 3, stride)
            branch = graph.convolution(4 * width, 1, relu=False)
            if not block:
                graph.last, graph.channels = before, channels
                before = graph.convolution(4 * width, 1, stride, relu=False)
            graph.last = branch
            graph.add("Add", before)
            # Without normalisation each block would double the signal.
            graph.add("Mul", graph.constant(np.float32(0.7)))
            graph.add("Relu")
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    graph.dense(2048, 1000)
    return graph.model(1000)


def float16(data: bytes) -> bytes:
    """The same in half precision; uint8 goes in and float32 comes out as before."""
    from convoy_training.export.quantization import fp16

    return fp16(data)
