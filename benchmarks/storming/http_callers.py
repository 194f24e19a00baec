"""Callers over HTTP/1.1: with one connection for all requests, or a new one for each."""

import http.client
import json
import threading
import time
from typing import Any

import numpy as np

from benchmarks.storming.grpc_callers import BACK_OFF_S, LOST_S, Tally
from benchmarks.storming.requests import (
    CLASSES,
    HTTP,
    MODEL_HEADER,
    Code,
    Request,
    Rows,
    Storm,
    Verdict,
)  # fmt: skip

# gRPC's statuses by HTTP's; 400 may be two of them, and only one is ever expected here.
_CODES = {
    200: Code.OK,
    400: Code.INVALID_ARGUMENT,
    404: Code.NOT_FOUND,
    429: Code.RESOURCE_EXHAUSTED,
    500: Code.INTERNAL,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}

_FEW = 5

# What is asked beside inference; these need no model that is loaded and unloaded.
_PAGES = (
    "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/quick", "/v2/models/quick/config",
    "/v2/models/quick/ready", "/v2/models/slow/stats", "/v2/models/slow/config",
)  # fmt: skip


class HttpCallers:
    """Of one client process: so many threads, some of which keep their connection.

    While callers over gRPC rest, so do those here, but for the first few of one process (`few`): two
    threads of the server meet in a race only where the callers leave them both cores.
    """

    def __init__(self, address: str, tally: Tally, seed: int, callers: int, few: bool) -> None:
        self._threads = []
        for n in range(callers):
            one_of_few = few and n < _FEW
            keep = bool(n % 2) and not one_of_few
            caller = _Caller(address, tally, seed * 1000 + n, keep, rests=not one_of_few)
            self._threads.append(threading.Thread(target=caller.run, daemon=True))

    def run(self) -> None:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()


class _Caller:
    def __init__(self, address: str, tally: Tally, seed: int, keep: bool, rests: bool) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._tally, self._storm = tally, Storm(seed)
        self._keep, self._rests = keep, rests
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        while self._tally.next_one():
            resting_s = self._tally.outages.calm_s()
            if resting_s and self._rests:
                self._hang_up()
                time.sleep(resting_s)
            if not resting_s and self._storm.chance(0.5):
                self._infer(self._storm.request(HTTP))
            else:
                self._look(_PAGES[self._storm.some(0, len(_PAGES) - 1)])
        self._hang_up()

    def _infer(self, request: Request) -> None:
        sent = time.monotonic()
        try:
            if request.cancel_after_s is not None:
                self._leave(request)
                verdict = Verdict("cancelled")
            else:
                status, head, body = self._ask("POST", request)
                verdict = self._judge(request, status, head, body, sent)
        except (OSError, http.client.HTTPException) as error:
            verdict = self._broken(error, sent)
        self._tally.count("HTTP infer", request, verdict)

    def _look(self, path: str) -> None:
        sent = time.monotonic()
        try:
            status, _, body = self._ask("GET", path)
            text = body.decode()
            if status == 200:
                json.loads(text or "{}")
                verdict = Verdict("answered")
            else:
                code = _CODES.get(status, Code.UNKNOWN).value[0]
                words = f"{path}: {status} {text}"
                outcome = "unavailable" if status == 503 else f"HTTP {status}"
                verdict = self._tally.excuse(Verdict(outcome, 0, words), code, sent)
        except (OSError, http.client.HTTPException, ValueError) as error:
            verdict = self._broken(error, sent)
        self._tally.count("HTTP get", None, verdict)

    def _broken(self, error: Exception, sent: float) -> Verdict:
        """The connection failed, or what came was no answer."""
        self._hang_up()
        if isinstance(error, TimeoutError):
            return Verdict("lost")
        if self._tally.outages.explain(sent):
            time.sleep(BACK_OFF_S)
            return Verdict("unavailable")
        took = time.monotonic() - sent
        return Verdict("dropped", 0, f"{error!r} after {took:.3f} s, keep={self._keep}")

    def _open(self) -> http.client.HTTPConnection:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, int(self._port), LOST_S)
        return self._connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(self, verb: str, what: Request | str) -> http.client.HTTPConnection:
        connection = self._open()
        if isinstance(what, str):
            connection.request(verb, what)
        else:
            headers = dict(what.headers)
            path = f"/v2/models/{headers.pop(MODEL_HEADER)}/infer"
            connection.request(verb, path, what.message, headers)
        return connection

    def _ask(self, verb: str, what: Request | str) -> tuple[int, Any, bytes]:
        connection = self._send(verb, what)
        response = connection.getresponse()
        body = response.read()
        if not self._keep:
            self._hang_up()
        return response.status, response.headers, body

    def _leave(self, request: Request) -> None:
        """Sends a request, and hangs up before its answer."""
        self._send("POST", request)
        time.sleep(request.cancel_after_s or 0.0)
        self._hang_up()

    def _judge(self, request: Request, status: int, head: Any, body: bytes, sent: float) -> Verdict:
        code = _CODES.get(status, Code.UNKNOWN).value[0]
        answer: Any = None
        if status == 200:
            words, answer = "", _sums(head, body)
        else:
            words = str(json.loads(body).get("error", ""))
        verdict = self._storm.judge(request, code, words, answer, False)
        if verdict.outcome == "unavailable":
            time.sleep(BACK_OFF_S)
        return self._tally.excuse(verdict, code, sent)


def _sums(head: Any, body: bytes) -> Rows:
    """The output of an answer, float32 [N, CLASSES]; empty where it has not that form."""
    length = head.get("Inference-Header-Content-Length")
    (output,) = json.loads(body if length is None else body[: int(length)])["outputs"]
    if length is None:
        values = np.array(output["data"], np.float32)
    else:
        values = np.frombuffer(body[int(length) :], "<f4")
    if output["shape"][1:] != [CLASSES] or values.size != output["shape"][0] * CLASSES:
        return np.empty((0, CLASSES), np.float32)
    return values.reshape(-1, CLASSES)
