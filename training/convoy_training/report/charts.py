"""The page that a person reads about a version: what it can do, where it errs, how it came about.

One HTML file that is well-formed XML too, asks for nothing from elsewhere and runs no script. Charts
are SVG made by hand; pictures lie together in two images, of which each shows a part.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import VARIANTS, Manifest, Probabilities
from convoy_training.data.checks import Example, Finding
from convoy_training.data.datasets import Labels
from convoy_training.evaluation.scores import STRAIGHT, Calibration, Evaluation, Interval
from convoy_training.release.publish import Check
from convoy_training.settings import TrainingSettings

Activations = npt.NDArray[np.float32]

# How much of what may be much is shown.
_MISTAKES, _SAMPLES, _EXAMPLES, _TOGETHER = 18, 12, 5, 4
_MOST_CLASSES, _MOST_OPEN, _MOST_NUMBERED = 100, 30, 20
# Sides in pixels: of pictures, and of maps; pixels of all maps together, which decide about the size.
_SIDE, _MAP, _MAP_BUDGET = 64, 32, 40_000
_PER_ROW = 16
_SEVERITIES = {"error": "bad", "warning": "odd", "note": "info"}

_BLUE, _ORANGE = (11, 97, 164), (196, 78, 8)
_SHADES, _COLOURS = 12, 32
_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root{--ink:#1b1f24;--soft:#59626d;--line:#d8dde3;--page:#fff;--tint:#f4f6f8;--a:#0b61a4;--b:#c44e08;
--good:#0a7350;--odd:#8a5a00;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9ba6b2;--line:#39414a;
--page:#15191d;--tint:#1f252b;--a:#5aa9e6;--b:#f0883e;--good:#4cc38a;--odd:#e0ac3f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main{max-width:1060px;margin:0 auto;padding:36px 24px 64px}
h1,h2,h3{line-height:1.2;margin:0;text-wrap:balance}
h1{font-size:34px;letter-spacing:-.02em}
h2{font-size:23px;letter-spacing:-.01em;margin-bottom:12px}
h3{font-size:16px;margin-bottom:8px}
p{margin:0 0 14px;max-width:70ch}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
small{display:block;font-size:.82em;color:var(--soft);font-weight:400}
section{margin-top:40px;padding-top:28px;border-top:1px solid var(--line)}
.over{color:var(--soft);font-size:14px;margin-bottom:6px}
.claim{font-size:20px;line-height:1.4;margin:10px 0 22px;max-width:none;text-wrap:balance}
.soft{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:22px;font-size:14px}
a{color:var(--a);text-decoration:none}
a:hover{text-decoration:underline}
dl,dd,figure{margin:0;min-width:0;overflow-wrap:anywhere}
.tiles div,.steps>li>*{min-width:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles div{background:var(--tint);border-radius:8px;padding:12px 14px}
.tiles dt,.tiles .note{font-size:13px;line-height:1.35;color:var(--soft)}
.tiles dd{font-size:24px;font-weight:650;line-height:1.3;letter-spacing:-.01em}
.tiles.good div:first-child dd:nth-child(2),.tiles.bad div:first-child dd:nth-child(2){color:var(--k)}
.tiles .note{font-weight:400;letter-spacing:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:32px 40px}
.grid+figure,p+figure,ul+figure,dl+figure{margin-top:30px}
figcaption{font-size:14px;line-height:1.45;color:var(--soft);margin-top:8px;max-width:75ch}
.chart{display:block;width:100%;height:auto;max-width:520px;overflow:visible}
.chart text{font-size:11px;fill:var(--soft)}
.chart .m{text-anchor:middle}.chart .e{text-anchor:end}
.chart .w{fill:#fff}.chart .d{fill:var(--ink)}
.chart image{image-rendering:pixelated}
.a{--c:var(--a)}.b{--c:var(--b)}
path{fill:none}
.g,.box{stroke:var(--line)}
.l,.gap{stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.l.a{stroke-dasharray:none}.l.b{stroke-dasharray:5 3}
.f{fill:var(--c)}
.dot{fill:var(--c);fill-opacity:.28;stroke:var(--c);stroke-width:1.2}
.diagonal{stroke:var(--soft);stroke-dasharray:3 3}
.ring{fill:none;stroke:var(--b);stroke-width:2.5}
.c{fill:var(--c)}
.units{stroke:var(--c)}
.key{display:flex;gap:18px;font-size:13px;margin:0 0 4px;color:var(--soft)}
.k::before{content:"";display:inline-block;width:22px;margin-right:6px;vertical-align:middle;
border-top:2px solid var(--c)}
.k.b::before{border-top-style:dashed}
table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.4}
th,td{padding:6px 12px 6px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:13px;font-weight:500;color:var(--soft);vertical-align:bottom}
tbody th{font-weight:550}
tbody th,td:not(.n),code{overflow-wrap:anywhere}
.n{text-align:right;white-space:nowrap}
.sum>*{font-weight:600}
.pairs .n{width:1%;padding-left:12px}
.mark{white-space:nowrap}
.badge{display:inline-flex;align-items:center;gap:6px;font-size:13px;font-weight:600;color:var(--k)}
.badge b{flex:none;width:17px;height:17px;line-height:17px;border-radius:50%;background:var(--k);
color:var(--page);text-align:center;font-size:11px}
.good{--k:var(--good)}.bad{--k:var(--b)}.odd{--k:var(--odd)}.info{--k:var(--a)}
.classes small{display:inline;margin-left:8px}
.checks th{width:24%}.checks th:nth-child(2){width:14%}.checks th:nth-child(3){width:22%}.checks td:last-child{color:var(--soft)}
.wide{width:28%;vertical-align:middle}.half{width:40%}
.whisker{display:block;width:100%;height:auto;max-height:20px}
.bar{display:inline-flex;width:64px;height:8px;background:var(--tint);vertical-align:middle;
border-radius:2px;overflow:hidden}
.bar b{background:var(--a)}.bar.w b{background:var(--b)}
.stack3{width:100%;background:none}
.stack3 b:nth-child(2){opacity:.55}.stack3 b:nth-child(3){opacity:.28}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:18px 14px}
.pictures svg,.maps svg{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:3px}
.pictures figcaption{font-size:13px;line-height:1.35;margin-top:6px}
.pictures figcaption>*{display:block}
.pictures .wrong{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 6px;color:var(--b)}
.samples{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.answers{display:grid;gap:2px;grid-template-columns:minmax(0,1fr)}
.answers>span{display:grid;grid-template-columns:minmax(0,1fr) 34% 46px;gap:6px;align-items:center}
.answers .bar{width:100%}
.samples .answers>span{grid-template-columns:minmax(0,1fr) auto;gap:0 6px}
.samples .bar{grid-row:2;grid-column:1/-1;height:4px}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.answers .right{color:var(--ink);font-weight:600}
.steps{list-style:none;counter-reset:s;margin:22px 0 0;padding:0}
.steps>li{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,8fr);gap:10px 32px;padding:18px 0;
border-top:1px solid var(--line)}
.steps h3{margin:0}.steps h3::before{counter-increment:s;content:counter(s) ". "}
.steps p{font-size:14px;margin:4px 0 0}
.steps .answers{font-size:14px;max-width:420px;align-content:start}
.maps{display:grid;grid-template-columns:repeat(8,1fr);gap:5px;align-content:start}
.store{position:absolute}
.findings{list-style:none;margin:0 0 20px;padding:0}
.findings li{display:grid;grid-template-columns:100px 1fr;align-items:start;padding:8px 0;border-bottom:1px solid var(--line);
font-size:14px}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;font-size:14px}
.facts dt{color:var(--soft)}
.hashes td{font-size:13px}.hashes th{white-space:nowrap}
.settings th,.settings td{width:33%}
details{margin-top:18px}
summary{cursor:pointer;color:var(--a);font-size:14px;margin-bottom:8px}
@media screen and (max-width:600px){
.classes small{display:block;margin:0}
main{padding:20px 16px 40px}
body{font-size:15px}h1{font-size:27px}h2{font-size:20px}.claim{font-size:18px}
section{margin-top:28px;padding-top:20px}
.tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:21px}
.wide,.classes thead th:nth-child(3),.counts thead th:last-child{display:none}
table{font-size:13px}thead th{font-size:12px}th,td{padding-right:9px}
.stack thead{display:none}
.stack tr{display:grid;grid-template-columns:1fr auto;gap:2px 12px;padding:9px 0;
border-bottom:1px solid var(--line)}
.stack th,.stack td{border:0;padding:0;width:auto}
.checks td+td{grid-column:1/-1;display:flex;gap:8px}
.checks td+td::before,.variants td::before{content:attr(data-of);color:var(--soft);flex:none}
.checks td+td::before{width:56px}
.variants tr{grid-template-columns:1fr 1fr}.variants th{grid-column:1/-1}
.variants td{display:flex;justify-content:space-between}
.pictures{grid-template-columns:repeat(3,1fr)}.samples{grid-template-columns:1fr 1fr}
.steps>li{grid-template-columns:1fr}
.hashes tr{display:block}.hashes th,.hashes td{display:block;border:0;padding:0}
.hashes tr{padding:6px 0;border-bottom:1px solid var(--line)}
.facts{grid-template-columns:1fr}.facts dd{margin-bottom:8px}
.findings li{grid-template-columns:1fr;gap:4px}
}
@page{margin:16mm 15mm}
@media print{
:root{--ink:#000;--soft:#3c4248;--line:#bbb;--tint:#f2f2f2;color-scheme:light}
body{font-size:10.5pt;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0;zoom:.84}
nav,summary{display:none}
section{margin-top:20pt;padding-top:14pt}
h2,h3,thead,section>p{break-after:avoid}
.tiles{grid-template-columns:repeat(auto-fit,minmax(120px,1fr))}
.settings th,.settings td{padding-top:1px;padding-bottom:1px}
section,p,figcaption,figure,tr,.tiles div,.steps>li,.findings li,.chart{break-inside:avoid}
figure:has(table){break-inside:auto}
.grid{grid-template-columns:1fr 1fr;gap:24px 32px}
.pictures{grid-template-columns:repeat(9,1fr)}.pictures figcaption{font-size:11.5px}
.samples{grid-template-columns:repeat(6,1fr)}
details::details-content{content-visibility:visible;display:block}
p,figcaption,li{orphans:3;widows:3}
}
"""


@dataclass(frozen=True)
class Layer:
    """What a layer makes of one image: `activations` `[H, W, C]` or `[units]`. `kind` is the name of
    the layer's class in Keras.
    """

    name: str
    kind: str
    activations: Activations


@dataclass(frozen=True)
class Record:
    """All that the page is made of. What is left out has no section.

    `version` is 0 where nothing was published. Of the `manifest`, `training` has the settings, the images
    by split and the epochs; its `files`, where they are known already, give the graphs' sizes and sums.
    `pixels` uint8 `[N, H, W, C]`, `probabilities` `[N, classes]` and `truth` `[N]` are the test images,
    what the exported graph says about them, and what they show. `layers` is what the network makes of the
    test image at `shown`, from first to last, without the output. `latency_ms` is how long one image
    alone takes, by the names in VARIANTS. `seconds` is the time that the whole run took.
    """

    name: str
    version: int
    manifest: Manifest
    evaluation: Evaluation | None = None
    checks: Sequence[Check] = ()
    findings: Sequence[Finding] = ()
    pixels: Pixels | None = None
    probabilities: Probabilities | None = None
    truth: Labels | None = None
    layers: Sequence[Layer] = ()
    shown: int = 0
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    machine: str = ""
    seconds: float | None = None


def render(record: Record) -> str:
    """The page, which can be encoded as UTF-8 whatever the names of classes and files are made of."""
    pictures = _Pictures("p")
    maps = _Pictures("m")
    sections = [
        ("Verdict", _verdict(record)),
        ("Training", _training(record)),
        ("Classes", _classes(record)),
        ("Certainty", _certainty(record)),
        ("Mistakes", _mistakes(record, pictures)),
        ("Right answers", _right_answers(record, pictures)),
        ("Inside the network", _inside(record, pictures, maps)),
        ("Precision and speed", _variants(record)),
        ("Data", _data(record)),
        ("Settings", _settings(record)),
        ("Provenance", _provenance(record)),
    ]
    there = [(title, _slug(title), body) for title, body in sections if body]
    head = [
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Holds the page to its word: whatever it asked for would not be loaded.
        _tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _tag("title", _title(record)),
        # Else browsers ask for one.
        _tag("link", rel="icon", href="data:,"),
        _tag("style", _Markup(_STYLE)),
    ]
    body = [
        _tag(
            "header",
            _tag("p", "Convoy model report", c="over"),
            _tag("h1", _title(record)),
            _claim(record),
            _figures(record),
        ),
        _tag("nav", [_tag("a", title, href=f"#{slug}") for title, slug, _ in there]),
        [_tag("section", _tag("h2", title), content, id=slug) for title, slug, content in there],
        pictures.sprite(_photograph),
        maps.sprite(_heat),
    ]
    page = _tag("html", _tag("head", head), _tag("body", _tag("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


# Markup. Text is escaped by what makes elements of it, so it can't be forgotten anywhere.


class _Markup(str):
    """Whole elements; any other string is text."""

    __slots__ = ()


# Text, elements, lists of these; None and False are nothing.
_Node = str | bool | None | Iterable[Any]

_EMPTY = {"meta", "link", "br", "path", "circle", "image", "use"}
# Names of files may hold what neither XML nor UTF-8 has.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _tag(name: str, /, *children: _Node, c: str | None = None, **attributes: str | None) -> _Markup:
    """An element with `children` and `attributes`, in whose names _ stands for -; `c` is the class."""
    named = {"class": c, **{key.replace("_", "-"): value for key, value in attributes.items()}}
    written = "".join(
        f' {key}="{_text(value)}"' for key, value in named.items() if value is not None
    )
    if name in _EMPTY:
        return _Markup(f"<{name}{written}/>")
    return _Markup(f"<{name}{written}>{''.join(map(_markup, children))}</{name}>")


def _markup(node: _Node) -> str:
    if isinstance(node, _Markup):
        return node
    if isinstance(node, str):
        return _text(node)
    if node is None or isinstance(node, bool):
        return ""
    return "".join(map(_markup, node))


def _text(text: str) -> str:
    return html.escape(_FORBIDDEN.sub("\ufffd", text))


def _row(name: _Node, *cells: _Node, c: str | None = None) -> _Markup:
    """A row of a table: a head, and cells, which are numbers unless they are elements already."""
    there = [cell if isinstance(cell, _Markup) else _tag("td", cell, c="n") for cell in cells]
    return _tag("tr", _tag("th", name, scope="row"), there, c=c)


def _figure(title: str, body: _Node, caption: str) -> _Markup:
    return _tag("figure", title and _tag("h3", title), body, _tag("figcaption", caption))


def _table(head: Sequence[str], rows: Iterable[_Node], numbers: int = 99, c: str = "") -> _Markup:
    """From the column `numbers` on, heads stand over numbers, at the right."""
    cells = [
        _tag("th", title, scope="col", c="n" if position >= numbers else None)
        for position, title in enumerate(head)
    ]
    return _tag("table", _tag("thead", _tag("tr", cells)), _tag("tbody", list(rows)), c=c or None)


def _badge(kind: str, text: str) -> _Markup:
    # The sign tells them apart without colour.
    sign = {"good": "✓", "bad": "✕", "odd": "!", "info": "i"}[kind]
    return _tag("span", _tag("b", sign, aria_hidden="true"), text, c=f"badge {kind}")


# The sections, in the order of the page. Each is None where the record has nothing for it.


def _title(record: Record) -> str:
    return f"{record.name} version {record.version}" if record.version else record.name


def _claim(record: Record) -> _Node:
    found, scores = record.evaluation, record.manifest.scores
    if found:
        correct, images, accuracy = found.correct, found.images, found.accuracy
    elif scores:
        correct, images, accuracy = scores.correct, scores.images, scores.accuracy
    else:
        return None
    interval = f" (95% interval {_range(found.accuracy_interval)})" if found else ""
    text = f"{_title(record)} names {correct:,} of {images:,} test images rightly: "
    return _tag("p", text, _tag("strong", _percent(accuracy)), f"{interval}.", c="claim")


def _figures(record: Record) -> _Node:
    """What one wants to know first, as a row of tiles."""
    manifest, found, thresholds = record.manifest, record.evaluation, record.manifest.thresholds
    tiles: list[tuple[str, str, str]] = []
    color = ""
    if record.checks:
        passed = sum(check.passed for check in record.checks)
        odd = sum(check.suspicious for check in record.checks)
        color = "bad" if _closed(record) else "good"
        note = f"{passed} of {_plural(len(record.checks), 'check')}"
        note += f", {odd} to look at" if odd else ""
        tiles.append(("Gate", "Failed" if _closed(record) else "Passed", note))
    if found:
        worst, chance = found.worst, f"up to {_percent(found.calibrated.by_chance)} is chance"
        tiles.append(("Weakest class", _percent(worst.recall), f"recall, of {_short(worst.name)}"))
        tiles.append(("Calibration error", _percent(found.calibrated.error), chance))
    if thresholds:
        note = f"right, in {_percent(thresholds.coverage)} of images"
        tiles.append(("Where it is sure", _percent(thresholds.accuracy), note))
    if manifest.variants:
        name, best = max(manifest.variants.items(), key=lambda item: item[1].images_per_s)
        note = f"images/s as {name}, {best.device}"
        tiles.append(("Throughput", _count(best.images_per_s), note))
    boxes = [
        _tag("div", _tag("dt", name), _tag("dd", value), _tag("dd", note, c="note"))
        for name, value, note in tiles
    ]
    return boxes and _tag("dl", boxes, c=f"tiles {color}")


def _closed(record: Record) -> int:
    """How many checks failed that keep a version from being published."""
    return sum(check.closes and not check.passed for check in record.checks)


def _verdict(record: Record) -> _Node:
    checks, closed = record.checks, _closed(record)
    if not checks:
        return None
    left = sum(not check.passed for check in checks) - closed
    odd = sum(check.passed and check.suspicious for check in checks)
    text = f"The gate is open: all {_plural(len(checks), 'check')} passed."
    if closed:
        text = (
            f"The gate is closed: {closed} of {_plural(len(checks), 'check')} failed, so this version was "
            "not published."
        )
    elif left:
        text = f"The gate is open: {len(checks) - left} of {_plural(len(checks), 'check')} passed."
    if left and not closed:
        text += (
            " A check of a variant that fails keeps that variant out, and the version goes without it: "
            f"{_plural(left, 'variant')} left out."
        )
    if odd:
        text += (
            f" {_plural(odd, 'check')} passed with a figure that is hard to believe: look at it before "
            "you rely on it."
        )

    def row(check: Check) -> _Markup:
        mark = _badge("good", "passed")
        if not check.passed:
            mark = _badge("bad", "failed") if check.closes else _badge("odd", "left out")
        elif check.suspicious:
            mark = _badge("odd", "suspicious")
        cells = [("Value", check.value), ("Wanted", check.wanted)]
        # A telephone shows the heads beside the figures.
        there = [_tag("td", _tag("span", text), data_of=of) for of, text in cells]
        return _row(check.name, _tag("td", mark, c="mark"), *there)

    order = sorted(checks, key=lambda check: (check.passed, not check.closes, not check.suspicious))
    head = ("Check", "Result", "Value", "Wanted")
    return [_tag("p", text), _table(head, map(row, order), c="stack checks")]


def _training(record: Record) -> _Node:
    epochs = record.manifest.training.get("epochs") or []
    if not epochs:
        return None

    def curve(key: str) -> list[tuple[float, float]]:
        return [
            (_number(epoch.get("epoch"), position), _number(epoch.get(key)))
            for position, epoch in enumerate(epochs, 1)
        ]

    last = epochs[-1]

    def at_end(key: str, form: str) -> str:
        value = _number(last.get(key))
        return format(value, form) if math.isfinite(value) else "no number"

    loss = [("training", "a", curve("loss")), ("validation", "b", curve("validation_loss"))]
    accuracy = [
        ("training", "a", curve("accuracy")),
        ("validation", "b", curve("validation_accuracy")),
    ]
    figures = [
        _figure(
            "Loss",
            _lines(loss, "epoch"),
            f"Training and validation should fall together. At the end {at_end('loss', '.3f')} and "
            f"{at_end('validation_loss', '.3f')}; where validation rises while training falls, the "
            "network learns by heart.",
        ),
        _figure(
            "Accuracy",
            _lines(accuracy, "epoch", percent=True),
            f"At the end {at_end('accuracy', '.1%')} of the training images and "
            f"{at_end('validation_accuracy', '.1%')} of the validation images. Training images are "
            "altered and units dropped meanwhile, so their curve may lie below.",
        ),
    ]
    rates = curve("learning_rate")
    if any(math.isfinite(y) for _, y in rates):
        figures.append(
            _figure(
                "Learning rate",
                _lines([("learning rate", "a", rates)], "epoch", height=150),
                "How large the steps were at each epoch.",
            )
        )
    seconds = [_number(epoch.get("seconds")) for epoch in epochs]
    spent = sum(value for value in seconds if math.isfinite(value))
    count = record.manifest.training.get("images", {}).get("train", {}).get("count")
    text = f"{_plural(len(epochs), 'epoch')}"
    if count:
        text += f" over {_plural(count, 'image')}"
    if spent:
        text += f", {_duration(spent)}"
        if count:
            text += f" ({_count(count * len(epochs) / spent)} images/s)"
    return [_tag("p", f"{text}."), _tag("div", figures, c="grid")]


def _classes(record: Record) -> _Node:
    found = record.evaluation
    if not found:
        return None
    names = [c.name for c in found.classes]
    confusion = np.array(found.confusion)
    mistakes = confusion - np.diag(np.diag(confusion))
    figures = [
        _figure(
            "What was taken for what",
            _confusion(confusion, names),
            "A row for what images show, a column for what they were taken for. Blue is right, "
            "orange is wrong; the darker, the larger the share of the row.",
        )
    ]
    # A matrix of two classes says it all.
    if mistakes.any() and len(names) > 2:
        order = np.argsort(-mistakes, axis=None, kind="stable")[:12]
        pairs = [divmod(int(at), len(names)) for at in order if mistakes.flat[at]]
        rows = [
            _row(
                names[i],
                _tag("td", names[j]),
                f"{mistakes[i, j]:,}",
                _bar(mistakes[i, j] / confusion[i].sum()),
            )
            for i, j in pairs
        ]
        figures.append(
            _figure(
                "Most frequent confusions",
                _table(
                    ("Shows", "Taken for", "Times", "Share of class"), rows, numbers=2, c="pairs"
                ),
                "A pair that stands out in both directions may be hard to tell apart for people, too, "
                "or have mislabelled images.",
            )
        )
    thresholds = record.manifest.thresholds
    per_class = thresholds.per_class if thresholds else []

    def row(position: int) -> _Markup:
        c, interval = found.classes[position], found.classes[position].recall_interval
        own = [f"{per_class[position]:.2f}"] if per_class else []
        precision = _percent(c.precision) if c.named else "–"
        if not c.support:
            return _row(c.name, "0", _tag("td", c="wide"), "–", precision, "–", *own)
        recall = [_percent(c.recall), _tag("small", _range(interval))]
        chart = _tag("td", _whisker(c.recall, interval), c="wide")
        return _row(c.name, f"{c.support:,}", chart, recall, precision, f"{c.f1:.3f}", *own)

    def weakness(position: int) -> tuple[bool, float, int]:
        c = found.classes[position]
        return not c.support, c.recall, -c.support

    shown = sorted(range(len(names)), key=weakness)[:_MOST_CLASSES]
    head = ("Class", "Images", "", "Recall", "Precision", "F1", *(["Unsure"] if per_class else []))
    caption = (
        "The weakest first. Recall: the share of a class's images that were found, with the 95% "
        "interval that so many images allow. Precision: the share of answers with this class that "
        "were right."
    )
    if per_class:
        caption += " Unsure: an answer with a lower probability does not count as sure."
    if len(shown) < len(names):
        caption += f" The other {len(names) - len(shown):,} classes do better than these."
    macro = (
        f"Means over classes: recall {_percent(found.macro_recall)}, precision "
        f"{_percent(found.macro_precision)}, F1 {found.macro_f1:.3f}. Always naming the most frequent "
        f"class would be right in {_percent(found.guessing)}."
    )
    return [
        _tag("p", macro),
        _tag("div", figures, c="grid"),
        _figure("Class by class", _table(head, map(row, shown), numbers=1, c="classes"), caption),
    ]


def _certainty(record: Record) -> _Node:
    found = record.evaluation
    if not found:
        return None
    before, after = found.uncalibrated, found.calibrated
    scaled = (found.temperature, found.bend) != STRAIGHT
    caption = (
        "Answers by the probability that they were given with. On the diagonal, answers given with 80% "
        "are right in 80%; below it, the network is too sure of itself. "
    )
    chance = (
        "Larger dots stand for more images; small ones may be off by chance. A classifier whose every "
        f"probability is true would stay below {_percent(after.by_chance)} in 19 of 20 test splits of "
        "this size."
    )
    figures = []
    if scaled:
        title = f"Before scaling: calibration error {_percent(before.error)}"
        figures.append(_figure(title, _reliability(before, "b"), caption))
        bend = f" and a bend of {found.bend:.3f}" if found.bend != 1 else ""
        caption = (
            "A scaling that was chosen on validation images is part of the exported graph: a temperature "
            f"of {found.temperature:.3f}{bend}. "
        )
    title = f"{'After scaling: c' if scaled else 'C'}alibration error {_percent(after.error)}"
    figures.append(_figure(title, _reliability(after, "a"), caption + chance))
    thresholds = record.manifest.thresholds
    if len(found.coverage) > 1:
        caption = (
            "To answer only where the network is sure is to err less. From right to left, ever more "
            "images are left unanswered."
        )
        mark = None
        if thresholds:
            mark = (thresholds.coverage, thresholds.accuracy)
            caption += (
                f" The ring is where the version draws the line: below {thresholds.unsure:.2f}, or its "
                f"class's threshold, an answer is unsure. That leaves {_percent(thresholds.coverage)} "
                f"of the images, of which {_percent(thresholds.accuracy)} are right."
            )
        points = [(point.coverage, point.accuracy) for point in found.coverage]
        chart = _lines(
            [("right", "a", points)],
            "share of images answered",
            percent=True,
            shares=True,
            mark=mark,
        )
        figures.append(_figure("Answered against right", chart, caption))
    strange = found.out_of_distribution
    if strange:
        rows = [
            _row(kind.kind, f"{kind.images:,}", f"{kind.auroc:.3f}", _percent(kind.unsure))
            for kind in strange.kinds
        ]
        images = sum(kind.images for kind in strange.kinds)
        together = (f"{images:,}", f"{strange.auroc:.3f}", _percent(strange.unsure))
        rows.append(_row("all of these", *together, c="sum"))
        figures.append(
            _figure(
                "Images that belong to no class",
                _table(("Kind", "Images", "AUROC", "Unsure"), rows, numbers=1),
                "AUROC: the chance that such an image gets a lower probability than a test image; 0.5 "
                "is no better than a coin. Unsure: how many are kept from being answered; of the test "
                f"images it is {_percent(strange.test_unsure)}.",
            )
        )
    text = (
        f"Log loss {found.log_loss:.4f}, Brier score {found.brier:.4f}. Can the probabilities be "
        "believed, and what is gained by leaving doubtful images to a person?"
    )
    return [_tag("p", text), _tag("div", figures, c="grid")]


def _mistakes(record: Record, pictures: "_Pictures") -> _Node:
    pixels, given, truth = record.pixels, record.probabilities, record.truth
    if pixels is None or given is None or truth is None:
        return None
    named, confidence = given.argmax(axis=1), given.max(axis=1)
    wrong = np.flatnonzero(named != truth)
    if not len(wrong):
        return _tag("p", f"None: all {_plural(len(named), 'test image')} are named rightly.")
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES]
    labels = record.manifest.labels

    def tile(at: int) -> _Markup:
        answer, what = labels[named[at]], labels[truth[at]]
        return _tag(
            "figure",
            pictures.show(pixels[at], f"{what}, taken for {answer}"),
            _tag(
                "figcaption",
                _tag("span", _tag("b", answer), _chance(float(confidence[at])), c="wrong"),
                _tag("span", "is ", what),
            ),
        )

    return [
        _tag(
            "p",
            f"{_plural(len(wrong), 'mistake')} in {_plural(len(named), 'test image')}; here are those "
            "that the network was most certain of. Among them are often images with a wrong label, "
            "or that show two things.",
        ),
        _tag("div", [tile(int(at)) for at in chosen], c="pictures"),
    ]


def _right_answers(record: Record, pictures: "_Pictures") -> _Node:
    pixels, given, truth = record.pixels, record.probabilities, record.truth
    if pixels is None or given is None or truth is None:
        return None
    right = np.flatnonzero(given.argmax(axis=1) == truth)
    if not len(right):
        return None
    # The first of each class, then the second: of every kind, and none picked by hand.
    by_class = right[np.argsort(truth[right], kind="stable")]
    ordered = truth[by_class]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    chosen = by_class[np.argsort(rank, kind="stable")][:_SAMPLES]
    labels = record.manifest.labels

    def tile(at: int) -> _Markup:
        top = np.argsort(-given[at], kind="stable")[:3]
        return _tag(
            "figure",
            pictures.show(pixels[at], labels[truth[at]]),
            _tag("figcaption", _answers([(labels[i], float(given[at, i])) for i in top], 0)),
        )

    return [
        _tag(
            "p",
            "The first test images of each class that were named rightly, with the three most probable "
            "classes: how certain is the network where all is well, and what comes second?",
        ),
        _tag("div", [tile(int(at)) for at in chosen], c="pictures samples"),
    ]


def _inside(record: Record, pictures: "_Pictures", maps: "_Pictures") -> _Node:
    if not record.layers or record.pixels is None:
        return None
    image = record.pixels[record.shown]
    labels = record.manifest.labels
    what = f"a picture of {image.shape[1]} by {image.shape[0]} pixels"
    tiles = [pictures.show(image, "the image")]
    if image.shape[-1] == 3:
        what += " in red, green and blue"
        # Grey as pictures are all of one mode.
        tiles += [
            pictures.show(image[..., [channel] * 3], name)
            for channel, name in enumerate(("red", "green", "blue"))
        ]
    steps = [
        _step("Pixels", " × ".join(map(str, image.shape)), f"What goes in: {what}.", _maps(tiles))
    ]
    spatial = [layer for layer in record.layers if layer.activations.ndim == 3]
    most = _maps_each(spatial)
    told: dict[str, int] = {}
    for layer in record.layers:
        values = np.nan_to_num(np.asarray(layer.activations, np.float32))
        size = " × ".join(map(str, values.shape))
        title, *stories = _story(layer)
        number = told[title] = told.get(title, -1) + 1
        text = stories[number] if number < len(stories) else ""
        body: _Node
        if values.ndim == 3:
            energy = np.abs(values).mean(axis=(0, 1))
            order = np.argsort(-energy, kind="stable")[:most]
            scaled = _unit(values)
            body = _maps(
                [
                    maps.show(_fitted(scaled[..., i]), f"{layer.name}, map {i}")
                    for i in map(int, order)
                ]
            )
            if len(order) < values.shape[-1]:
                text += f" The {len(order)} most active of {values.shape[-1]} are shown."
        else:
            body = _units(values.ravel(), layer.name)
            active = int((values > 0).sum())
            text += f" {active:,} of {values.size:,} are above 0."
        steps.append(_step(title, f"{layer.name}, {size}", text, body))
    if record.probabilities is not None:
        given = record.probabilities[record.shown]
        top = [int(i) for i in np.argsort(-given, kind="stable")[:10]]
        right = None if record.truth is None else int(record.truth[record.shown])
        text = "Softmax makes of the last figures a probability for each class."
        if right is not None:
            text += f" The image shows {labels[right]}"
            text += "." if top[0] == right else f"; it was taken for {labels[top[0]]}."
        if len(top) < len(given):
            text += f" The {len(top)} most probable of {len(given):,} classes are shown."
        answers = _answers(
            [(labels[i], float(given[i])) for i in top], top.index(right) if right in top else -1
        )
        steps.append(_step("Output", f"{len(given):,} classes", text, answers))
    return [
        _tag(
            "p",
            "One test image on its way through the network. Bright is active; in each layer all maps "
            "have one scale.",
        ),
        _tag("ol", steps, c="steps"),
    ]


def _variants(record: Record) -> _Node:
    manifest = record.manifest
    if not manifest.variants and not record.latency_ms:
        return None
    names = [n for n in VARIANTS if n in manifest.variants or n in record.latency_ms]
    latency = bool(record.latency_ms)

    def row(name: str) -> _Markup:
        measured = manifest.variants.get(name)
        cells = ["–", "–", "–", "–"]
        if measured:
            cells = [
                _percent(measured.scores.accuracy, 2),
                _percent(measured.label_agreement, 2),
                _count(measured.images_per_s),
                f"{measured.speedup:.2f}×",
            ]
        if latency:
            taken = record.latency_ms.get(name)
            cells.append("–" if taken is None else f"{taken:.3g} ms")
        if manifest.files:
            file = manifest.files.get(VARIANTS[name])
            cells.append(_bytes(file.bytes) if file else "–")
        return _row(
            name,
            *[
                _tag("td", text, c="n", data_of=of)
                for text, of in zip(cells, head[1:], strict=True)
            ],
        )

    head = ["Variant", "Accuracy", "Same label", "Images/s", "Speed-up"]
    head += ["One image"] if latency else []
    head += ["Size"] if manifest.files else []
    devices = sorted({measured.device for measured in manifest.variants.values()})
    caption = ""
    if devices:
        caption = (
            "Accuracy and same label (how often it says what fp32 says) are of the whole test split; "
            f"images/s at the largest batch, {manifest.max_batch_size}, on {' and '.join(devices)}; "
            "speed-up is over fp32. "
        )
    if latency:
        caption += "One image is the time that a batch of one takes."
    return _figure("", _table(head, map(row, names), numbers=1, c="stack variants"), caption)


def _data(record: Record) -> _Node:
    splits: dict[str, Any] = {
        name: split
        for name, split in (record.manifest.training.get("images") or {}).items()
        if split.get("per_class")
    }
    parts: list[_Node] = []
    if record.findings:
        order = sorted(record.findings, key=lambda f: list(_SEVERITIES).index(f.severity))
        parts.append(_tag("ul", map(_finding, order), c="findings"))
    if splits:
        labels = record.manifest.labels
        counts = np.array([split["per_class"] for split in splits.values()])
        size = record.manifest.pixels
        total = int(counts.sum())
        parts.insert(
            0,
            _tag(
                "p",
                f"{_plural(total, 'image')} of {_plural(len(labels), 'class', 'classes')}, brought to "
                f"{size.width} by {size.height} pixels, {'grey' if size.channels == 1 else 'colour'}"
                f"{', cropped' if size.resize == 'crop' else ''}: "
                + ", ".join(
                    f"{n:,} {name}" for name, n in zip(splits, counts.sum(axis=1), strict=True)
                )
                + ".",
            ),
        )
        largest = counts.sum(axis=0).max() or 1
        rows = [
            _row(
                label,
                *[f"{n:,}" for n in counts[:, i]],
                _tag("td", _stack([n / largest for n in counts[:, i]]), c="wide half"),
            )
            for i, label in enumerate(labels)
        ]
        table = _table(
            ("Class", *(s.capitalize() for s in splits), ""), rows, numbers=1, c="counts"
        )
        ratio = counts.sum(axis=0).max() / max(counts.sum(axis=0).min(), 1)
        caption = (
            "Images by class and split (bars: from dark to light). The largest class has "
            f"{ratio:.3g} times as many as the smallest: classes with few images are learned worse, and "
            "their figures are less certain."
        )
        whole = _figure("", table, caption)
        if len(labels) > _MOST_OPEN:
            summary = f"Images by class and split ({len(labels):,} classes)"
            whole = _tag("details", _tag("summary", summary), whole)
        parts.append(whole)
    return parts or None


def _settings(record: Record) -> _Node:
    settings: Mapping[str, Any] = record.manifest.training.get("settings") or {}
    if not settings:
        return None
    defaults = {name: _plain(value) for name, value in asdict(TrainingSettings()).items()}

    def row(name: str) -> _Markup:
        value = _plain(settings[name])
        usual = _setting(defaults[name]) if name in defaults else "–"
        cells = _tag("td", _setting(value)), _tag("td", usual, c="soft")
        return _row(_tag("code", name), *cells)

    changed = [n for n in settings if n not in defaults or _plain(settings[n]) != defaults[n]]
    head = ("Setting", "Value", "Default")
    return [
        _table(head, map(row, changed), c="settings")
        if changed
        else _tag("p", "All settings are the defaults."),
        _tag(
            "details",
            _tag("summary", f"All {len(settings)} settings"),
            _table(head, map(row, settings), c="settings"),
        ),
    ]


def _provenance(record: Record) -> _Node:
    manifest = record.manifest
    settings = manifest.training.get("settings") or {}
    rows: list[tuple[str, _Node]] = [("created", manifest.created)]
    if record.seconds is not None:
        rows.append(("took", _duration(record.seconds)))
    if record.machine:
        rows.append(("machine", record.machine))
    if "seed" in settings:
        rows.append(("seed", str(settings["seed"])))
    if manifest.parity:
        parity = manifest.parity
        rows.append(
            (
                "export",
                f"at most {parity.max_abs_difference:.1e} off the network's probabilities and the same "
                f"label for {_percent(parity.label_agreement, 2)} of {_plural(parity.images, 'image')}, "
                f"in batches of {', '.join(map(str, parity.batch_sizes))}",
            )
        )
    packages = [f"{name} {version}" for name, version in manifest.provenance.items()]
    if packages:
        rows.append(("made with", ", ".join(packages)))
    hashes = [
        (f"{name} images", split["sha256"], "")
        for name, split in (manifest.training.get("images") or {}).items()
        if split.get("sha256")
    ]
    hashes += [(name, file.sha256, _bytes(file.bytes)) for name, file in manifest.files.items()]
    return [
        _tag("dl", [[_tag("dt", name), _tag("dd", text)] for name, text in rows], c="facts"),
        hashes
        and _figure(
            "",
            _table(
                ("sha256 of", ""),
                [
                    _row([name, size and _tag("small", size)], _tag("td", _tag("code", digest)))
                    for name, digest, size in hashes
                ],
                c="hashes",
            ),
            "The same data and files have the same sums. Those of the images are over pixels and "
            "labels.",
        ),
    ]


# Charts. Lengths are in units that are about a CSS pixel on a telephone.

_WIDTH = 360


def _lines(
    series: "Sequence[tuple[str, str, Sequence[tuple[float, float]]]]",
    x_title: str,
    *,
    percent: bool = False,
    shares: bool = False,
    height: int = 220,
    mark: tuple[float, float] | None = None,
) -> _Node:
    """A chart of lines, each of a name, a colour ("a" or "b") and its points. What is no finite number
    leaves a gap. `percent` and `shares` say that y and x are shares of 1.
    """
    finite = [
        [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for _, _, points in series
    ]
    every = [point for points in finite for point in points]
    if not every:
        return _tag("p", "There is no finite figure to draw.", c="soft")
    if mark:
        every.append(mark)
    left, right, top, bottom = 44, 12, 8, 36
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks = _ticks(min(xs), max(xs), 6, whole=not shares)
    y_ticks = _ticks(min(*ys, 0.99), 1, 5) if percent else _ticks(min(ys), max(ys), 5)
    x_low, x_high = (x_ticks[0], x_ticks[-1]) if shares else (min(xs), max(xs))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (_WIDTH - left - right),
            top + (y_high - y) / (y_high - y_low) * (height - top - bottom),
        )

    marks = []
    for tick in y_ticks:
        y = at(x_low, tick)[1]
        marks.append(_shape("path", d=f"M{left} {y:.1f}H{_WIDTH - right}", c="g"))
        text = _tick(tick * 100, y_ticks, 100) + "%" if percent else _tick(tick, y_ticks)
        marks.append(_label(left - 6, y + 4, text, "e"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            text = _tick(tick * 100, x_ticks, 100) + "%" if shares else _tick(tick, x_ticks)
            marks.append(_label(at(tick, y_low)[0], height - bottom + 16, text, "m"))
    marks.append(_label((left + _WIDTH - right) / 2, height - 4, x_title, "m"))
    for (_, colour, points), kept in zip(series, finite, strict=True):
        path, pen = [], "M"
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                path.append(pen + "{:.1f} {:.1f}".format(*at(x, y)))
                pen = "L"
            else:
                pen = "M"
        marks.append(_shape("path", d="".join(path), c=f"l {colour}"))
        if len(kept) == 1:
            x, y = at(*kept[0])
            marks.append(_shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", c=f"f {colour}"))
    if mark:
        x, y = at(*mark)
        marks.append(_shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="5", c="ring"))
    names = ", ".join(name for name, _, _ in series)
    return [
        len(series) > 1
        and _tag("p", [_tag("span", name, c=f"k {colour}") for name, colour, _ in series], c="key"),
        _svg(_WIDTH, height, marks, f"{names} by {x_title}"),
    ]


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers, at most about `most`, the first and last of which take in both `low` and `high`."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _tick(value: float, ticks: Sequence[float], scale: float = 1) -> str:
    """With as many decimals as tell the ticks apart."""
    step = (ticks[1] - ticks[0]) * scale
    if step < 1e-5 or abs(value) >= 1e6:
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _reliability(found: Calibration, colour: str) -> _Node:
    height, left, right, top, bottom = 300, 44, 12, 8, 36
    across, down = _WIDTH - left - right, height - top - bottom
    marks = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + tick * across, top + (1 - tick) * down
        marks.append(_shape("path", d=f"M{left} {y:.1f}H{_WIDTH - right}", c="g"))
        marks.append(_label(left - 6, y + 4, f"{tick:.0%}", "e"))
        marks.append(_label(x, height - bottom + 16, f"{tick:.0%}", "m" if tick < 1 else "e"))
    marks.append(_label((left + _WIDTH - right) / 2, height - 4, "probability given", "m"))
    marks.append(_shape("path", d=f"M{left} {top + down}L{_WIDTH - right} {top}", c="diagonal"))
    images = sum(part.images for part in found.bins) or 1
    for part in found.bins:
        x = left + part.confidence * across
        y, true = top + (1 - part.accuracy) * down, top + (1 - part.confidence) * down
        radius = 2.5 + 11 * math.sqrt(part.images / images)
        marks.append(_shape("path", d=f"M{x:.1f} {true:.1f}V{y:.1f}", c=f"gap {colour}"))
        marks.append(
            _shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", c=f"dot {colour}")
        )
    return _svg(_WIDTH, height, marks, "share of right answers by the probability they were given")


def _confusion(counts: "npt.NDArray[np.int64]", names: Sequence[str]) -> _Node:
    """Rows of truth, columns of answers; with numbers where cells are large enough for them."""
    classes = len(names)
    longest = max(len(_short(name)) for name in names)
    margin = min(92, 12 + 6.2 * longest)
    numbers = classes <= _MOST_NUMBERED
    cell = max(24.0, min(56.0, 290 / classes)) if numbers else 340 / classes
    side = cell * classes
    # With more classes than there is room for names, every so many has its name.
    step = math.ceil(11 / cell)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Not in proportion: one looks for the few.
    levels = np.where(counts > 0, np.ceil(shares**0.6 * _SHADES), 0).astype(int)
    right = np.eye(classes, dtype=bool)
    marks: list[_Node] = []
    if numbers:
        for hue, chosen in (("a", right), ("b", ~right)):
            for level in np.unique(levels[chosen & (levels > 0)]):
                places = np.argwhere(chosen & (levels == level))
                path = "".join(
                    f"M{margin + j * cell:.4g} {margin + i * cell:.4g}"
                    f"h{cell:.4g}v{cell:.4g}h-{cell:.4g}z"
                    for i, j in places
                )
                shade = f"{_opacity(level):.2f}"
                marks.append(_shape("path", d=path, c=f"c {hue}", fill_opacity=shade))
        marks += [
            _label(
                margin + (j + 0.5) * cell,
                margin + (i + 0.5) * cell + 4,
                f"{counts[i, j]}",
                "m w" if levels[i, j] > 0.55 * _SHADES else "m d",
            )
            for i, j in np.argwhere(counts > 0)
        ]
    else:
        index = np.where(right, levels, np.where(levels > 0, levels + _SHADES, 0))
        marks.append(
            _shape(
                "image",
                href=_shaded(index.astype(np.uint8)),
                x=f"{margin:.4g}",
                y=f"{margin:.4g}",
                width=f"{side:.4g}",
                height=f"{side:.4g}",
            )
        )
    marks.append(
        _shape("path", d=f"M{margin:.4g} {margin:.4g}h{side:.4g}v{side:.4g}h-{side:.4g}z", c="box")
    )
    for i in range(0, classes, step):
        middle = margin + (i + 0.5) * cell + 4
        name = _short(names[i])
        marks.append(_label(margin - 5, middle, name, "e"))
        marks.append(_label(middle, margin - 5, name, "", turned=True))
    size = margin + side + 1
    return _svg(size, size, marks, "confusion matrix", most=size * 1.25)


def _opacity(level: int) -> float:
    # What is there at all must be seen.
    return 0.05 + 0.95 * level / _SHADES


def _units(values: Activations, name: str) -> _Markup:
    """A bar for each unit of a layer that has no places."""
    height = 70
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = height / ((high - low) or 1)
    zero = high * scale
    step = _WIDTH / len(values)
    path = "".join(
        f"M{(i + 0.5) * step:.1f} {zero:.1f}v{-float(value) * scale:.1f}"
        for i, value in enumerate(values)
        if abs(value) * scale >= 0.05
    )
    marks = [
        _shape("path", d=f"M0 {zero:.1f}H{_WIDTH}", c="g"),
        _shape("path", d=path, c="units a", stroke_width=f"{step * 0.7:.2f}") if path else None,
    ]
    return _svg(_WIDTH, height, marks, f"activity of the units of {name}", most=640)


def _answers(given: Sequence[tuple[str, float]], right: int) -> _Markup:
    """Names with a bar and a percentage each; the one at `right` stands out."""
    return _tag(
        "span",
        [
            _tag(
                "span",
                _tag("span", name, c="name"),
                _tag("i", _tag("b", style=f"width:{100 * share:.1f}%"), c="bar"),
                _tag("span", _chance(share), c="n"),
                c="right" if position == right else None,
            )
            for position, (name, share) in enumerate(given)
        ],
        c="answers",
    )


def _bar(share: float) -> _Node:
    width = f"width:{100 * share:.1f}%"
    return [_tag("i", _tag("b", style=width), c="bar w"), " ", _percent(share)]


def _stack(shares: Sequence[float]) -> _Markup:
    parts = [_tag("b", style=f"width:{100 * share:.2f}%") for share in shares]
    return _tag("i", parts, c="bar stack3")


def _whisker(value: float, interval: Interval) -> _Markup:
    low, high, middle = (f"{250 * share:.0f}" for share in (interval.low, interval.high, value))
    marks = [
        _shape("path", d="M0 8H250", c="g"),
        _shape("path", d=f"M{low} 8H{high}", c="gap a"),
        _shape("circle", cx=middle, cy="8", r="4", c="f a"),
    ]
    return _tag("svg", marks, viewBox="-5 0 260 16", c="whisker", aria_hidden="true")


# Pictures.


class _Pictures:
    """Small pictures that are kept as one, of which `show` gives a view. Those of different heights
    get rows of their own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[list[npt.NDArray[Any]]] = []
        self._size = (0, 0)
        self._top = 0

    def show(self, tile: "npt.NDArray[Any]", label: str) -> _Markup:
        tile = _fitted_picture(tile) if tile.dtype == np.uint8 else tile
        height, width = tile.shape[:2]
        # JPEG works in squares of 8, which no two pictures may share.
        down, across = (-(-side // 8) * 8 for side in (height, width))
        if self._size != (down, across) or len(self._rows[-1]) == _PER_ROW:
            self._top += self._size[0]
            self._size = (down, across)
            self._rows.append([])
        padding = ((0, down - height), (0, across - width), *[(0, 0)] * (tile.ndim - 2))
        x = len(self._rows[-1]) * across
        self._rows[-1].append(np.pad(tile, padding, "edge"))
        use = _tag("use", href=f"#{self._name}")
        view = f"{x} {self._top} {width} {height}"
        return _tag("svg", use, viewBox=view, role="img", aria_label=label)

    def sprite(self, encode: Any) -> _Node:
        """The one image that the views are of."""
        if not self._rows:
            return None
        rows = [np.concatenate(row, axis=1) for row in self._rows]
        width = max(row.shape[1] for row in rows)
        whole = np.concatenate(
            [
                np.pad(row, ((0, 0), (0, width - row.shape[1]), *[(0, 0)] * (row.ndim - 2)))
                for row in rows
            ]
        )
        image = _shape(
            "image",
            id=self._name,
            href=encode(whole),
            width=str(whole.shape[1]),
            height=str(whole.shape[0]),
        )
        # Not `display: none`: what is not rendered can't be used everywhere.
        return _tag("svg", _tag("defs", image), width="0", height="0", c="store")


def _fitted_picture(pixels: Pixels) -> Pixels:
    """At most _SIDE pixels a side: the page is not where large pictures are kept."""
    height, width = pixels.shape[:2]
    if max(height, width) <= _SIDE:
        return pixels
    factor = _SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    grey = pixels.shape[-1] == 1
    small = np.asarray(Image.fromarray(pixels[..., 0] if grey else pixels).resize(size))
    return small[..., np.newaxis] if grey else small


def _photograph(pixels: Pixels) -> str:
    """As PNG or JPEG, whichever is smaller: drawings as they are, photographs nearly so."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=85, subsampling=0, optimize=True)
    if len(png.getvalue()) <= len(jpeg.getvalue()):
        return _url("image/png", png.getvalue())
    return _url("image/jpeg", jpeg.getvalue())


def _unit(values: Activations) -> Activations:
    """Scaled to 0 to 1; the few largest values are cut, or all others would be dark."""
    low = min(0.0, float(values.min()))
    high = float(np.quantile(values, 0.995)) if values.size > 400 else float(values.max())
    high = high if high > low else float(values.max())
    scaled: Activations = np.clip((values - low) / ((high - low) or 1), 0, 1)
    return scaled


def _fitted(values: Activations) -> Activations:
    """One map, at most _MAP pixels a side."""
    height, width = values.shape
    if max(height, width) <= _MAP:
        return values
    factor = _MAP / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(np.ascontiguousarray(values)).resize(size, Image.Resampling.BOX)
    scaled: Activations = np.clip(np.asarray(image), 0, 1)
    return scaled


def _maps_each(layers: Sequence[Layer]) -> int:
    """How many maps of each layer are shown: fewer where there are many layers."""
    area = sum(math.prod(min(side, _MAP) for side in la.activations.shape[:2]) for la in layers)
    return next((n for n in (16, 12) if n * area <= _MAP_BUDGET), 8)


def _heat(values: Activations) -> str:
    """As PNG with few colours, from dark to bright (those of viridis, by Smith and van der Walt)."""
    index = np.round(values * (_COLOURS - 1)).astype(np.uint8)
    at = np.linspace(0, len(_VIRIDIS) - 1, _COLOURS)
    channels = [
        np.interp(at, range(len(_VIRIDIS)), channel) for channel in zip(*_VIRIDIS, strict=True)
    ]
    return _palette(index, np.stack(channels, axis=1).round().astype(np.uint8), b"")


def _shaded(index: "npt.NDArray[np.uint8]") -> str:
    """A confusion matrix as PNG: 0 is nothing, then the shades of right, then those of wrong."""
    colours = [_ORANGE, *[_BLUE] * _SHADES, *[_ORANGE] * _SHADES]
    shades = [0, *[round(255 * _opacity(n)) for n in range(1, _SHADES + 1)] * 2]
    return _palette(index, np.array(colours, np.uint8), bytes(shades))


def _palette(
    index: "npt.NDArray[np.uint8]", colours: "npt.NDArray[np.uint8]", opacity: bytes
) -> str:
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **({"transparency": opacity} if opacity else {}))
    return _url("image/png", buffer.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# Pieces of the page.


def _step(title: str, size: str, text: str, body: _Node) -> _Markup:
    return _tag(
        "li", _tag("div", _tag("h3", title), _tag("p", size, c="soft"), _tag("p", text)), body
    )


def _maps(tiles: Sequence[_Node]) -> _Markup:
    return _tag("div", tiles, c="maps")


def _story(layer: Layer) -> tuple[str, ...]:
    """A title and what the first such layer does; what the second one does, where that is other."""
    kind, spatial = layer.kind.lower(), layer.activations.ndim == 3
    if "conv" in kind and spatial:
        return (
            "Convolution",
            f"Each of {layer.activations.shape[-1]} filters slides over what comes in, and is bright "
            "where it finds its pattern: an edge, a spot, a colour.",
            "These filters look at all maps before them: they find patterns of patterns.",
        )
    if "pool" in kind and spatial:
        stays = "the strongest stays" if "max" in kind else "the mean stays"
        return (
            "Pooling",
            f"Of neighbouring places {stays}: the maps get smaller, and what was found matters more "
            "than exactly where.",
        )
    if "pool" in kind:
        return "Mean over all places", "What was found counts, no longer where."
    if "dense" in kind:
        return "Fully connected", "Every unit weighs all that comes in: it finds combinations."
    if kind == "add":
        return "Sum", "What convolutions made is added to what they were given."
    if "relu" in kind or "activation" in kind:
        return "Activation", "What is below 0 becomes 0: only what was found goes on."
    if "normalization" in kind:
        return "Normalisation", "Every map is brought to the range that the next layer expects."
    return (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", layer.kind),)


def _finding(finding: Finding) -> _Markup:
    more = len(finding.examples) - _EXAMPLES
    return _tag(
        "li",
        _badge(_SEVERITIES[finding.severity], finding.severity),
        _tag(
            "div",
            finding.text,
            finding.advice and _tag("small", finding.advice),
            [_tag("small", _tag("code", _group(group))) for group in finding.examples[:_EXAMPLES]],
            more > 0 and _tag("small", f"and {more:,} more"),
        ),
    )


def _group(group: Sequence[Example]) -> str:
    # The split, the class and the file: where the data lay is nobody's business.
    named = [
        replace(one, file=one.file and Path(*one.file.parts[-3:])) for one in group[:_TOGETHER]
    ]
    more = len(group) - len(named)
    return " = ".join(map(str, named)) + (f" and {more:,} more" if more else "")


def _plain(value: Any) -> Any:
    """As JSON has it, so that what is set can be compared with what was read back."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _setting(value: Any) -> _Node:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in (None, "") else str(value)


def _number(value: Any, default: float = math.nan) -> float:
    return float(value) if isinstance(value, int | float) else default


def _percent(share: float, decimals: int = 1) -> str:
    """Only what is all is 100%, only what is nothing 0%."""
    if not math.isfinite(share):
        return "no number"
    for digits in range(decimals, 6):
        text = f"{share:.{digits}%}"
        if float(text[:-1]) not in (0, 100) or share in (0, 1):
            break
    return text if share not in (0, 1) else f"{share:.0%}"


def _chance(share: float) -> str:
    """A probability, where it is enough to know that it is next to nothing or all."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else _percent(share)


def _range(interval: Interval) -> str:
    return f"{_percent(interval.low)[:-1]} to {_percent(interval.high)[:-1]}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def _short(name: str, most: int = 14) -> str:
    # Names of many classes often begin, or end, alike.
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most + most // 2 :]}"


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _svg(
    width: float, height: float, marks: _Node, label: str, most: float | None = None
) -> _Markup:
    style = f"max-width:{most:.0f}px" if most else None
    view = f"0 0 {width:.4g} {height:.4g}"
    return _tag("svg", marks, c="chart", viewBox=view, role="img", aria_label=label, style=style)


_shape = _tag


def _label(x: float, y: float, text: str, c: str, *, turned: bool = False) -> _Markup:
    if turned:
        return _tag("text", text, c=c or None, transform=f"translate({x:.1f} {y:.1f})rotate(-90)")
    return _tag("text", text, c=c or None, x=f"{x:.1f}", y=f"{y:.1f}")
