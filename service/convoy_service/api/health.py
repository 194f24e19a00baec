"""grpc.health.v1.Health, https://github.com/grpc/grpc/blob/master/doc/health-checking.md, and
server reflection.
"""

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2 as pb
from grpc_reflection.v1alpha import reflection, reflection_pb2

from convoy_service.errors import UnknownModel
from convoy_service.transport.dispatcher import Call, Front

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name

Send = Callable[[Message], None]


class Health:
    """What serves: "" is the process, other names are models and services."""

    def __init__(self, front: Front) -> None:
        self._serving: dict[str, bool] = {}
        self._watchers: list[tuple[str, Send]] = []
        front.unary(f"/{SERVICE}/Check", pb.HealthCheckRequest, self._check, always=True)
        front.watch(f"/{SERVICE}/Watch", pb.HealthCheckRequest, self._watch)

    def set(self, name: str, serving: bool) -> None:
        if self._serving.get(name) != serving:
            self._serving[name] = serving
            for watched, send in self._watchers:
                if watched == name:
                    send(self._response(name))

    def _response(self, name: str) -> Message:
        known: dict[bool | None, Any] = {
            None: pb.HealthCheckResponse.SERVICE_UNKNOWN,
            False: pb.HealthCheckResponse.NOT_SERVING,
            True: pb.HealthCheckResponse.SERVING,
        }
        response: Message = pb.HealthCheckResponse(status=known[self._serving.get(name)])
        return response

    async def _check(self, request: pb.HealthCheckRequest, call: Call) -> Message:
        if request.service not in self._serving:
            raise UnknownModel(f"no service or model {request.service!r} here")
        return self._response(request.service)

    def _watch(self, request: pb.HealthCheckRequest, send: Send) -> Callable[[], None]:
        watcher = (request.service, send)
        self._watchers.append(watcher)
        send(self._response(request.service))
        return lambda: self._watchers.remove(watcher)


def add_reflection(front: Front, services: list[str]) -> None:
    """Tells callers, such as grpcurl, of the `services` and their messages."""
    servicer: Any = reflection.ReflectionServicer([*services, reflection.SERVICE_NAME])

    async def answer(request: reflection_pb2.ServerReflectionRequest, _: Call) -> Message:
        response: Message = next(servicer.ServerReflectionInfo(iter((request,)), None))
        return response

    front.stream(
        f"/{reflection.SERVICE_NAME}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest,
        answer,
    )
