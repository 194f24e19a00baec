"""Puts the record into the template: one HTML file that needs nothing else and runs no script.

The page is well-formed XML too.
"""

import re
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from convoy_training.report import gallery, origins, quality, sections
from convoy_training.report.pictures import SpriteSheet, heat, photograph
from convoy_training.report.record import Record

# Names of files and classes may hold characters that neither XML nor UTF-8 allows.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class _Section:
    """A section of the page. The template has a macro for each `kind`, which draws the `content`."""

    kind: str
    title: str
    content: object

    @property
    def slug(self) -> str:
        return self.title.lower().replace(" ", "-")


def render(record: Record) -> str:
    """The page, which can be encoded as UTF-8 whatever characters the names in `record` hold."""
    pictures, maps = SpriteSheet("p", photograph), SpriteSheet("m", heat)
    every = [
        _Section("verdict", "Verdict", sections.verdict(record)),
        _Section("training", "Training", sections.training(record)),
        _Section("classes", "Classes", quality.classes(record)),
        _Section("certainty", "Certainty", quality.certainty(record)),
        _Section("mistakes", "Mistakes", gallery.mistakes(record, pictures)),
        _Section("right_answers", "Right answers", gallery.right_answers(record, pictures)),
        _Section("inside", "Inside the network", gallery.inside(record, pictures, maps)),
        _Section("variants", "Precision and speed", sections.variants(record)),
        _Section("data", "Data", origins.data(record)),
        _Section("settings", "Settings", origins.settings(record)),
        _Section("provenance", "Provenance", origins.provenance(record)),
    ]
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            header=sections.header(record),
            sections=[section for section in every if section.content],
            sprites=[sprite for sheet in (pictures, maps) if (sprite := sheet.sprite())],
            style=_style(),
        )
    )
    doctype, document = _FORBIDDEN.sub("\ufffd", page).split("\n", 1)
    # Line ends between elements only lengthen the page. Text cannot match, because its < and > are escaped.
    document = document.replace(">\n<", "><")
    return f"{doctype}\n{document}\n"


def _style() -> str:
    """The stylesheet, without the white space that only its readers need."""
    text = resources.files("convoy_training.report").joinpath("style.css").read_text("utf-8")
    text = re.sub(r"\s*([{};])\s*|(?<=[:,])\s+", r"\1", text)
    return text.replace(";}", "}")


def _environment() -> Environment:
    """Escapes every value that is not markup already, and fails at a name that the template lacks."""
    return Environment(
        loader=PackageLoader("convoy_training.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
