"""What the storm asks: models whose answers are exact, requests of every fate, and their judge."""

import io
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip

CLASSIFY = "/convoy.v1.ImageClassifier/Classify"
STREAM = "/convoy.v1.ImageClassifier/ClassifyStream"
INFER = "/inference.GRPCInferenceService/ModelInfer"
# Not a gRPC method: ModelInfer over HTTP.
HTTP = "HTTP"
# Tells the HTTP callers which model a request is for; it is not sent.
MODEL_HEADER = "model"

SHAPE, CLASSES, MAX_BATCH = (4, 4, 3), 4, 16
BYTES = math.prod(SHAPE)
# Sums of whole numbers below 2**24: float32 holds them exactly, in whatever order they are added.
WEIGHTS = np.random.default_rng(0).integers(0, 1000, (BYTES, CLASSES)).astype(np.float32)

# The first byte of a row that the model gives NaN for, or fails on; of others it is below.
NAN, RAISE, LARGEST = 254, 255, 249

Code = grpc.StatusCode
Rows = np.ndarray[Any, Any]


def make_models(folder: Path) -> None:
    """Publishes `quick`; `slow`, which takes some milliseconds a batch; and `moving`, which the operator
    loads and unloads. All answer the same.
    """
    import onnx.parser
    from onnx import numpy_helper

    from convoy_service.artifacts import reader as bundles
    from convoy_service.artifacts.images import Target
    from convoy_service.artifacts.reader import Golden, Manifest

    pixels = np.random.default_rng(1).integers(0, LARGEST, (4, *SHAPE), dtype=np.uint8)
    golden = Golden(pixels, answers(pixels))
    initializers = {
        "weights": WEIGHTS,
        "first_byte": np.array([0]),
        "nan_mark": np.float32(NAN),
        "raise_mark": np.float32(RAISE),
        "nan": np.float32(np.nan),
        "none": np.float32(0),
        "one_zero": np.zeros(1, np.float32),
    }
    for name, rounds in (("quick", 0), ("slow", 60), ("moving", 0)):
        model = onnx.parser.parse_model(_GRAPH.replace("ROUNDS", str(rounds)))
        for key, value in initializers.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
        manifest = Manifest(
            input="pixels",
            output="sums",
            pixels=Target(*SHAPE),
            labels=[str(n) for n in range(CLASSES)],
            max_batch_size=MAX_BATCH,
            created="2026-01-01T00:00:00+00:00",
        )
        bundles.write(folder / name, manifest, model.SerializeToString(), golden)


_GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
storm (uint8[N, 4, 4, 3] pixels) => (float[N, 4] sums) {
  values = Cast <to = 1> (pixels)
  rows = Flatten <axis = 1> (values)
  right = MatMul (rows, weights)
  first = Gather <axis = 1> (rows, first_byte)
  is_nan = Equal (first, nan_mark)
  nan_or_not = Where (is_nan, nan, none)
  largest = ReduceMax <keepdims = 0> (first)
  is_raise = Equal (largest, raise_mark)
  outside = Cast <to = 7> (is_raise)
  zero = Gather <axis = 0> (one_zero, outside)
  rounds = Constant <value_int = ROUNDS> ()
  yes = Constant <value = bool {1}> ()
  square = Constant <value_ints = [128, 128]> ()
  start = ConstantOfShape <value = float[1] {0.01}> (square)
  end = Loop (rounds, yes, start) <body = work (int64 round, bool go_on, float[128, 128] x) => (bool goes_on, float[128, 128] y) {
    goes_on = Identity (go_on)
    squared = MatMul (x, x)
    y = Tanh (squared)
  }>
  mean = ReduceMean <keepdims = 0> (end)
  nothing = Mul (mean, zero)
  either = Add (right, nan_or_not)
  sums = Add (either, nothing)
}
"""


def answers(pixels: Rows) -> Rows:
    """What the model gives, float32 [N, CLASSES], for uint8 [N, *SHAPE]."""
    return pixels.reshape(len(pixels), BYTES).astype(np.float32) @ WEIGHTS


class Request(NamedTuple):
    api: str
    message: bytes
    expected: Rows
    # Rows that have no answer, and why: INVALID_ARGUMENT or INTERNAL.
    failing: dict[int, int]
    timeout_s: float | None
    cancel_after_s: float | None
    # It has a deadline, either the call's or one in the message.
    limited: bool
    # Its model is loaded and unloaded all the time.
    may_be_absent: bool = False
    headers: Mapping[str, str] = {}


class Verdict(NamedTuple):
    outcome: str
    wrong_rows: int = 0
    # It ended in a way that the request does not explain.
    unexplained: str = ""


class Storm:
    """Draws requests, and judges what they were answered."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def some_s(self, least: float, most: float) -> float:
        """A time, short ones as likely as long ones."""
        return float(np.exp(self._rng.uniform(np.log(least), np.log(most))))

    def some(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most + 1))

    def size(self) -> int:
        kind = self._rng.random()
        for share, least, most in ((0.6, 1, 1), (0.8, 2, 4), (0.93, 5, 16), (0.99, 17, 64)):
            if kind < share:
                return self.some(least, most)
        return self.some(65, 300)

    def request(self, api: str) -> Request:
        size = self.size()
        pixels = self._rng.integers(0, LARGEST, (size, *SHAPE), dtype=np.uint8, endpoint=True)
        expected = answers(pixels)
        failing: dict[int, int] = {}
        for mark, probability in ((NAN, 0.01), (RAISE, 0.005)):
            if self.chance(probability):
                row = self.some(0, size - 1)
                pixels[row, 0, 0, 0] = mark
                failing[row] = Code.INTERNAL.value[0]
        broken = self.some(0, size - 1) if self.chance(0.02) else None
        if broken is not None:
            failing[broken] = Code.INVALID_ARGUMENT.value[0]
        kind = self._rng.random()
        model = "slow" if kind < 0.05 else "moving" if kind < 0.08 else "quick"
        encode = size <= 8 and self.chance(0.1)
        limit_s = self.some_s(0.001, 0.3) if self.chance(0.05) and api == INFER else None
        headers: dict[str, str] = {}
        if api == INFER:
            message = self._infer(model, pixels, encode, broken, limit_s)
        elif api == HTTP:
            message = self._http(model, pixels, encode, broken, headers)
        else:
            message = self._classify(model, pixels, encode, broken)
        timeout_s = self.some_s(0.0005, 0.3) if self.chance(0.12) else None
        cancel_after_s = self.some_s(0.0001, 0.05) if self.chance(0.1) else None
        limited = timeout_s is not None or limit_s is not None
        if api == HTTP and timeout_s is not None:
            headers["grpc-timeout"] = f"{max(1, round(1e6 * timeout_s))}u"
        return Request(
            api,
            message,
            expected,
            failing,
            timeout_s,
            cancel_after_s,
            limited,
            model == "moving",
            headers,
        )

    def _infer(
        self, model: str, pixels: Rows, encode: bool, broken: int | None, limit_s: float | None
    ) -> bytes:
        request = oip.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=pixels.shape)
        if encode or broken is not None:
            tensor.datatype = "BYTES"
            tensor.shape[:] = [len(pixels)]
            request.raw_input_contents.append(_files(pixels, broken))
        elif self.chance(0.05):
            tensor.contents.uint_contents.extend(pixels.ravel().tolist())
        else:
            request.raw_input_contents.append(pixels.tobytes())
        if limit_s is not None:
            request.parameters["timeout"].int64_param = int(limit_s * 1e6)
        if self.chance(0.1):
            request.parameters["priority"].uint64_param = self.some(0, 4)
        return request.SerializeToString()

    def _http(
        self, model: str, pixels: Rows, encode: bool, broken: int | None, headers: dict[str, str]
    ) -> bytes:
        """The body of ModelInfer over HTTP; adds its headers. `MODEL_HEADER` names its model."""
        tensor: dict[str, Any] = {"name": "pixels", "datatype": "UINT8", "shape": pixels.shape}
        data = b""
        if encode or broken is not None:
            tensor |= {"datatype": "BYTES", "shape": [len(pixels)]}
            data = _files(pixels, broken)
        elif self.chance(0.3) and len(pixels) <= 16:
            tensor["data"] = pixels.ravel().tolist()
        else:
            data = pixels.tobytes()
        if data:
            tensor["parameters"] = {"binary_data_size": len(data)}
        binary = self.chance(0.5)
        output = {"name": "sums", "parameters": {"binary_data": binary}}
        head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        if data:
            headers["Inference-Header-Content-Length"] = str(len(head))
        headers[MODEL_HEADER] = model
        return head + data

    def _classify(self, model: str, pixels: Rows, encode: bool, broken: int | None) -> bytes:
        request = pb.ClassifyRequest(model=model, top_k=CLASSES)
        height, width, channels = SHAPE
        for n, image in enumerate(pixels):
            if n == broken:
                request.images.add(encoded=b"?")
            elif encode and n % 2:
                request.images.add(encoded=png(image))
            else:
                added = request.images.add().pixels
                added.data, added.height = image.tobytes(), height
                added.width, added.channels = width, channels
        return request.SerializeToString()

    def judge(
        self, request: Request, code: int, words: str, answer: Any, cancelled: bool
    ) -> Verdict:
        """`answer` is a ClassifyResponse, the bytes of a ModelInferResponse, or the sums that HTTP gave,
        float32 [N, CLASSES], where `code` is OK.
        """
        if code == 0:
            if request.api == HTTP:
                wrong = _wrong_rows(request, answer)
            elif request.api == INFER:
                wrong = _wrong_outputs(request, oip.ModelInferResponse.FromString(answer))
            else:
                wrong = _wrong_results(request, answer)
            return Verdict("in part" if request.failing else "answered", wrong)
        outcome, explained = self._explain(request, code, words, cancelled)
        return Verdict(outcome, 0, "" if explained else f"{outcome}: {words}")

    def _explain(
        self, request: Request, code: int, words: str, cancelled: bool
    ) -> tuple[str, bool]:
        reasons = request.failing.values()
        if code == Code.INVALID_ARGUMENT.value[0]:
            rows = [n for n, why in request.failing.items() if why == code]
            return "invalid", request.api != CLASSIFY and words.startswith(f"image {rows[0]}: ")
        if code == Code.INTERNAL.value[0]:
            rows = sorted(n for n, why in request.failing.items() if why == code)
            all_failed = len(request.expected) == len(reasons)
            said = f"the model failed on image {', '.join(map(str, rows))}"
            every = "the model failed on" in words and all_failed
            return "failed", bool(rows) and (every or (request.api != CLASSIFY and words == said))
        explained = {
            Code.CANCELLED: ("cancelled", cancelled),
            Code.DEADLINE_EXCEEDED: ("late", request.limited),
            Code.RESOURCE_EXHAUSTED: ("refused", True),
            # `Tally.excuse` knows whether there was an outage.
            Code.UNAVAILABLE: ("unavailable", False),
        }
        if request.may_be_absent:
            explained[Code.NOT_FOUND] = explained[Code.UNAVAILABLE] = ("absent", True)
        return explained.get(_code(code), (_code(code).name, False))


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in Code if code.value[0] == number)


def _wrong_outputs(request: Request, response: oip.ModelInferResponse) -> int:
    expected, (output,) = request.expected, response.outputs
    if tuple(output.shape) != expected.shape or request.failing:
        return len(expected)
    if response.raw_output_contents:
        values = np.frombuffer(response.raw_output_contents[0], "<f4")
    else:
        values = np.array(output.contents.fp32_contents, np.float32)
    return _wrong_rows(request, values.reshape(expected.shape))


def _wrong_rows(request: Request, sums: Rows) -> int:
    expected = request.expected
    if sums.shape != expected.shape or request.failing:
        return len(expected)
    return int((sums != expected).any(axis=1).sum())


def _wrong_results(request: Request, response: pb.ClassifyResponse) -> int:
    results, expected = response.results, request.expected
    if len(results) != len(expected):
        return len(expected)
    found, wrong = np.full(expected.shape, np.nan, np.float32), 0
    for n, result in enumerate(results):
        code = request.failing.get(n, 0)
        if code:
            found[n] = expected[n]
            wrong += result.error.code != code
        else:
            for label in result.classification.labels:
                found[n, label.index] = label.probability
    return wrong + int((found != expected).any(axis=1).sum())


def _files(pixels: Rows, broken: int | None) -> bytes:
    """PNG files as a tensor of BYTES; the `broken` one is none."""
    images = [b"?" if n == broken else png(image) for n, image in enumerate(pixels)]
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def png(pixels: Rows) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
