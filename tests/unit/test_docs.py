"""Every link in a document leads to a page that exists; README.md and decisions keep their form."""

import os
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

_NOT_OURS = {"node_modules", "dist", "runs"}

# `make conformance` copies this file into docs/conformance.md, so its links start from docs/.
_FRAGMENTS = {Path("tests/conformance/differences.md"): Path("docs")}

_CODE = re.compile(r"^[ \t]*```.*?^[ \t]*```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)

_README_BYTES = 8000


def _documents() -> list[Path]:
    found = []
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in _NOT_OURS
        ]
        found += [
            (Path(folder) / name).relative_to(REPOSITORY) for name in files if name.endswith(".md")
        ]
    return sorted(found)


DOCUMENTS = _documents()
DECISIONS = [path for path in DOCUMENTS if re.fullmatch(r"docs/decisions/\d{4}-.*\.md", str(path))]


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    fences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(fences)
    }


def _leads_somewhere(target: Path, anchor: str) -> bool:
    if not target.exists():
        return False
    if not anchor or target.suffix != ".md":
        return True
    return anchor in _anchors(target.read_text(encoding="utf-8"))


def _dead_links(document: Path) -> list[str]:
    text = _CODE.sub("", (REPOSITORY / document).read_text(encoding="utf-8"))
    start = REPOSITORY / _FRAGMENTS.get(document, document.parent)
    dead = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        if not _leads_somewhere(start / path if path else REPOSITORY / document, anchor):
            dead.append(link)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_relative_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    assert _dead_links(document) == []


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert (REPOSITORY / "README.md").stat().st_size <= _README_BYTES


@pytest.mark.parametrize("index", ["docs/README.md", "docs/decisions/README.md"])
def test_an_index_names_every_page_beside_it(index: str) -> None:
    path = REPOSITORY / index
    named = set(_LINK.findall(path.read_text(encoding="utf-8")))
    pages = {page.name for page in path.parent.glob("*.md")} - {path.name}
    assert pages - named == set()


def test_a_decision_has_a_number_of_its_own() -> None:
    numbers = [int(path.name[:4]) for path in DECISIONS]
    assert numbers == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda path: path.name)
def test_a_decision_has_its_date_its_evidence_and_its_limits(decision: Path) -> None:
    text = (REPOSITORY / decision).read_text(encoding="utf-8")
    assert text.startswith(f"# {int(decision.name[:4])}. ")
    assert re.search(r"^Date: \d{4}-\d\d-\d\d\. Status: \S", text, re.MULTILINE)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[:2] == ["Context", "Decision"]
    assert "Evidence" in headings
    assert headings[-1] in ("What would change our mind", "What would make us leave")
