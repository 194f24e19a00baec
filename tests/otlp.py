"""What takes traces, as a collector does: OTLP over HTTP, parsed as its protobuf says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Encoded

from tests.conftest import TIMEOUT_S

Kind = Encoded.SpanKind


@dataclass(frozen=True)
class Span:
    """One that was taken. Ids in hexadecimal, times in nanoseconds since 1970."""

    name: str
    trace: str
    id: str
    parent: str
    state: str
    kind: int
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]  # trace and id
    resource: dict[str, Any]

    def within(self, other: "Span") -> bool:
        return other.began <= self.began <= self.ended <= other.ended


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _spans(message: ExportTraceServiceRequest) -> Iterator[Span]:
    for of_resource in message.resource_spans:
        resource = _values(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for each in of_scope.spans:
                yield Span(
                    each.name,
                    each.trace_id.hex(),
                    each.span_id.hex(),
                    each.parent_span_id.hex(),
                    each.trace_state,
                    each.kind,
                    each.start_time_unix_nano,
                    each.end_time_unix_nano,
                    each.status.code == each.status.STATUS_CODE_ERROR,
                    _values(each.attributes),
                    tuple((link.trace_id.hex(), link.span_id.hex()) for link in each.links),
                    resource,
                )


class Receiver:
    """Takes traces at `url`, for as long as `with` lasts; answers with `status`, once `open`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.status, self.asked = 200, 0
        self.open = threading.Event()
        self.open.set()
        self._changed = threading.Condition()
        self._waited_for = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with suppress(ConnectionError):  # who asks has given up
                    self._answer()

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.asked += 1
                if not receiver.open.is_set():
                    receiver._waited_for.set()
                    receiver.open.wait(TIMEOUT_S)
                if receiver.status == 200 and self.path == "/v1/traces":
                    receiver._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(receiver.status if self.path == "/v1/traces" else 404)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def _take(self, message: ExportTraceServiceRequest) -> None:
        with self._changed:
            self.spans += _spans(message)
            self._changed.notify_all()

    def wait_for(self, found: Callable[[list[Span]], bool]) -> list[Span]:
        """All that was taken, once `found` says of it that it is enough."""
        with self._changed:
            assert self._changed.wait_for(lambda: found(self.spans), TIMEOUT_S), self.spans
            return list(self.spans)

    def wait_until_asked(self) -> None:
        """Waits until someone waits for it to be `open`."""
        assert self._waited_for.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self._http.shutdown()
        self._http.server_close()
