"""One loaded version: the session on its device, its warm-up, its proof, and `run`."""

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.duty_cycle import DutyCycle
from convoy_service.engine.cpu import whole_cores
from convoy_service.engine.session import (
    Card,
    Device,
    Opened,
    buckets,
    card_value,
    expects_card,
    host_value,
    open_session,
)
from convoy_service.errors import BrokenVersion, InferenceFailed

# Probabilities of the same file may differ by rounding between processors and batch sizes (parity
# at export is below 1e-5); a wrong file, device or layout is off by far more than this.
GOLDEN_TOLERANCE = 1e-3
# Halves and TF32, which cards take for float32, keep 11 bits of a product, int8 keeps 8: where two
# processors round one value apart, it is that much more.
COARSE_TOLERANCE = 1e-2

# How long, and how often, batches are timed before a version serves.
_MEASURE_S, _MEASURED_RUNS = 1.0, 3

# While others serve, a version that is loaded takes this share of the device: it rests after each run.
_SHARE = 0.2

# A card has its next batch at hand when it is done with one, see `Batcher`.
_LANES = 2
# Of each size before the proof, on a card. ONNX Runtime runs a size twice, then records its CUDA
# graph; the fourth run is the first that repeats it.
_WARM_RUNS = 4

log = logging.getLogger("convoy.model")


class _Bound(NamedTuple):
    """Memory of one batch size that stays bound to the session: filled, run, and read in place.

    On a card `source`, its own memory, is bound for the pixels: ONNX Runtime would copy them there
    when they are bound, and never again. A CUDA graph has `sink` bound too, and `options` that name
    it.
    """

    pixels: Pixels
    probabilities: Probabilities
    session: ort.InferenceSession
    binding: Any
    source: ort.OrtValue | None = None
    sink: ort.OrtValue | None = None
    options: ort.RunOptions | None = None


class Model:
    """An ONNX classifier in a session: uint8 `[N, H, W, C]` in, float32 `[N, classes]` out.

    `device` is where it really runs, `variant` which of a version's graphs it is, and `fallback` why,
    where that is not what was preferred.
    `run` may be called from several threads; where memory is bound, only with a `buffer` of each's
    own.
    """

    def __init__(
        self,
        onnx: bytes,
        device: str = "auto",
        threads: int = 0,
        card: Card = Card(),
        data: bytes = b"",
    ) -> None:
        """Loads `onnx` on `device`, see `device.Device`; `threads` is for the CPU, 0 means one a
        usable core; `data`: see `bundle.DATA`.

        Raises BrokenVersion where the file is no such classifier or the device can't be had.
        """
        threads = threads or whole_cores()
        opened = open_session(onnx, Device.parse(device), threads, card, data)
        self._session, self.fallback = opened.session, opened.fallback
        self._device = opened.device
        self.device = str(opened.device)
        self.variant = "fp32"
        # The batch sizes that it is run with, see `bind`; empty where any will do.
        self.sizes: tuple[int, ...] = ()
        self.lanes = 1
        self._bound: dict[int, list[_Bound]] = {}
        # CUDA graphs belong to the thread that has recorded them.
        self._replays: ThreadPoolExecutor | None = None
        if card.graphs and opened.device.kind == "cuda":
            self._replays = ThreadPoolExecutor(1, thread_name_prefix="cuda-graphs")
        # A convolution keeps cuDNN's plan for the last size alone, and makes another for each other
        # one: 100 ms for ResNet-50, where a batch takes 2. A graph has no need of plans.
        self._one_more: Callable[[], Opened] | None = None
        if opened.device.kind == "cuda" and not card.graphs:
            self._one_more = partial(open_session, onnx, opened.device, threads, card, data)
        self._read_contract()

    def _read_contract(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise BrokenVersion(
                f"{len(inputs)} inputs and {len(outputs)} outputs: expected 1 and 1"
            )
        pixels, probabilities = inputs[0], outputs[0]
        shape = list(pixels.shape)
        if (
            pixels.type != "tensor(uint8)"
            or len(shape) != 4
            or not all(isinstance(n, int) for n in shape[1:])
            or shape[3] not in (1, 3)
        ):
            raise BrokenVersion(
                f"input {pixels.name!r} is {pixels.type} {shape}: expected uint8 [N, H, W, 1 or 3]; "
                "`convoy models add` builds the conversion into the graph"
            )
        if probabilities.type != "tensor(float)" or len(probabilities.shape) != 2:
            raise BrokenVersion(
                f"output {probabilities.name!r} is {probabilities.type} {probabilities.shape}: "
                "expected float [N, classes]"
            )
        self.input: str = pixels.name
        self.output: str = probabilities.name
        self.shape: tuple[int, int, int] = (shape[1], shape[2], shape[3])
        # Some exports have their batch axis fixed: such a graph always gets exactly that many rows.
        self.fixed_batch: int | None = shape[0] if isinstance(shape[0], int) else None

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        device: str = "auto",
        threads: int = 0,
        *,
        variant: str = "fp32",
        card: Card = Card(),
        deterministic: bool = False,
        gently: bool = False,
        proved: bool = False,
    ) -> "Model":
        """Loads a version and has it prove itself on its golden inputs; on a card when every batch
        size that it is run with is warm. `deterministic`: that is the largest alone. `gently`: rests
        between runs, for others that serve meanwhile. `proved`: it has proved itself in another
        process of this machine, and shows one answer.

        `variant`: which graph, a name in VARIANTS, where the version has it, else fp32. Or
        `fastest`, see `Bundle.fastest`; should that one not prove itself here (int8 may give other
        answers on processors without VNNI), fp32 is loaded in its place, and `fallback` says why.

        Raises BrokenVersion where it contradicts its manifest or gives other answers.
        """

        def load(name: str) -> Model:
            return cls._load(bundle, name, device, threads, card, deterministic, gently, proved)

        if variant != "fastest":
            return load(variant if variant in bundle.variants else "fp32")
        chosen = bundle.fastest("cuda" if expects_card(Device.parse(device)) else "cpu")
        try:
            model = load(chosen)
            # `auto` came out elsewhere than was to be expected.
            if (here := bundle.fastest(model.device)) != chosen:
                chosen = here
                model = load(chosen)
            return model
        except BrokenVersion as error:
            if chosen == "fp32":
                raise
            model = load("fp32")
            why = f"serves fp32, not {chosen}: {error}"
            model.fallback = f"{why}; {model.fallback}" if model.fallback else why
            return model

    @classmethod
    def _load(
        cls,
        bundle: Bundle,
        variant: str,
        device: str,
        threads: int,
        card: Card,
        deterministic: bool,
        gently: bool,
        proved: bool,
    ) -> "Model":
        manifest = bundle.manifest
        shape = () if manifest.fixed_batch else (manifest.max_batch_size, *manifest.pixels.shape)
        card = card._replace(variant=variant, input=manifest.input, largest=shape)
        try:
            return cls._prepare(
                bundle, variant, device, threads, card, deterministic, gently, proved
            )
        except BrokenVersion as error:
            if not card.graphs:
                raise
            log.warning("%s/%d without CUDA graphs: %s", bundle.name, bundle.version, error)
        card = card._replace(graphs=False)
        return cls._prepare(bundle, variant, device, threads, card, deterministic, gently, proved)

    @classmethod
    def _prepare(
        cls,
        bundle: Bundle,
        variant: str,
        device: str,
        threads: int,
        card: Card,
        deterministic: bool,
        gently: bool,
        proved: bool,
    ) -> "Model":
        graph = bundle.variants.get(variant, bundle.onnx)
        model = cls(graph, device, threads, card, bundle.data)
        model.variant = variant
        manifest = bundle.manifest
        said = (manifest.input, manifest.output, manifest.pixels.shape)
        if said != (model.input, model.output, model.shape):
            raise BrokenVersion(
                f"{bundle.folder}: the manifest says {said}, the graph is "
                f"{(model.input, model.output, model.shape)}"
            )
        fixed = manifest.max_batch_size if manifest.fixed_batch else None
        if model.fixed_batch != fixed:
            raise BrokenVersion(
                f"{bundle.folder}: the graph's batch axis is {model.fixed_batch or 'free'}, "
                f"the manifest says {fixed or 'free'}"
            )
        largest, classes, on_card = (
            manifest.max_batch_size,
            len(manifest.labels),
            model._device.kind != "cpu",
        )
        if deterministic or (on_card and fixed):
            model.bind((largest,), classes, _LANES if on_card else 1)
        elif on_card:
            model.bind(buckets(largest), classes, _LANES)
        try:
            if on_card:
                model.warm(gently)
        except InferenceFailed as error:
            raise BrokenVersion(f"{bundle.folder}: {error}") from error
        model.prove(bundle, gently=gently, briefly=proved)
        return model

    def bind(self, sizes: Sequence[int], classes: int, lanes: int = 1) -> None:
        """Has batches of these sizes run in memory that stays bound to the session, as many at once as
        there are `lanes` (CUDA graphs: one). On a card it is memory of the host that the card reads
        and writes itself, and each size has a session of its own. See `buffer`.
        """
        self.sizes, self.lanes = tuple(sizes), 1 if self._replays else lanes
        for size in self.sizes:
            session = self._session
            if self._bound and self._one_more:
                session = self._one_more().session
            self._bound[size] = [self._bind(session, size, classes) for _ in range(self.lanes)]
        # It holds the graph, which is not needed any more.
        self._one_more = None

    def _bind(self, session: ort.InferenceSession, size: int, classes: int) -> _Bound:
        pixels = host_value(self._device, (size, *self.shape), np.uint8)
        # Little, and not pinned: what is copied there is there when the run is over.
        probabilities = ort.OrtValue.ortvalue_from_shape_and_type((size, classes), np.float32)
        binding = session.io_binding()
        bound = _Bound(_view(pixels), _view(probabilities), session, binding)
        bound.pixels[...] = 0
        if self._device.kind != "cpu":
            pixels = card_value(self._device, (size, *self.shape), np.uint8)
            bound = bound._replace(source=pixels)
        if self._replays:
            probabilities = card_value(self._device, (size, classes), np.float32)
            bound = bound._replace(sink=probabilities, options=_graph(size))
        binding.bind_ortvalue_input(self.input, pixels)
        binding.bind_ortvalue_output(self.output, probabilities)
        return bound

    def buffer(self, size: int, lane: int = 0) -> Pixels | None:
        """Where the pixels of a batch of `size` are best put together: given to `run`, they are not
        copied. None where any array will do.
        """
        bound = self._bound.get(size)
        return bound[lane].pixels if bound else None

    def warm(self, gently: bool = False) -> None:
        """Runs every bound size in all lanes at once, until none is run for the first time.

        Raises InferenceFailed where ONNX Runtime does.
        """

        def run(bound: _Bound) -> None:
            for _ in range(_WARM_RUNS):
                self._run_gently(bound.pixels, gently)

        with ThreadPoolExecutor(self.lanes) as pool:
            for size in self.sizes:
                list(pool.map(run, self._bound[size]))

    def _run_gently(
        self, pixels: Pixels, gently: bool, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[Probabilities, float]:
        """The answers, and the seconds that they took."""
        duty = DutyCycle(_SHARE, clock)
        answers = self.run(pixels)
        seconds = duty.worked_s()
        if gently:
            time.sleep(duty.rest_s())
        return answers, seconds

    def prove(self, bundle: Bundle, *, gently: bool = False, briefly: bool = False) -> None:
        """Raises BrokenVersion where it does not give the golden answers, alone and in the largest
        batch, or in every size that is bound; `briefly`: the first one, alone.
        """
        golden, count = bundle.golden, len(bundle.manifest.labels)
        recorded = golden.variants.get(self.variant, golden.probabilities)
        fine = self.variant == "fp32" and self.device == "cpu"
        tolerance = GOLDEN_TOLERANCE if fine else COARSE_TOLERANCE
        if recorded.shape != (len(golden.pixels), count) or not len(golden.pixels):
            raise BrokenVersion(
                f"{bundle.folder}: golden answers of shape {list(recorded.shape)} "
                f"for {len(golden.pixels)} inputs and {count} labels"
            )
        count_golden = 1 if briefly else len(golden.pixels)
        for size in {1} if briefly else self.sizes or {1, bundle.manifest.max_batch_size}:
            # Whole batches: others would run in other sizes.
            rows = np.resize(np.arange(count_golden), -(-count_golden // size) * size)
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                try:
                    answers, _ = self._run_gently(golden.pixels[chosen], gently)
                except InferenceFailed as error:
                    raise BrokenVersion(
                        f"{bundle.folder}: a golden input fails: {error}"
                    ) from error
                expected = recorded[chosen]
                if answers.shape != expected.shape:
                    raise BrokenVersion(
                        f"{bundle.folder}: answers of shape {list(answers.shape)} for {len(chosen)} "
                        f"inputs and {count} labels"
                    )
                if not np.isfinite(answers).all():
                    raise BrokenVersion(f"{bundle.folder}: NaN or infinity for a golden input")
                # Not `difference > tolerance`: that is False for NaN.
                difference = float(np.abs(answers - expected).max())
                if not difference <= tolerance:
                    raise BrokenVersion(
                        f"{bundle.folder}: {self.variant} on {self.device} at batch size {len(chosen)}: "
                        f"its answers to the golden inputs are off by {difference:.3g} (allowed "
                        f"{tolerance:g})"
                    )

    def measure(
        self,
        bundle: Bundle,
        record: Callable[[int, float], None],
        *,
        gently: bool = False,
        briefly: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Tells `record` how many seconds batches take: of every size that is bound; else of one, of
        the largest size, and of those between as long as that takes no longer than a second in all.
        `briefly`: once each, without those between; `gently`: it rests in between, too. `clock`: by
        which seconds are counted.
        """
        briefly = briefly or gently
        largest, pixels = bundle.manifest.max_batch_size, bundle.golden.pixels
        between = [] if briefly else [1 << n for n in range(1, (largest - 1).bit_length())]
        ends = time.perf_counter() + _MEASURE_S
        for size in self.sizes or dict.fromkeys((1, largest, *between)):
            rows = np.resize(pixels, (size, *pixels.shape[1:]))
            for _ in range(1 if briefly else _MEASURED_RUNS):
                record(size, self._run_gently(rows, gently, clock)[1])
                now = time.perf_counter()
                if now > ends and not briefly:
                    break
            if now > ends and size not in (1, largest) and not self.sizes:
                return

    def run(self, pixels: Pixels) -> Probabilities:
        """Probabilities float32 `[N, classes]` of `pixels` uint8 `[N, H, W, C]`.

        Raises InferenceFailed where ONNX Runtime does.
        """
        if self.fixed_batch not in (None, len(pixels)):
            return self._run_fixed(pixels, self.fixed_batch)
        return self._run(pixels)

    def _run_fixed(self, pixels: Pixels, batch: int) -> Probabilities:
        parts = []
        for start in range(0, len(pixels), batch):
            rows = pixels[start : start + batch]
            padding = [(0, batch - len(rows)), (0, 0), (0, 0), (0, 0)]
            parts.append(self._run(np.pad(rows, padding))[: len(rows)])
        return np.concatenate(parts)

    def _run(self, pixels: Pixels) -> Probabilities:
        of_size = self._bound.get(len(pixels))
        try:
            if of_size is None:
                # What is not bound lies elsewhere each time: no graph is recorded.
                options = (_graph(-1),) if self._replays else ()
                answer: Probabilities = self._session.run(
                    [self.output], {self.input: pixels}, *options
                )[0]
                return answer
            bound = next((each for each in of_size if each.pixels is pixels), of_size[0])
            if pixels is not bound.pixels:
                np.copyto(bound.pixels, pixels, casting="no")
            if self._replays:
                return self._replays.submit(self._replay, bound).result()
            if bound.source:
                bound.source.update_inplace(bound.pixels)
            bound.session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise InferenceFailed(str(error)) from error
        return bound.probabilities.copy()

    def close(self) -> None:
        """Lets go of the session and all its memory; nothing can be run any more."""
        if self._replays:
            self._replays.shutdown()
        self._bound.clear()
        self._one_more = None
        del self._session

    def _replay(self, bound: _Bound) -> Probabilities:
        """A graph reads and writes where it did when it was recorded: in the card's own memory."""
        assert bound.source
        assert bound.sink
        bound.source.update_inplace(bound.pixels)
        bound.session.run_with_iobinding(bound.binding, bound.options)
        answer: Probabilities = bound.sink.numpy()
        return answer


def _graph(number: int) -> ort.RunOptions:
    """Options of a run that records or repeats the CUDA graph of this number; of -1, none."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _view(value: ort.OrtValue) -> npt.NDArray[Any]:
    """The memory of a value of ONNX Runtime's, which the array keeps alive."""
    kind = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[value.data_type()]
    memory = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    memory.owner = value
    return np.frombuffer(memory, kind).reshape(value.shape())
