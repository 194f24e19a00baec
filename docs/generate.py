"""Writes what the documentation says of flags from their declarations: docs/cli.md, README.md.

`--check` writes nothing and exits with 1 where a file would change.
"""

import re
import sys
from pathlib import Path

from convoy.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
MARKERS = re.compile(r"(<!-- settings of `convoy serve` -->\n).*?(<!-- end -->)", re.DOTALL)


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


def main() -> int:
    readme = ROOT / "README.md"
    cli = re.sub(r"[ \t]+$", "", app.generate_docs(output_format="markdown"), flags=re.MULTILINE)
    wanted = {
        ROOT / "docs" / "cli.md": cli,
        readme: MARKERS.sub(
            lambda m: m[1] + settings_table() + m[2], readme.read_text(encoding="utf-8")
        ),
    }
    status = 0
    for path, text in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not what the declarations say: make docs")
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
