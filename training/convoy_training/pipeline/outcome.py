"""What came of a run: as the JSON of `--summary`, and as the metrics of `--textfile`."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

Status = Literal["published", "not-better", "nothing-new", "failed"]
EXIT: Mapping[Status, int] = {"published": 0, "not-better": 3, "nothing-new": 4, "failed": 1}


@dataclass
class Outcome:
    """What is known of a run; the fields are those of the summary."""

    status: Status = "failed"
    exit_code: int = EXIT["failed"]
    error: str | None = None
    model: str = ""
    # Of the version that was published.
    version: int | None = None
    folder: str | None = None
    sha256: str | None = None
    # Of what was trained, on the test images.
    accuracy: dict[str, Any] | None = None
    # What it was held against, and McNemar's test of the two.
    serving: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None
    gate: list[dict[str, Any]] = field(default_factory=list)
    # Images and sha256 of each split.
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: str = ""
    ended: str = ""
    seconds: float = 0.0

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Numbers of numpy, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is no JSON")


def write_metrics(path: Path, outcome: Outcome, version: int | None) -> None:
    """What Prometheus' node exporter shows of the last run. Raises OSError."""
    registry = CollectorRegistry()

    def gauge(name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"convoy_train_{name}", what, ["model", *labels], registry=registry)

    now, model = time.time(), outcome.model
    gauge("last_run_timestamp_seconds", "When the last run ended.").labels(model).set(now)
    success = now if outcome.status != "failed" else _last_success(path, model)
    if success is not None:
        gauge(
            "last_success_timestamp_seconds",
            "When the last run ended that did not fail, whether it published or had no reason to.",
        ).labels(model).set(success)
    status = gauge("last_run_status", "1 for how the last run ended.", "status")
    for each in EXIT:
        status.labels(model, each).set(each == outcome.status)
    gauge("last_run_duration_seconds", "How long the last run took.").labels(model).set(
        outcome.seconds
    )
    if outcome.accuracy:
        gauge(
            "accuracy_ratio", "Share of test images that what the last run trained has right."
        ).labels(model).set(outcome.accuracy["value"])
    if version is not None:
        gauge("published_version", "The newest version of the model.").labels(model).set(version)
    images = gauge("images", "Images that the last run found.", "split")
    for name, split in outcome.data.items():
        images.labels(model, name).set(split["count"])
    write_to_textfile(str(path), registry)


def _last_success(path: Path, model: str) -> float | None:
    """What the file says, which is of the run before."""
    try:
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
            for sample in family.samples:
                wanted = ("convoy_train_last_success_timestamp_seconds", model)
                if (sample.name, sample.labels.get("model")) == wanted:
                    return float(sample.value)
    # Whatever stands there, it is written anew.
    except (OSError, ValueError):
        pass
    return None
