"""Where a model runs: ONNX Runtime's provider, its options, and whether it really is the one."""

import contextlib
import ctypes
import hashlib
import io
import logging
import os
import re
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from convoy_service.artifacts.reader import DATA
from convoy_service.errors import BrokenVersion

log = logging.getLogger("convoy.device")

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Where one of these runs on the CPU, the card is not what does the work. Others may: ONNX Runtime
# puts the arithmetic of shapes there by intention.
_HEAVY = re.compile("Conv|Gemm|MatMul|Pool|Normalization|Softmax|Resize|Einsum|LSTM|GRU|Attention")

# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
_CUDA_OPTIONS = {
    # EXHAUSTIVE times every algorithm at the first run of each shape, seconds for each.
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles what it holds and never gives back.
    "arena_extend_strategy": "kSameAsRequested",
    # ResNet-50 on an H200: 1.20 times the images a second, 1.26 times in fp16.
    "prefer_nhwc": "1",
}


class Device(NamedTuple):
    """`auto`, `cpu`, `cuda` or `tensorrt`; the card's number where one is named."""

    kind: str
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Device":
        """Of what `Settings.device` may be."""
        kind, _, number = text.partition(":")
        return cls(kind, int(number) if number else None)

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}:{self.number}"


class Card(NamedTuple):
    """How a session on a card is to be.

    `memory_mb` (10^6 bytes) bounds what the card lends it, 0 for no bound. `graphs`: CUDA records
    what it does for a batch size, and repeats it in one go. For TensorRT: `variant`, which says what
    it may compute in, and the input's name and `largest` shape.
    """

    memory_mb: float = 0.0
    graphs: bool = False
    variant: str = "fp32"
    input: str = ""
    largest: tuple[int, ...] = ()


class Opened(NamedTuple):
    """A session, where it runs, and why that is not what was preferred."""

    session: ort.InferenceSession
    device: Device
    fallback: str = ""


def expects_card(device: Device) -> bool:
    """Whether that is a card, as far as can be told before a session is opened."""
    if device.kind == "auto":
        return _PROVIDERS["cuda"] in ort.get_available_providers()
    return device.kind != "cpu"


def open_session(
    onnx: bytes, device: Device, threads: int, card: Card = Card(), data: bytes = b""
) -> Opened:
    """A session for `onnx`; `threads` is for the CPU; `data`: see `bundle.DATA`.

    Raises BrokenVersion where the file can't be loaded or the device can't be had: `cuda` is never
    answered with a CPU. `auto` takes CUDA where there is one, and says why it did not where this
    ONNX Runtime has it.
    """
    if device.kind != "auto":
        return _open(onnx, data, device, threads, card)
    if not expects_card(device):
        return _open(onnx, data, Device("cpu"), threads, card)
    try:
        return _open(onnx, data, Device("cuda", device.number), threads, card)
    except BrokenVersion as error:
        opened = _open(onnx, data, Device("cpu"), threads, card)
        return opened._replace(fallback=f"runs on the CPU, not on CUDA: {error}")


def _open(onnx: bytes, data: bytes, device: Device, threads: int, card: Card) -> Opened:
    provider, available = _PROVIDERS[device.kind], ort.get_available_providers()
    if provider not in available:
        raise BrokenVersion(
            f"device {device} is not to be had: this ONNX Runtime offers {', '.join(available)}; "
            "install convoy-serving[gpu] in place of [cpu], or choose --device cpu"
        )
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool takes the cores from the threads that decode and talk to callers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if data:
        options.add_external_initializers_from_files_in_memory([DATA], [data], [len(data)])
    providers: list[Any] = [provider]
    if device.kind != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        number = device.number or 0
        device = Device(device.kind, number)
        cuda: dict[str, str] = {**_CUDA_OPTIONS, "device_id": str(number)}
        if card.memory_mb:
            cuda["gpu_mem_limit"] = str(int(card.memory_mb * 1e6))
        if card.graphs and device.kind == "cuda":
            cuda["enable_cuda_graph"] = "1"
        providers = [(_PROVIDERS["cuda"], cuda)]
        if device.kind == "tensorrt":
            special = {**_tensorrt_options(onnx + data, card), "device_id": str(number)}
            providers.insert(0, (provider, special))
        _preload()
    try:
        session = _session(onnx, options, providers)
    # ONNX Runtime raises classes of its own that share no base but Exception.
    except Exception as error:
        words = re.sub(r"/proc/self/fd/\d+", "it", str(error))
        raise BrokenVersion(f"ONNX Runtime can't load the model: {words}") from error
    if session.get_providers()[0] != provider:
        raise BrokenVersion(
            f"device {device} is not to be had: ONNX Runtime took {session.get_providers()[0]}; is "
            "there a card, a driver, and the libraries of convoy-serving[gpu]?"
        )
    if device.kind != "cpu" and (strays := heavy_on_cpu(assignment(session))):
        raise BrokenVersion(
            f"device {device}: these would run on the CPU: {', '.join(strays[:10])}"
            + (f", and {len(strays) - 10} more" if len(strays) > 10 else "")
        )
    return Opened(session, device)


def _session(
    onnx: bytes, options: ort.SessionOptions, providers: list[Any]
) -> ort.InferenceSession:
    """From a file that is only in memory, where the system has such. Of bytes, ONNX Runtime's binding
    for Python keeps a reference, and it holds the interpreter's lock while it reads them: 70 ms for
    115 MB, in which nobody else is answered.
    """
    if not hasattr(os, "memfd_create"):
        return ort.InferenceSession(onnx, options, providers=providers)
    memory = os.memfd_create("model", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(onnx)
        return ort.InferenceSession(f"/proc/self/fd/{memory}", options, providers=providers)
    finally:
        os.close(memory)


def _tensorrt_options(onnx: bytes, card: Card) -> dict[str, str]:
    """https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html"""
    options = {}
    if card.variant in ("fp16", "int8"):
        options[f"trt_{card.variant}_enable"] = "1"
    if card.largest:
        # One engine for all sizes: else every larger batch than those before has it built anew.
        for name, rows in (("min", 1), ("opt", card.largest[0]), ("max", card.largest[0])):
            shape = "x".join(map(str, (rows, *card.largest[1:])))
            options[f"trt_profile_{name}_shapes"] = f"{card.input}:{shape}"
    # Engines take minutes to build; they are kept for the next start. Their names tell the shape of
    # the graph and the kind of card, but neither the weights nor who built them.
    known = f"{ort.__version__}-{hashlib.sha256(onnx).hexdigest()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "convoy" / "tensorrt" / known
    try:
        cache = cache.expanduser()
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        log.warning("TensorRT's engines are built anew at each start: %s", error)
        return options
    for name in ("engine", "timing"):
        options[f"trt_{name}_cache_enable"] = "1"
        options[f"trt_{name}_cache_path"] = str(cache)
    return options


def _preload() -> None:
    """CUDA and cuDNN from the wheels of the extra `gpu`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        log.debug("%s", line)


def host_value(device: Device, shape: Sequence[int], kind: type) -> ort.OrtValue:
    """A value in memory of this host: for a card pinned, so that it reads it itself."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    memory = _pinned(device.number or 0, size) if device.kind != "cpu" else None
    if memory is None:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind)
    return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(memoryview(memory), kind).reshape(shape))


def _pinned(number: int, size: int) -> ctypes.Array[ctypes.c_char] | None:
    """So many bytes of pinned memory, given back with the array; None where there is none.

    From CUDA's runtime, which `preload_dlls` has loaded: ONNX Runtime for Python lends none of its
    own for a CUDA that is built in (`get_ep_devices` tells of plug-ins alone).
    """
    try:
        cuda = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.partition('.')[0]}")
        address, portable = ctypes.c_void_p(), 1
        failed = cuda.cudaSetDevice(number) or cuda.cudaHostAlloc(
            ctypes.byref(address), ctypes.c_size_t(size), portable
        )
    # Other memory does as well, only slower.
    except (AttributeError, OSError) as error:
        log.info("no pinned memory: %s", error)
        return None
    if failed or not address.value:
        log.info("no pinned memory: CUDA's error %d", failed)
        return None
    memory = (ctypes.c_char * size).from_address(address.value)
    # At the end of the process CUDA may be gone already.
    weakref.finalize(memory, cuda.cudaFreeHost, address).atexit = False
    return memory


def card_value(device: Device, shape: Sequence[int], kind: type) -> ort.OrtValue:
    """A value in memory of the card."""
    number = device.number or 0
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cuda", number)


def assignment(session: ort.InferenceSession) -> list[tuple[str, str, str]]:
    """Which provider runs which node: provider, kind of operation, name."""
    return [
        (group.ep_name, node.op_type, node.name)
        for group in session.get_provider_graph_assignment_info()
        for node in group.get_nodes()
    ]


def heavy_on_cpu(nodes: Iterable[tuple[str, str, str]]) -> list[str]:
    """Those nodes of `assignment` that make up the work and run on the CPU."""
    return [
        f"{operation} {name!r}"
        for provider, operation, name in nodes
        if provider == _PROVIDERS["cpu"] and _HEAVY.search(operation)
    ]


def buckets(largest: int) -> tuple[int, ...]:
    """The batch sizes that are run on a card: powers of two, and the largest. There every new shape
    costs a search for algorithms and memory at its first run.
    """
    return (*(1 << n for n in range((largest - 1).bit_length())), largest)
