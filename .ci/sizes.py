"""Fails where a file, class or function is longer than a reader can hold in mind.

python .ci/sizes.py

A newcomer reads a function of up to 60 lines on one screen, a class of up to 250 in a sitting, and a file
of up to 450 in half an hour. Tests and generated code are read one case at a time: their files may have
900. Exceptions stand one by one in sizes.toml, beside this file, each with its size and its reason. An
exception may shrink and never grow; one that is no longer needed must go.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE, CLASS, FUNCTION = 450, 250, 60
TEST_FILE = 900
TESTS = ("tests/", "benchmarks/", "examples/", "docs/", "deploy/")


def sizes(name: str) -> Iterator[tuple[str, int, int]]:
    """What there is in a file: its name, its lines, and how many it may have."""
    text = (ROOT / name).read_text()
    is_test = name.startswith(TESTS) or "_pb2" in name
    yield name, text.count("\n"), TEST_FILE if is_test else FILE
    if is_test:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            limit = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            yield f"{name}::{node.name}", (node.end_lineno or 0) - node.lineno + 1, limit


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    allowed = tomllib.loads((ROOT / ".ci" / "sizes.toml").read_text())
    wrong, needed = [], set()
    for file in listed.stdout.split():
        for name, lines, limit in sizes(file):
            if lines <= limit:
                continue
            needed.add(name)
            exception = allowed.get(name)
            if exception is None:
                wrong.append(f"{name} has {lines} lines, the limit is {limit}: split it")
            elif lines > exception["lines"]:
                wrong.append(
                    f"{name} has grown to {lines} lines, its exception is for "
                    f"{exception['lines']}: split it"
                )
    wrong += [f"{name} needs no exception in .ci/sizes.toml" for name in allowed.keys() - needed]
    print("\n".join(sorted(wrong)) or f"sizes: {len(needed)} exceptions, none has grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
