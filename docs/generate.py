"""Writes what the documentation takes from the code: flags from their declarations (docs/cli.md,
README.md), what a real server answers to bad input (docs/bad-input.md) and says of damaged versions
(docs/damage.md); Prometheus' rules as its operator for Kubernetes takes them; and Grafana's dashboard.

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
MARKERS = re.compile(r"(<!-- settings of `convoy serve` -->\n).*?(<!-- end -->)", re.DOTALL)

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


def settings_table() -> str:
    """The settings of `convoy serve` as a markdown table."""
    lines = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
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
        lines.append(f"| `{flag}` | `{variable}` | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


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
    readme = ROOT / "README.md"
    cli = re.sub(r"[ \t]+$", "", app.generate_docs(output_format="markdown"), flags=re.MULTILINE)
    wanted = {
        ROOT / "docs" / "cli.md": cli,
        ROOT / "docs" / "bad-input.md": BAD_INPUT + bad_input.table(),
        ROOT / "docs" / "damage.md": DAMAGE + damage.table(),
        RULES: prometheus_rule(),
        DASHBOARD: dashboard(),
        readme: MARKERS.sub(
            lambda m: m[1] + settings_table() + m[2], readme.read_text(encoding="utf-8")
        ),
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
