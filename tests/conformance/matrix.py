"""`make conformance`: clients that others wrote, against a real server; docs/conformance.md is its page.

Each client has an environment of its own, made from a lock and kept under .cache, and a program of
this folder that runs in it: it reads where the servers are, and prints what came of each row. A client
that can't be had here is a column that says so.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.conformance import perf_analyzer, rows, servers
from tests.conformance.rows import FAILED, NOT_APPLICABLE, PASSED
from tests.conftest import REPOSITORY, environment, installed

PAGE = REPOSITORY / "docs" / "conformance.md"
_LOCKS = REPOSITORY / "locks"

Cells = dict[str, dict[str, list[str]]]


class Unavailable(Exception):
    """The client can't be had here; says why."""


class Command(NamedTuple):
    arguments: list[str]
    variables: dict[str, str]


class Program(NamedTuple):
    module: str
    columns: tuple[str, ...]
    prepare: Callable[[], Command]
    # What it is, and of which release.
    version: Callable[[], str]


def _install(name: str) -> Path:
    try:
        return installed(_LOCKS / f"{name}.txt", name)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"locks/{name}.txt can't be installed here: {error}") from None


def _locked(name: str, package: str) -> str:
    for line in (_LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.split()[0].replace("==", " ")
    raise AssertionError(f"{package} is not in locks/{name}.txt")


def _needs(program: str, packages: str) -> None:
    if not shutil.which(program):
        raise Unavailable(f"there is no {program} here: apt-get install {packages}")


def _peers() -> Command:
    return Command([str(_install("peers") / "python")], {})


def _kserve() -> Command:
    return Command([str(_install("kserve") / "python")], {})


def _curl() -> Command:
    _needs("curl", "curl")
    return Command([sys.executable], {})


def node_modules() -> Path:
    """Of locks/node, once for each state of its lock."""
    _needs("node", "nodejs npm")
    _needs("npm", "nodejs npm")
    lock = _LOCKS / "node" / "package-lock.json"
    key = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    made = REPOSITORY / ".cache" / f"node-{key}"
    if not made.exists():
        making = made.with_suffix(f".{os.getpid()}")
        shutil.copytree(lock.parent, making)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        try:
            subprocess.run(command, check=True, cwd=making, stdout=sys.stderr)
            making.rename(made)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"npm ci fails here: {error}") from None
    return made / "node_modules"


def _node() -> Command:
    return Command([sys.executable], {"NODE_PATH": str(node_modules())})


def _perf_analyzer() -> Command:
    programs = _install("perf-analyzer")
    program = programs / "perf_analyzer"
    (libraries,) = programs.parent.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    variables = {"LD_LIBRARY_PATH": str(libraries)}
    tried = subprocess.run(
        [program, "--version"], capture_output=True, check=False, env=environment(**variables)
    )
    if tried.returncode in {126, 127}:
        words = tried.stderr.decode().strip().splitlines()[-1]
        raise Unavailable(f"it does not start: {words}; apt-get install libcurl4 libb64-0d")
    return Command([sys.executable, str(program)], variables)


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return done.stdout.split("\n", 1)[0].strip()


def _node_version() -> str:
    lock = json.loads((_LOCKS / "node" / "package-lock.json").read_text(encoding="utf-8"))
    release = lock["packages"]["node_modules/@grpc/grpc-js"]["version"]
    return f"Node {_said('node', '--version')} with @grpc/grpc-js {release}"


PROGRAMS = (
    Program(
        "tritonclient_grpc",
        (
            "tritonclient gRPC",
            "tritonclient gRPC async",
            "tritonclient gRPC aio",
            "tritonclient gRPC stream",
        ),
        _peers,
        lambda: _locked("peers", "tritonclient"),
    ),
    Program(
        "tritonclient_http",
        ("tritonclient HTTP", "tritonclient HTTP aio"),
        _peers,
        lambda: _locked("peers", "tritonclient"),
    ),
    Program(
        "kserve_clients",
        ("kserve gRPC", "kserve REST"),
        _kserve,
        lambda: _locked("kserve", "kserve"),
    ),
    Program("node", ("Node",), _node, _node_version),
    Program("curl", ("curl",), _curl, lambda: " ".join(_said("curl", "--version").split()[:2])),
    Program(
        "perf_analyzer",
        tuple(perf_analyzer.COLUMNS),
        _perf_analyzer,
        lambda: "perf_analyzer 2.41.0",
    ),
)

# The tables of the page: which columns, and under which heads.
TABLES = {
    "gRPC": {
        "tritonclient gRPC": "tritonclient",
        "tritonclient gRPC async": "its async_infer",
        "tritonclient gRPC aio": "its aio",
        "tritonclient gRPC stream": "its streams",
        "kserve gRPC": "kserve",
        "Node": "Node",
    },
    "HTTP": {
        "tritonclient HTTP": "tritonclient",
        "tritonclient HTTP aio": "its aio",
        "kserve REST": "kserve",
        "curl": "curl",
    },
    "perf_analyzer": {name: name.removeprefix("perf_analyzer ") for name in perf_analyzer.COLUMNS},
}


def ask(
    program: Program,
    place: Mapping[str, object],
    wanted: Collection[str] | None = None,
    columns: Collection[str] | None = None,
) -> Cells:
    """What comes of the `wanted` rows in the program's `columns`; of all, where None."""
    names = [each.name for each in rows.ROWS if wanted is None or each.name in wanted]
    asked = [each for each in program.columns if columns is None or each in columns]
    try:
        command = program.prepare()
    except Unavailable as reason:
        return _all(asked, names, NOT_APPLICABLE, str(reason))
    before, *arguments = command.arguments
    done = subprocess.run(
        [before, "-m", f"tests.conformance.{program.module}", *arguments],
        check=False,
        cwd=REPOSITORY,
        env=environment(**command.variables),
        input=json.dumps({**place, "rows": names, "columns": asked}),
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    try:
        cells: Cells = json.loads(done.stdout)
    except ValueError:
        return _all(asked, names, FAILED, f"its program ended with status {done.returncode}")
    return cells


def _all(columns: Collection[str], names: Collection[str], outcome: str, reason: str) -> Cells:
    return {column: {name: [outcome, reason] for name in names} for column in columns}


def failures(cells: Cells) -> list[str]:
    return [
        f"{column}: {name}: {reason}"
        for column, found in cells.items()
        for name, (outcome, reason) in found.items()
        if outcome == FAILED
    ]


_ABOUT = """\
# Clients that others wrote

Written by `make conformance`, which installs each client in an environment of its own and asks a real \
`convoy serve` ({version}) with it. Rows are what is asked for, columns are clients. A row passes where \
the answer is right: every one is held against what can be worked out by hand; every refusal against \
its status. A number stands for why a cell does not apply.

"""


def _table(columns: Mapping[str, str], cells: Cells, notes: dict[str, int]) -> Iterator[str]:
    yield "| | " + " | ".join(columns.values()) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for each in rows.ROWS:
        found = [cells[column][each.name] for column in columns]
        if all(outcome == NOT_APPLICABLE for outcome, _ in found):
            continue
        shown = []
        for outcome, reason in found:
            if outcome == PASSED:
                shown.append("passed")
            elif outcome == NOT_APPLICABLE:
                shown.append(f"n/a <sup>{notes.setdefault(reason, len(notes) + 1)}</sup>")
            else:
                shown.append("**failed**: " + reason.replace("|", "\\|"))
        yield f"| {each.says} | " + " | ".join(shown) + " |"


def page(cells: Cells, clients: Mapping[str, str], version: str) -> str:
    lines = [_ABOUT.format(version=version)]
    lines.append("Clients: " + "; ".join(dict.fromkeys(clients.values())) + ".\n")
    notes: dict[str, int] = {}
    for title, columns in TABLES.items():
        lines += [f"## {title}\n", *_table(columns, cells, notes), ""]
        if title == "perf_analyzer":
            lines.append("It sends good requests alone: of every other row it has no part.\n")
    lines.append("## Why a cell does not apply\n")
    lines += [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()]
    after = Path(__file__).with_name("differences.md").read_text(encoding="utf-8")
    return "\n".join(lines) + "\n\n" + after


def main() -> int:
    from importlib import metadata

    cells: Cells = {}
    clients: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        servers.add_models(models, slow=True)
        with servers.serving(models) as place:
            for program in PROGRAMS:
                print(f"{program.module} ...", file=sys.stderr, flush=True)
                cells |= ask(program, place)
                try:
                    program.prepare()
                    clients[program.module] = program.version()
                except Unavailable as reason:
                    clients[program.module] = f"{program.module}, which was not tried: {reason}"
    text = page(cells, clients, metadata.version("convoy-serving"))
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    failed = failures(cells)
    print(*failed, sep="\n", file=sys.stderr)
    outcomes = [outcome for found in cells.values() for outcome, _ in found.values()]
    print(f"{outcomes.count(PASSED)} passed, {len(failed)} failed", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
