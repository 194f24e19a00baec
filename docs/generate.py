"""Writes the parts of the documentation that come from the code.

- docs/cli.md and docs/settings.md: the flags, from their declarations.
- docs/bad-input.md: the answers of a real server to bad input.
- docs/damage.md: the states and reasons that a real server gives to damaged versions.
- deploy/kubernetes: Prometheus' rules in the form of its operator for Kubernetes.
- deploy/grafana: the dashboard.

`--check` writes nothing and exits with 1 where a file would change.
"""

import re
import sys
from pathlib import Path

from convoy.cli.app import app
from deploy.grafana.make import dashboard
from tests.integration import bad_input, damage

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "convoy.json"
RULES = ROOT / "deploy" / "kubernetes" / "components" / "monitoring" / "rules.yaml"

# The topics of docs/settings.md, and the settings of each in the order of the page. This is the only
# place that groups settings: a setting without a topic stops `make docs` and `make check`.
TOPICS = {
    "Models": (
        "models", "models-cache", "store-watch-s", "store-versions", "watch-s", "rollback-window-s",
    ),
    "Ports and connections": (
        "host", "port", "http", "http-port", "metrics-port", "max-connection-age-s", "front",
    ),
    "TLS": ("tls-certificate", "tls-key", "tls-client-ca"),
    "Devices": ("device", "variant", "deterministic", "cuda-graphs", "gpu-memory-mb"),
    "Processes and threads": ("acceptors", "engines", "run-threads", "decode-threads"),
    "Limits": (
        "max-request-mb", "max-megapixels", "max-images", "max-in-flight", "max-held-mb",
        "max-wait-s",
    ),
    "Permissions": ("allow-repository-control", "allow-shared-memory"),
    "Feedback": ("feedback", "feedback-share", "feedback-mb", "feedback-rotate-s"),
    "Drift": ("drift-images-per-s", "drift-window", "drift-psi"),
    "Logs, metrics and traces": ("log-level", "metrics-compat", "otlp-endpoint"),
    "Shutdown": ("shutdown-delay-s", "drain-grace-s"),
}  # fmt: skip

SETTINGS = """\
# Settings of `convoy serve`

`make docs` writes this page from the declarations in service/convoy_service/settings.py. Each setting \
is a flag and a variable of the environment. A flag overrides its variable. An unknown `CONVOY_*` \
variable is an error. [cli.md](cli.md) has the other commands.
"""
BAD_INPUT = """\
# What becomes of bad input

Written by `make docs` from the answers of a real server (with `--max-request-mb 1`); the tests hold \
each row against both APIs, and send a good request to the same process after it. In `Classify` a \
bad image fails alone, with this status and message in its own result; in `ModelInfer`, which has no \
place for that, the request fails with the image's number in front of the message.

"""
DAMAGE = """\
# What becomes of damaged versions

Written by `make docs` from what a real server says of versions that come to it damaged, or are damaged \
while they serve; the tests hold each row against it, while it answers requests. No request fails for any \
of it. `convoy models ls` shows state and reason; what states are is in [models.md](models.md), where \
versions come from an object store, in [object-store.md](object-store.md#when-something-is-wrong), a full \
disk included.

"""


def settings_page() -> str:
    """The settings of `convoy serve`: a markdown table for each topic."""
    rows = {}
    for argument in app["serve"].assemble_argument_collection(parse_docstring=True):
        flag = argument.name
        if flag == "*":
            continue
        variable = "CONVOY_" + flag.removeprefix("--").replace("-", "_").upper()
        default, meaning = (
            argument.field_info.default,
            " ".join(str(argument.parameter.help).split()),
        )
        shown = "" if default is None else f"`{default}`"
        rows[flag.removeprefix("--")] = f"| `{flag}` | `{variable}` | {shown} | {meaning} |"
    grouped = [name for names in TOPICS.values() for name in names]
    if sorted(grouped) != sorted(rows):
        wrong = ", ".join(sorted({*grouped} ^ {*rows})) or "a setting twice"
        raise SystemExit(f"TOPICS in docs/generate.py must name each setting once: see {wrong}")
    lines = [SETTINGS]
    for topic, names in TOPICS.items():
        lines += [f"## {topic}\n", "| flag | variable | default | meaning |", "|---|---|---|---|"]
        lines += [*(rows[name] for name in names), ""]
    return "\n".join(lines).rstrip() + "\n"


def prometheus_rule() -> str:
    """The rules of deploy/prometheus as one PrometheusRule."""
    lines = [
        "# Written by `make docs` of deploy/prometheus/*.rules.yaml.",
        "apiVersion: monitoring.coreos.com/v1",
        "kind: PrometheusRule",
        "metadata:",
        "  name: convoy",
        "  labels: {app.kubernetes.io/part-of: convoy}",
        "spec:",
        "  groups:",
    ]
    for file in sorted((ROOT / "deploy" / "prometheus").glob("*.rules.yaml")):
        before, _, groups = file.read_text(encoding="utf-8").partition("groups:\n")
        assert all(line.startswith("#") or not line for line in before.splitlines()), file
        lines += [line and f"  {line}" for line in groups.splitlines()]
    return "\n".join(lines) + "\n"


def main() -> int:
    cli = re.sub(r"[ \t]+$", "", app.generate_docs(output_format="markdown"), flags=re.MULTILINE)
    wanted = {
        ROOT / "docs" / "cli.md": cli,
        ROOT / "docs" / "settings.md": settings_page(),
        ROOT / "docs" / "bad-input.md": BAD_INPUT + bad_input.table(),
        ROOT / "docs" / "damage.md": DAMAGE + damage.table(),
        RULES: prometheus_rule(),
        DASHBOARD: dashboard(),
    }
    status = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not what the code says: make docs")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
