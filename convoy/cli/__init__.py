"""The command `convoy`: one file for each command, and `app`, with which they register.

Public names: `app.app`, which has all commands once this package is imported, and
`environment.check_environment`.
Callers: `convoy.__main__`, and docs/generate.py.
Each command imports what it needs when it is called, so that `convoy --help` is instant.
"""

# The commands register in this order, which docs/cli.md keeps.
# isort: off
from convoy.cli import models, feedback, serve, classify, train
from convoy.cli import check_data, evaluate, health, bulk, bench
# isort: on

__all__ = [
    "bench", "bulk", "check_data", "classify", "evaluate", "feedback", "health", "models", "serve",
    "train",
]  # fmt: skip
