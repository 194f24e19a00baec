"""The dashboard: what `make docs` writes into dashboards/convoy.json, for Grafana 10 and later.

In queries @job and @model stand for the choices made on the board, and @work for the calls that ask for
work.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SHORT = {
    "@job": 'job=~"$job"',
    "@model": 'job=~"$job", model=~"$model"',
    "@work": 'call=~"Classify|ClassifyStream|ModelInfer|ModelStreamInfer"',
    "@rate": "[$__rate_interval]",
}


@dataclass(frozen=True)
class Panel:
    title: str
    queries: dict[str, str]
    """What each is called in the legend, and the query."""
    unit: str = "short"
    kind: Literal["timeseries", "stat", "table", "heatmap"] = "timeseries"
    text: str = ""
    width: int = 8
    stacked: bool = False
    log: bool = False


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    height: int = 7


def quantiles(histogram: str, by: str, *shares: float) -> dict[str, str]:
    """Of the times or sizes in a histogram, by a label or by none."""
    legend, labels = (f"{{{{{by}}}}} ", f"{by}, le") if by else ("", "le")
    return {
        f"{legend}p{100 * share:g}": f"histogram_quantile({share}, sum by ({labels}) (rate({histogram}@rate)))"
        for share in shares
    }


def mean(family: str, of: str, by: str) -> str:
    return (
        f"sum by ({by}) (rate({family}_sum{{{of}}}@rate)) "
        f"/ sum by ({by}) (rate({family}_count{{{of}}}@rate))"
    )


def burn(slo: str) -> dict[str, str]:
    return {
        f"over {window}": f'max(job_slo:convoy_burn:rate{window}{{@job, slo="{slo}"}})'
        for window in ("5m", "30m", "1h", "6h", "3d")
    }


BURN = (
    "How many times as fast as promised the budget is used up. Over an hour and 5 minutes 14.4 calls a "
    "person, over 6 hours and 30 minutes 6 does; at 1 the budget lasts for the 30 days."
)
ROWS = (
    Row(
        "What is promised",
        (
            Panel("Servers", {"": "count(convoy_requests_in_flight{@job})"}, kind="stat", width=4),
            Panel(
                "Requests for work",
                {"": "sum(rate(convoy_requests_total{@job, @work}@rate))"},
                "reqps", "stat", width=5,
            ),
            Panel(
                "Missed, over 5 minutes",
                {"": 'sum(job_slo:convoy_requests_missed:rate5m{@job, slo="availability"}) '
                     '/ sum(job_slo:convoy_requests:rate5m{@job, slo="availability"})'},
                "percentunit", "stat", width=5,
                text="Requests that got no answer, through no fault of the caller's.",
            ),
            Panel(
                "99 of 100 take at most",
                quantiles('convoy_stage_seconds_bucket{@model, stage="whole"}', "", 0.99),
                "s", "stat", width=5,
            ),
            Panel(
                "Images answered",
                {"": 'sum(rate(convoy_images_total{@model, outcome="ok"}@rate))'},
                "ops", "stat", width=5,
            ),
            Panel("Budget of errors: burn rate", burn("availability"), text=BURN, log=True),
            Panel("Budget of slow requests: burn rate", burn("latency"), text=BURN, log=True),
            Panel(
                "Alerts",
                {"": 'count by (alertname, severity, model) (ALERTS{alertname=~"Convoy.*", alertstate="firing"})'},
                kind="table", text="Those that fire; docs/runbook.md says what to do.",
            ),
        ),
    ),
    Row(
        "Traffic and errors",
        (
            Panel("Calls", {"{{call}}": "sum by (call) (rate(convoy_requests_total{@model}@rate))"}, "reqps"),
            Panel(
                "Other answers than OK",
                {"{{code}}": 'sum by (code) (rate(convoy_requests_total{@model, code!="OK"}@rate))'},
                "reqps", text="By gRPC status.",
            ),
            Panel(
                "Images by outcome",
                {"{{outcome}}": "sum by (outcome) (rate(convoy_images_total{@model}@rate))"},
                "ops", stacked=True,
                text="refused: too much was waiting; late: the deadline passed first.",
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "From arrival to answer",
                quantiles('convoy_stage_seconds_bucket{@model, stage="whole"}', "", 0.5, 0.95, 0.99),
                "s",
            ),
            Panel(
                "By stage, mean",
                {"{{stage}}": mean("convoy_stage_seconds", '@model, stage!="whole"', "stage")},
                "s", stacked=True, text="decode, queue (waiting for the device), run (on it).",
            ),
            Panel(
                "By stage, 95 of 100",
                quantiles("convoy_stage_seconds_bucket{@model}", "stage", 0.95),
                "s",
            ),
            Panel(
                "By model, 99 of 100",
                quantiles('convoy_stage_seconds_bucket{@model, stage="whole"}', "model", 0.99),
                "s",
            ),
            Panel(
                "From arrival to answer, all",
                {"{{le}}": 'sum by (le) (rate(convoy_stage_seconds_bucket{@model, stage="whole"}@rate))'},
                "s", "heatmap", width=16,
            ),
        ),
    ),
    Row(
        "Queue and batches",
        (
            Panel(
                "Waiting for the device",
                quantiles('convoy_stage_seconds_bucket{@model, stage="queue"}', "", 0.5, 0.95, 0.99),
                "s",
            ),
            Panel("Requests in flight", {"{{instance}}": "sum by (instance) (convoy_requests_in_flight{@job})"}),
            Panel(
                "Memory that requests hold",
                {"{{instance}}": "sum by (instance) (convoy_held_bytes{@job})"},
                "bytes",
            ),
            Panel(
                "Batch sizes",
                {"{{le}}": "sum by (le) (rate(convoy_batch_size_bucket{@model}@rate))"},
                kind="heatmap",
            ),
            Panel("Batch size, mean", {"{{model}}": mean("convoy_batch_size", "@model", "model")}),
            Panel(
                "Time of a batch, 95 of 100",
                quantiles("convoy_batch_seconds_bucket{@model}", "model", 0.95),
                "s",
            ),
        ),
    ),
    Row(
        "Device and processes",
        (
            Panel(
                "Devices busy",
                {"{{model}}": "sum by (model) (rate(convoy_batch_seconds_sum{@model}@rate))"},
                text="Seconds that batches ran, a second: 1 is one device's whole time, or of a card 2, "
                "where two batches are under way at once.",
                stacked=True,
            ),
            Panel(
                "Batches that failed, and images run for nobody",
                {
                    "failed, {{model}}": "sum by (model) (rate(convoy_batch_failures_total{@model}@rate))",
                    "for nobody, {{model}}": "sum by (model) (rate(convoy_rows_run_after_deadline_total{@model}@rate))",
                },
                "ops",
            ),
            Panel(
                "Another device or variant than preferred",
                {"{{model}}": "max by (model) (convoy_model_fallback{@model})"},
                text="1: the log says why.",
            ),
            Panel(
                "Cores",
                {
                    "may be used, {{instance}}": "sum by (instance) (convoy_cpu_budget_cores{@job})",
                    "in use, {{instance}}": "sum by (instance) (rate(process_cpu_seconds_total{@job}@rate))",
                },
                text="In use: by the process that shows the metrics; with several that is the supervisor.",
            ),
            Panel(
                "Memory of the process",
                {"{{instance}}": "sum by (instance) (process_resident_memory_bytes{@job})"},
                "bytes", text="With several: of the supervisor.",
            ),
            Panel(
                "Starts of workers",
                {"{{process}}, {{instance}}": "sum by (process, instance) (convoy_process_starts_total{@job})"},
                text="Over 1: it died, and another was started. None where there is one process alone.",
            ),
            Panel(
                "Cards: busy",
                {"{{instance}} {{gpu}}": "avg by (instance, gpu) (convoy_gpu_utilization_ratio{@job})"},
                "percentunit", width=6,
            ),
            Panel(
                "Cards: memory",
                {
                    "used, {{instance}} {{gpu}}": "sum by (instance, gpu) (convoy_gpu_memory_used_bytes{@job})",
                    "there is, {{instance}} {{gpu}}": "sum by (instance, gpu) (convoy_gpu_memory_total_bytes{@job})",
                },
                "bytes", width=6,
            ),
            Panel(
                "Cards: temperature",
                {"{{instance}} {{gpu}}": "max by (instance, gpu) (convoy_gpu_temperature_celsius{@job})"},
                "celsius", width=6,
            ),
            Panel(
                "Cards: power",
                {"{{instance}} {{gpu}}": "sum by (instance, gpu) (convoy_gpu_power_watts{@job})"},
                "watt", width=6,
            ),
        ),
    ),
    Row(
        "Models and versions",
        (
            Panel(
                "Loaded",
                {"": "count by (model, version, device, variant, sha256) (convoy_model_info{@model})"},
                kind="table", width=16, text="Value: on so many servers.",
            ),
            Panel(
                "States",
                {"": "count by (model, version, state) (convoy_model_version_state{@model} == 1)"},
                kind="table", text="Value: on so many servers.",
            ),
            Panel(
                "The version that answers",
                {"{{model}}, {{instance}}": "max by (model, instance) (convoy_model_serving_version{@model})"},
                text="Of requests that name none.",
            ),
            Panel(
                "Its age",
                {"{{model}}": "time() - max by (model) (convoy_model_created_timestamp_seconds{@model})"},
                "s",
            ),
            Panel(
                "Switches, and broken versions",
                {
                    "switches, {{model}}": "sum by (model) (convoy_model_switches_total{@model})",
                    "broken, {{model}}": "max by (model) (convoy_model_broken_versions{@model})",
                },
            ),
        ),
    ),
    Row(
        "Canary",
        (
            Panel(
                "Against its limits",
                {"{{model}}/{{candidate}} {{limit}}, {{of}}":
                 'max by (model, candidate, limit, of) (convoy_canary_limit{@model, of!="value"}) '
                 '/ ignoring (of) group_left '
                 'max by (model, candidate, limit) (convoy_canary_limit{@model, of="value"})'},
                text="1 is the limit. What is held against it is surely between lowest and highest: with "
                "the lowest over 1 it is rolled back, with all highest below 1 promoted.",
            ),
            Panel(
                "Beside the stable version",
                {"{{model}}/{{candidate}} {{figure}}":
                 'avg by (model, candidate, figure) (convoy_canary_figure{@model, figure!="latency_ratio"})'},
                "percentunit",
            ),
            Panel(
                "Its time to the stable version's",
                {"{{model}}/{{candidate}}":
                 'avg by (model, candidate) (convoy_canary_figure{@model, figure="latency_ratio"})'},
            ),
            Panel(
                "Requests it answered, and batches compared",
                {"{{model}}/{{candidate}} {{of}}":
                 "sum by (model, candidate, of) "
                 '(convoy_canary_counts_total{@model, of=~"candidate_requests|compared"})'},
            ),
            Panel(
                "Difference of probabilities, 95 of 100",
                quantiles("convoy_canary_difference_bucket{@model}", "model", 0.95),
                text="Of each batch compared, the largest.",
            ),
            Panel(
                "Verdicts",
                {"{{model}}: {{verdict}}":
                 "sum by (model, verdict) (convoy_canary_decisions_total{@model})"},
            ),
        ),
    ),
    Row(
        "Drift",
        (
            Panel(
                "Population stability index",
                {"{{model}}/{{version}} {{feature}}":
                 "max by (model, version, feature) (convoy_drift_psi{@model})"},
                text="Of the last window. 0.2 and more than chance is an alarm, by default.",
            ),
            Panel(
                "Alarms",
                {"{{model}}/{{version}} {{feature}}":
                 "max by (model, version, feature) (convoy_drift_alarm{@model})"},
            ),
            Panel(
                "Answered as unsure",
                {"{{model}}": "max by (model) (job_model:convoy_unsure:ratio_rate1h{@model})"},
                "percentunit", text="Of the images of the last hour.",
            ),
            Panel(
                "Images looked at",
                {"{{model}}/{{version}}":
                 "sum by (model, version) (rate(convoy_drift_images_total{@model}@rate))"},
                "ops", width=12,
            ),
            Panel(
                "Images in the last window",
                {"{{model}}/{{version}}":
                 "max by (model, version) (convoy_drift_window_images{@model})"},
                width=12,
            ),
        ),
    ),
    Row(
        "Feedback and object store",
        (
            Panel(
                "Images for the feedback folder",
                {"{{outcome}}": "sum by (outcome) (rate(convoy_feedback_images_total{@model}@rate))"},
                "ops", stacked=True,
            ),
            Panel("The folder", {"{{instance}}": "max by (instance) (convoy_feedback_bytes{@job})"}, "bytes"),
            Panel(
                "Trouble with it",
                {
                    "files deleted as the oldest": "sum(convoy_feedback_files_deleted_total{@job})",
                    "could not be written": "sum(convoy_feedback_failures_total{@job})",
                    "observers failed": "sum(convoy_observer_failures_total{@model})",
                },
            ),
            Panel(
                "Since the cache held all of the store",
                {"{{instance}}": "time() - max by (instance) (convoy_store_last_sync_timestamp_seconds{@job})"},
                "s", width=6,
            ),
            Panel(
                "Errors of the store",
                {"{{kind}}": "sum by (kind) (increase(convoy_store_errors_total{@job}@rate))"},
                width=6,
            ),
            Panel(
                "Fetched",
                {"{{instance}}": "sum by (instance) (rate(convoy_store_fetched_bytes_total{@job}@rate))"},
                "Bps", width=6,
            ),
            Panel(
                "Versions that wait",
                {"{{instance}}": "max by (instance) (convoy_store_waiting_versions{@job})"},
                width=6, text="Incomplete in the store, or refused: the log says why.",
            ),
        ),
    ),
    Row(
        "Training",
        (
            Panel(
                "How the last run ended",
                {"": 'max by (model, status) (convoy_train_last_run_status{model=~"$model"}) == 1'},
                kind="table", width=6, text="Of `convoy train --textfile`, through the node exporter.",
            ),
            Panel(
                "Since the last that did not fail",
                {"{{model}}": 'time() - max by (model) (convoy_train_last_success_timestamp_seconds{model=~"$model"})'},
                "s", width=6,
            ),
            Panel(
                "Accuracy of what was trained",
                {"{{model}}": 'max by (model) (convoy_train_accuracy_ratio{model=~"$model"})'},
                "percentunit", width=6,
            ),
            Panel(
                "Images",
                {"{{model}} {{split}}": 'max by (model, split) (convoy_train_images{model=~"$model"})'},
                width=6,
            ),
        ),
    ),
)  # fmt: skip


def query(text: str) -> str:
    """As Grafana takes it."""
    for short, long in SHORT.items():
        text = text.replace(short, long)
    return text


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    table, heatmap = panel.kind == "table", panel.kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": query(text),
            "legendFormat": legend or "__auto",
            "editorMode": "code",
            "format": "table" if table else "heatmap" if heatmap else "time_series",
            "instant": table,
            "range": not table,
        }
        for index, (legend, text) in enumerate(panel.queries.items())
    ]
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {}
    transformations: list[dict[str, Any]] = []
    if panel.kind == "timeseries":
        custom: dict[str, Any] = {"showPoints": "never", "fillOpacity": 30 if panel.stacked else 5}
        if panel.stacked:
            custom["stacking"] = {"mode": "normal", "group": "A"}
        if panel.log:
            custom["scaleDistribution"] = {"type": "symlog", "log": 10, "linearThreshold": 1}
        defaults["custom"] = custom
        options = {
            "legend": {
                "showLegend": True,
                "displayMode": "list",
                "placement": "bottom",
                "calcs": [],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "area",
        }
    elif heatmap:
        # Prometheus' buckets are counts up to a bound; Grafana takes the differences.
        options = {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
            "tooltip": {"mode": "single", "yHistogram": False},
            "legend": {"show": True},
        }
        defaults = {}
    else:
        transformations = [{"id": "organize", "options": {"excludeByName": {"Time": True}}}]
        options = {"showHeader": True, "cellHeight": "sm"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
        "transformations": transformations,
    }


def _choice(name: str, label: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": text, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Requests that were refused at the door have no model.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> str:
    """The dashboard's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > 24:
                y, x, height = y + height, 0, 0
            height = max(height, 4 if panel.kind == "stat" else row.height)
            place = {
                "x": x,
                "y": y,
                "w": panel.width,
                "h": 4 if panel.kind == "stat" else row.height,
            }
            panels.append(_panel(panel, len(panels) + 1, place))
            x += panel.width
        y += height
    board = {
        "uid": "convoy",
        "title": "Convoy",
        "description": "Written by `make docs`: deploy/grafana/make.py has its panels.",
        "tags": ["convoy"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "refresh": "10s",
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _choice("job", "Job", "label_values(convoy_requests_in_flight, job)"),
                _choice("model", "Model", 'label_values(convoy_model_info{job=~"$job"}, model)'),
            ]
        },
        "annotations": {
            "list": [
                {
                    "name": "Another version answers",
                    "datasource": SOURCE,
                    "enable": True,
                    "iconColor": "blue",
                    "expr": query("changes(convoy_model_serving_version{@model}[1m]) > 0"),
                    "titleFormat": "{{model}}: another version answers",
                }
            ]
        },
        "panels": panels,
    }  # fmt: skip
    return json.dumps(board, indent=1) + "\n"
