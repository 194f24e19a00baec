"""convoy.v1.ImageClassifier <-> the core: protos/classifier.proto says what each call means."""

import math
import time
from collections.abc import Callable, Sequence

import grpc
import numpy as np
import numpy.typing as npt

from convoy_protos import classifier_pb2 as pb
from convoy_service.api.control import Order, carry_out
from convoy_service.artifacts.images import Pixels
from convoy_service.engine.batcher import Answer
from convoy_service.errors import InvalidImage, InvalidRequest
from convoy_service.registry.registry import Entry, Repository, Served
from convoy_service.transport.dispatcher import Call, Front

Flags = npt.NDArray[np.bool_]

SERVICE = pb.DESCRIPTOR.services_by_name["ImageClassifier"].full_name
CONTROL = pb.DESCRIPTOR.services_by_name["ModelControl"].full_name


class ClassifierRpc:
    """The handlers of the services `SERVICE` and `CONTROL`."""

    def __init__(
        self,
        repository: Repository,
        hold: Callable[[Call, int], None],
        order: Order | None = None,
    ) -> None:
        """`hold` counts memory that a call is about to take: `Front.hold`. `order` carries out what
        operators say; None where they may not.
        """
        self._repository, self._hold, self._order = repository, hold, order

    def register(self, front: Front) -> None:
        front.unary(f"/{SERVICE}/Classify", pb.ClassifyRequest, self.classify)
        front.stream(
            f"/{SERVICE}/ClassifyStream", pb.ClassifyStreamRequest, self.classify_one, refuse_one
        )
        front.unary(f"/{SERVICE}/ListModels", pb.ListModelsRequest, self.list_models, always=True)
        # However busy the service is: going back may be what helps.
        front.unary(f"/{CONTROL}/Promote", pb.PromoteRequest, self.promote, always=True)
        front.unary(f"/{CONTROL}/Rollback", pb.RollbackRequest, self.rollback, always=True)
        front.unary(f"/{CONTROL}/Pin", pb.PinRequest, self.pin, always=True)

    async def classify(self, request: pb.ClassifyRequest, call: Call) -> pb.ClassifyResponse:
        response = pb.ClassifyResponse()
        await self._answer(request, call, response)
        return response

    async def classify_one(
        self, message: pb.ClassifyStreamRequest, call: Call
    ) -> pb.ClassifyStreamResponse:
        response = pb.ClassifyStreamResponse(id=message.id)
        await self._answer(message.request, call, response.response)
        return response

    async def _answer(
        self, request: pb.ClassifyRequest, call: Call, response: pb.ClassifyResponse
    ) -> None:
        """Fills in the `response`: messages that are put into others are copied."""
        version: int | str = request.version_label or request.version
        key = (lambda: request.key) if request.key else call.key
        with self._repository.take(request.model, version, key) as served:
            call.model, call.requests = served.name, served.requests
            if not request.images:
                raise InvalidRequest("the request has no images: send at least one")
            served.check_count(len(request.images))
            self._hold(call, len(request.images) * served.image_bytes)
            inputs = [_input(image) for image in request.images]
            decoded, decode_s = await served.decode(inputs, call.deadline, call.trace)
            readable = [item for item in decoded if not isinstance(item, InvalidImage)]
            answer: Answer | None = None
            unsure: Flags = np.empty(0, np.bool_)
            if readable:
                pixels = readable[0][np.newaxis] if len(readable) == 1 else np.stack(readable)
                answer = await served.run(pixels, call.deadline, 0, call.trace)
                call.ran(decode_s, answer.queue_s, answer.run_s)
                unsure = served.unsure(answer.outputs)
                if served.observed:
                    given = zip(inputs, decoded, strict=True)
                    taken = [each for each, item in given if not isinstance(item, InvalidImage)]
                    served.answered(taken, pixels, answer.outputs, unsure)  # type: ignore[arg-type]
        response.model, response.version = served.name, served.version
        _add_results(response, served, decoded, answer, unsure, request.top_k or 1)
        timings = response.timings
        timings.decode_s = decode_s
        if answer:
            timings.queue_s, timings.run_s = answer.queue_s, answer.run_s
            timings.batch_size = answer.batch_size
        timings.total_s = time.monotonic() - call.arrived

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        for entry in self._repository.entries():
            _describe(entry, response.models.add())
        return response

    async def promote(self, request: pb.PromoteRequest, call: Call) -> pb.PromoteResponse:
        response = pb.PromoteResponse()
        await self._carry_out("promote", request.model, [request.version], response.model)
        return response

    async def rollback(self, request: pb.RollbackRequest, call: Call) -> pb.RollbackResponse:
        response = pb.RollbackResponse()
        await self._carry_out("rollback", request.model, [], response.model)
        return response

    async def pin(self, request: pb.PinRequest, call: Call) -> pb.PinResponse:
        response = pb.PinResponse()
        await self._carry_out("pin", request.model, request.versions, response.model)
        return response

    async def _carry_out(
        self, verb: str, name: str, versions: Sequence[int], model: pb.Model
    ) -> None:
        """Gives an order, and fills in what the `model` has come to."""
        await carry_out(self._order, verb, name, list(versions))
        entries = self._repository.entries()
        for entry in entries:
            if entry.name == name or (not name and len(entries) == 1):
                _describe(entry, model)


def _describe(entry: Entry, model: pb.Model) -> None:
    model.name, model.reason, model.state = entry.name, entry.reason, pb.Model.UNAVAILABLE
    if entry.served:
        served, manifest = entry.served, entry.served.manifest
        model.state = pb.Model.READY
        model.version = served.version
        model.labels.extend(manifest.labels)
        model.height, model.width, model.channels = manifest.pixels.shape
        model.max_batch_size = manifest.max_batch_size
        model.sha256 = served.bundle.sha256
        model.device, model.variant = served.device, served.variant
        if manifest.thresholds:
            model.unsure_threshold = manifest.thresholds.unsure
            model.class_thresholds.extend(manifest.thresholds.per_class)
        if manifest.scores:
            model.accuracy = manifest.scores.accuracy
    model.policy = entry.state.policy
    model.versions.extend(each.version for each in entry.state.versions)
    for each in entry.state.versions:
        model.version_states.add(
            version=each.version,
            state=pb.Version.State.Value(each.state.upper()),
            reason=each.reason,
            created=each.created,
            sha256=each.sha256,
            accuracy=each.accuracy,
            test_images=each.test_images,
        )
    route = entry.route
    model.version_labels.update(route.labels)
    model.route.stable = route.stable
    model.route.mode = pb.Route.STABLE
    if route.candidate:
        model.route.mode = pb.Route.SHADOW if route.shadow else pb.Route.CANARY
        model.route.candidate, model.route.share = route.candidate, route.share
        if decision := entry.state.trial:
            trial = model.route.trial
            trial.why = decision.why
            trial.latency_ratio = decision.latency_ratio
            trial.confidence_shift = decision.confidence_shift
            for bound in decision.bounds:
                trial.limits.add(
                    name=bound.name,
                    mean=bound.mean,
                    limit=bound.limit,
                    batches=round(bound.number),
                    kept=bound.kept,
                )


def refuse_one(
    message: pb.ClassifyStreamRequest | None, code: grpc.StatusCode, words: str
) -> pb.ClassifyStreamResponse:
    return pb.ClassifyStreamResponse(
        id=message.id if message else "", error=pb.Error(code=code.value[0], message=words)
    )


def _input(image: pb.Image) -> bytes | Pixels | InvalidImage:
    if image.WhichOneof("content") == "encoded":
        return image.encoded
    if image.WhichOneof("content") is None:
        return InvalidImage("the image has neither `encoded` nor `pixels`: set one of them")
    pixels = image.pixels
    shape = (pixels.height, pixels.width, pixels.channels)
    if 0 in shape:
        return InvalidImage(
            f"pixels of shape {list(shape)}: height, width and channels must be at least 1"
        )
    if pixels.height * pixels.width * pixels.channels != len(pixels.data):
        return InvalidImage(
            f"the pixels have {len(pixels.data)} bytes, but height x width x channels is "
            f"{'x'.join(map(str, shape))}"
        )
    return np.frombuffer(pixels.data, np.uint8).reshape(shape)


def _add_results(
    response: pb.ClassifyResponse,
    served: Served,
    decoded: list[Pixels | InvalidImage],
    answer: Answer | None,
    unsure: Flags,
    top_k: int,
) -> None:
    rows = zip(answer.outputs if answer else (), unsure.tolist(), strict=True)
    doubts = 0
    for item in decoded:
        result = response.results.add()
        if isinstance(item, InvalidImage):
            error = result.error
            error.code, error.message = grpc.StatusCode.INVALID_ARGUMENT.value[0], str(item)
            continue
        row, is_unsure = next(rows)
        best = row.argmax()  # NaN where there is one
        if not math.isfinite(row[best]):
            error = result.error
            error.code = grpc.StatusCode.INTERNAL.value[0]
            error.message = "the model failed on this image"
            continue
        # The best first; equal ones in the order of the classes.
        order = (best,) if top_k == 1 else np.argsort(-row, kind="stable")[:top_k]
        classification = result.classification
        for index in order:
            classification.labels.add(
                index=index, name=served.manifest.labels[index], probability=row[index]
            )
        if is_unsure:
            classification.unsure = True
            doubts += 1
    if doubts:
        served.count_unsure(doubts)
