"""A storm: requests of every kind and fate at once, at every door, and whether each gets its answer.

python benchmarks/storm.py [--requests 200000 | --seconds 3600] [--acceptors 1] [--engines 0]
                           [--front core] [--kill-every-s 5] [--drain-every-s 60]

Starts `convoy serve` with models that answer four sums over the bytes of a row, exact in float32, so
that an answer which belongs to another row, or to a mixture, is seen. Clients in several processes ask
for 1 to 300 rows at a time: by gRPC calls over both APIs, by streams, and over HTTP/1.1 on connections
that are kept or new. They cancel, hang up, set deadlines too short to be kept, send images that can't
be read, and rows on which the model fails or gives NaN. Others check and watch the server's health.
Meanwhile an operator publishes versions, loads and unloads a model, and scrapes metrics; the server is
drained and started again; with several server processes, one of them is killed (-9) now and then.

What was answered how is counted. The storm exits with 1 if a process crashed, a row was answered
wrongly, a call ended in a way that its request does not explain, or a call never ended.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.storming.grpc_callers import GrpcCallers, Tally
from benchmarks.storming.http_callers import HttpCallers
from benchmarks.storming.operator import Operator
from benchmarks.storming.outages import Outages
from benchmarks.storming.requests import make_models
from benchmarks.storming.server import NotStarted, Server

# No run has so many.
_ENDLESS = 10**12

# So long before a drain no process is killed: one that dies meanwhile makes that no clean stop.
_APART_S = 5.0

DOORS = ("Classify", "ModelInfer", "ClassifyStream", "HTTP infer", "HTTP get", "health")
STEPS = ("switch", "load", "unload")


class Task(NamedTuple):
    """What one client process is to do."""

    target: str
    http: str
    requests: int
    seed: int
    http_callers: int
    few: bool  # see `HttpCallers`


def client(pipe: Connection, task: Task, outages: Outages) -> None:
    """One client process; tells its counts twice a second and at the end."""
    tally = Tally(task.requests, outages)
    callers = [
        GrpcCallers(task.target, tally, task.seed),
        HttpCallers(task.http, tally, task.seed, task.http_callers, task.few),
    ]
    threading.excepthook = lambda bug: tally.examples.append(f"bug of the storm: {bug.exc_value!r}")
    working = [threading.Thread(target=each.run, daemon=True) for each in callers]
    for thread in working:
        thread.start()
    pipe.send(_said(tally))  # it has begun
    while any(thread.is_alive() for thread in working):
        time.sleep(0.5)
        pipe.send(_said(tally))
    pipe.send(_said(tally))
    pipe.send(None)


def _said(tally: Tally) -> Any:
    return Counter(tally.counts), Counter(tally.rows), list(tally.examples), tally.started


def storm(arguments: argparse.Namespace, folder: Path) -> int:
    make_models(folder / "models")
    several = arguments.acceptors > 1 or arguments.engines > 0
    roles = itertools.cycle(["acceptor", "engine"] if arguments.engines else ["acceptor"])
    kills = several and arguments.kill_every_s > 0
    log = arguments.log or folder / "server.log"
    spawn, began = multiprocessing.get_context("spawn"), time.monotonic()
    outages = Outages(spawn)
    server = Server(
        folder / "models", log, arguments.acceptors, arguments.engines, arguments.front, outages
    )
    share = _ENDLESS if arguments.seconds else arguments.requests // arguments.processes
    processes, pipes = [], {}
    for n in range(arguments.processes):
        ours, theirs = spawn.Pipe()
        task = Task(
            server.target,
            server.http,
            share,
            arguments.seed + n,
            arguments.http_callers // arguments.processes,
            few=n == 0,
        )
        process = spawn.Process(target=client, args=(theirs, task, outages))
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = n
    outages.started()  # the clients, too, have taken a while to begin
    operator = Operator(server, folder / "models", outages, every_s=arguments.operate_every_s)
    told: dict[int, Any] = {}
    killed: Counter[str] = Counter()
    wrong, running, drains = [], dict(pipes), 0
    kill_at = drain_at = shown = began
    all_began = False
    while running:
        for pipe in wait(list(running), 0.5):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                wrong.append("a client process has died")
                said = None
            if said is None:
                del running[pipe]
            else:
                told[pipes[pipe]] = said
        now = time.monotonic()
        if not all_began and len(told) == len(processes):
            all_began, began = True, now
            kill_at, drain_at = now + arguments.kill_every_s, now + arguments.drain_every_s
            if arguments.seconds:
                outages.end_at(now + arguments.seconds)
        if server.process.poll() is not None:
            wrong.append(f"the server died with status {server.process.returncode}")
            break
        # What is killed while the server stops makes its exit status 1.
        to_drain = arguments.drain_every_s and now >= drain_at - _APART_S
        if all_began and kills and now >= kill_at and not to_drain:
            role = next(roles)
            killed[role] += server.kill(role)
            kill_at = now + arguments.kill_every_s
        if all_began and arguments.drain_every_s and now >= drain_at:
            try:
                wrong += server.restart()
            except NotStarted as error:
                wrong.append(str(error))
                break
            drains += 1
            drain_at = time.monotonic() + arguments.drain_every_s
            kill_at = time.monotonic() + arguments.kill_every_s
        if now >= shown + 10:
            shown = now
            done = sum(sum(_requests(each[0]).values()) for each in told.values())
            print(f"{done} requests after {now - began:.0f} s", file=sys.stderr, flush=True)
    took_s = time.monotonic() - began
    operator.stop()
    for process in processes:
        if running:  # it was broken off
            process.kill()
        process.join()
    counts = sum((each[0] for each in told.values()), Counter())
    rows = sum((each[1] for each in told.values()), Counter())
    for example in itertools.chain.from_iterable(each[2] for each in told.values()):
        print(example, file=sys.stderr)
    wrong += server.stop() + operator.wrong
    ended = sum(value for (door, _), value in _requests(counts).items() if door != "health")
    if ended != (started := sum(each[3] for each in told.values())):
        wrong.append(f"{started} requests were begun, {ended} have ended")
    if wrong_rows := rows["wrong"]:
        wrong.append(f"{wrong_rows} rows were answered wrongly")
    for what in ("lost", "unexplained"):
        if count := sum(value for (_, outcome), value in counts.items() if outcome == what):
            wrong.append(f"{count} requests: {what}")
    for door in DOORS:
        if not counts[door, "answered"]:
            wrong.append(f"{door}: no request was answered")
    if not (operator.done["scrape"] and sum(operator.done[step] for step in STEPS)):
        wrong.append("the operator did nothing")
    print(
        f"acceptors {arguments.acceptors}, engines {arguments.engines}, front {arguments.front}: "
        f"{ended} requests, {rows['all']} rows, in {took_s:.0f} s"
    )
    print("\n".join(_table(counts)))
    if kills:
        print("killed: " + ", ".join(f"{count} x {role}" for role, count in killed.items()))
    print(f"drains: {drains}")
    print("operator: " + ", ".join(f"{count} x {what}" for what, count in operator.done.items()))
    print(f"rows answered wrongly: {rows['wrong']}")
    print("\n".join(wrong) or "no crash, nothing lost, nothing unexplained")
    return 1 if wrong else 0


def _requests(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    return Counter({key: value for key, value in counts.items() if key[1] != "unexplained"})


def _table(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    kinds = DOORS
    outcomes = [
        "answered", "in part", "failed", "invalid", "cancelled", "late", "refused", "absent",
        "unavailable", "lost", "unexplained",
    ]  # fmt: skip
    outcomes += sorted({outcome for _, outcome in counts} - set(outcomes))
    yield f"| outcome | {' | '.join(kinds)} | all |"
    yield "|---" * (len(kinds) + 2) + "|"
    for outcome in outcomes:
        numbers = [counts[kind, outcome] for kind in kinds]
        yield f"| {outcome} | {' | '.join(map(str, numbers))} | {sum(numbers)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--acceptors", type=int, default=1)
    parser.add_argument("--engines", type=int, default=0)
    parser.add_argument("--kill-every-s", type=float, default=5.0, help="0 for never")
    parser.add_argument("--front", choices=("core", "public"), default="core")
    parser.add_argument("--seconds", type=float, default=0, help="instead of --requests")
    parser.add_argument("--drain-every-s", type=float, default=0, help="0 for never")
    parser.add_argument("--operate-every-s", type=float, default=0.5)
    parser.add_argument("--http-callers", type=int, default=16, help="threads, in all")
    parser.add_argument("--processes", type=int, default=2, help="client processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for the server's log")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return storm(arguments, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
