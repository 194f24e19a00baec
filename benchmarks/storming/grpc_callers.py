"""Callers over gRPC: calls in flight, streams, and health checks and watches beside them."""

import heapq
import itertools
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from benchmarks.storming.outages import Outages
from benchmarks.storming.requests import (
    CLASSIFY,
    INFER,
    STREAM,
    Code,
    Request,
    Storm,
    Verdict,
)  # fmt: skip
from convoy_protos import classifier_pb2 as pb

# A call that has not ended after so long is lost: no request takes nearly as much.
LOST_S = 60.0

# Who hears UNAVAILABLE waits so long before he asks again.
BACK_OFF_S = 0.05

# Of each client process: calls in flight, and streams beside them.
WINDOW, STREAMS, STREAM_WINDOW, CHANNELS = 64, 2, 32, 4


class Tally:
    """What one client process has asked, and what became of it. Its threads share it."""

    def __init__(self, requests: int, outages: Outages) -> None:
        """At most so many `requests` are begun, and none when `outages.over()`."""
        self._requests, self.outages = requests, outages
        self._lock = threading.Lock()
        self.started = 0
        # (door, outcome) -> requests; rows; and the first examples of what is wrong.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.rows: Counter[str] = Counter()
        self.examples: list[str] = []

    def next_one(self) -> bool:
        """Whether there is to be one more."""
        with self._lock:
            if self.started >= self._requests or self.outages.over():
                return False
            self.started += 1
            return True

    def count(self, door: str, request: Request | None, verdict: Verdict) -> None:
        rows = len(request.expected) if request else 0
        with self._lock:
            self.counts[door, verdict.outcome] += 1
            self.rows["all"] += rows
            self.rows["wrong"] += verdict.wrong_rows
            if verdict.unexplained:
                self.counts[door, "unexplained"] += 1
            if (verdict.wrong_rows or verdict.unexplained) and len(self.examples) < 20:
                failing = request.failing if request else {}
                self.examples.append(
                    f"{door}: {rows} rows, failing {failing}, wrong rows {verdict.wrong_rows} "
                    f"{verdict.unexplained}"
                )

    def excuse(self, verdict: Verdict, code: int, sent: float) -> Verdict:
        """The verdict, unless an outage explains how the request ended."""
        ended = code in {Code.UNAVAILABLE.value[0], Code.CANCELLED.value[0]}
        if verdict.unexplained and ended and self.outages.explain(sent):
            return Verdict("unavailable")
        return verdict


OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Also how long a connection may take, behind what the server is busy with.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class GrpcCallers:
    """Of one client process: calls in flight, streams, and health checks beside them."""

    def __init__(self, target: str, tally: Tally, seed: int) -> None:
        self._storm, self._tally = Storm(seed), tally
        self._channels = [grpc.insecure_channel(target, OPTIONS) for _ in range(CHANNELS)]
        self._seed = seed

    def run(self) -> None:
        streams = [_Stream(self._tally, channel, self._seed * 100 + n)
                   for n, channel in enumerate(self._channels[:STREAMS])]  # fmt: skip
        health = _Health(self._tally, self._channels[-1], self._seed)
        for thread in (*(stream.thread for stream in streams), health.thread):
            thread.start()
        self._calls()
        for stream in streams:
            stream.join()
        health.stop()
        for channel in self._channels:
            channel.close()

    def _calls(self) -> None:
        storm, ended = self._storm, queue.SimpleQueue[_Call]()
        calls: dict[_Call, None] = {}
        cancels: list[tuple[float, int, _Call]] = []
        numbers, more, again_at = itertools.count(), True, 0.0
        methods = {
            (n, api): channel.unary_unary(api)
            for n, channel in enumerate(self._channels)
            for api in (CLASSIFY, INFER)
        }
        while more or calls:
            again_at = max(again_at, time.monotonic() + self._tally.outages.calm_s())
            idle = time.monotonic() < again_at
            while not idle and len(calls) < WINDOW and (more := more and self._tally.next_one()):
                api = INFER if storm.chance(0.5) else CLASSIFY
                request, number = storm.request(api), next(numbers)
                method = methods[number % CHANNELS, api]
                call = _Call(
                    request, time.monotonic(), method.future(request.message, request.timeout_s)
                )
                calls[call] = None
                if request.cancel_after_s is not None:
                    heapq.heappush(cancels, (call.sent + request.cancel_after_s, number, call))
                call.future.add_done_callback(lambda _, call=call: ended.put(call))  # type: ignore[misc]
            until = again_at if idle else time.monotonic() + 1.0
            if cancels:
                until = min(until, cancels[0][0])
            try:
                while True:
                    call = ended.get(timeout=max(0.0, until - time.monotonic()))
                    if call in calls:
                        del calls[call]
                        if self._settle(call) == "unavailable":
                            again_at = time.monotonic() + BACK_OFF_S
                    if ended.empty():
                        break
            except queue.Empty:
                pass
            now = time.monotonic()
            while cancels and cancels[0][0] <= now:
                call = heapq.heappop(cancels)[2]
                call.cancelled = call.future.cancel() or call.cancelled
            for call in list(calls):
                if now < call.sent + LOST_S:
                    break
                del calls[call]
                self._tally.count(_NAMES[call.request.api], call.request, Verdict("lost"))

    def _settle(self, call: "_Call") -> str:
        request, code = call.request, call.future.code().value[0]
        answer: Any = None
        if not code:
            answer = call.future.result()
            if request.api == CLASSIFY:
                answer = pb.ClassifyResponse.FromString(answer)
        verdict = self._storm.judge(
            request, code, call.future.details() or "", answer, call.cancelled
        )
        verdict = self._tally.excuse(verdict, code, call.sent)
        self._tally.count(_NAMES[request.api], request, verdict)
        return verdict.outcome


_NAMES = {CLASSIFY: "Classify", INFER: "ModelInfer"}


@dataclass(eq=False)
class _Call:
    request: Request
    sent: float
    future: Any
    cancelled: bool = False


class _Stream:
    """Streams, one after another, some cancelled or cut off by a deadline half-way."""

    def __init__(self, tally: Tally, channel: grpc.Channel, seed: int) -> None:
        self._tally, self._storm = tally, Storm(seed)
        self._open = channel.stream_stream(
            STREAM,
            request_serializer=pb.ClassifyStreamRequest.SerializeToString,
            response_deserializer=pb.ClassifyStreamResponse.FromString,
        )
        self._owed: dict[str, Request] = {}
        self._moved, self._call = time.monotonic(), None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def join(self) -> None:
        """Waits for the end, and counts what is lost where it never comes."""
        while self.thread.is_alive():
            self.thread.join(1.0)
            if time.monotonic() > self._moved + LOST_S:
                for request in self._owed.values():
                    self._tally.count("ClassifyStream", request, Verdict("lost"))
                return

    def _run(self) -> None:
        more = True
        while more:
            more = self._one()

    def _one(self) -> bool:
        """One stream, to its end; whether there is to be another."""
        time.sleep(self._tally.outages.calm_s())
        storm, tally, more = self._storm, self._tally, True
        timeout_s = storm.some_s(0.002, 1.0) if storm.chance(0.1) else None
        cancel_at = storm.some(0, 100) if storm.chance(0.1) else -1
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        call, began = self._open(iter(messages.get, None), timeout_s), time.monotonic()
        owed = self._owed = {}
        sent, wanted, cancelled, code = 0, storm.some(1, 300), False, 0
        try:
            while True:
                while len(owed) < STREAM_WINDOW and sent < wanted and more:
                    if not (more := tally.next_one()):
                        break
                    request = storm.request(CLASSIFY)
                    owed[str(sent)] = request
                    parsed = pb.ClassifyRequest.FromString(request.message)
                    messages.put(pb.ClassifyStreamRequest(id=str(sent), request=parsed))
                    sent += 1
                    if sent == cancel_at:
                        cancelled = call.cancel()
                if sent == wanted or not more:
                    messages.put(None)
                answer = next(call)
                self._moved = time.monotonic()
                self._take(owed, answer, timeout_s is not None, began)
        except StopIteration:
            words = "the stream ended without an answer"
        except grpc.RpcError:
            code, words = call.code().value[0], call.details() or ""
            if call.code() is Code.UNAVAILABLE:
                time.sleep(BACK_OFF_S)
        finally:
            messages.put(None)
        for asked in owed.values():
            request = asked._replace(failing={}, limited=timeout_s is not None)
            if code:
                verdict = storm.judge(request, code, words, None, cancelled)
                tally.count("ClassifyStream", request, tally.excuse(verdict, code, began))
            else:
                tally.count("ClassifyStream", request, Verdict("lost"))
        return more

    def _take(
        self,
        owed: dict[str, Request],
        answer: pb.ClassifyStreamResponse,
        limited: bool,
        began: float,
    ) -> None:
        request = owed.pop(answer.id, None)
        if request is None:
            raise SystemExit(f"an answer to {answer.id!r}, which nobody asked, or a second one")
        error = answer.error if answer.HasField("error") else None
        code, words = (error.code, error.message) if error else (0, "")
        verdict = self._storm.judge(
            request._replace(limited=limited), code, words, answer.response, False
        )
        verdict = self._tally.excuse(verdict, code, began)
        self._tally.count("ClassifyStream", request, verdict)
        if verdict.outcome == "unavailable":
            time.sleep(BACK_OFF_S)


class _Health:
    """Checks of the process's health, and watches that end after a while."""

    def __init__(self, tally: Tally, channel: grpc.Channel, seed: int) -> None:
        self._tally, self._storm, self._channel = tally, Storm(seed), channel
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def stop(self) -> None:
        self._ended.set()
        self.thread.join(LOST_S)

    def _run(self) -> None:
        request = health_pb2.HealthCheckRequest()
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        watch = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        while not self._ended.wait(self._storm.some_s(0.005, 0.1)):
            if self._ended.wait(self._tally.outages.calm_s()):
                return
            sent = time.monotonic()
            try:
                if self._storm.chance(0.5):
                    status = check(request, timeout=LOST_S).status
                else:
                    call = watch(request, timeout=LOST_S)
                    status = next(call).status
                    self._ended.wait(self._storm.some_s(0.001, 0.5))
                    call.cancel()
            except grpc.RpcError as error:
                code = error.code().value[0]  # type: ignore[attr-defined]
                late = code == Code.DEADLINE_EXCEEDED.value[0]
                verdict = Verdict("lost" if late else "unavailable", 0, str(error.code()))  # type: ignore[attr-defined]
                self._tally.count("health", None, self._tally.excuse(verdict, code, sent))
                continue
            serving = status == health_pb2.HealthCheckResponse.SERVING
            words = "" if serving else "the process says that it does not live"
            self._tally.count("health", None, Verdict("answered", 0, words))
