"""What people see on a terminal: the documents that `--json` prints, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dapo_edge.doctor import Diagnosis

STAGE_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
MOST_WORDS = 3  # wrong ones per type, so that a row stays a line; the JSON has all


def stage_table(stages: dict[str, dict[str, float]]) -> Table:
    """Milliseconds per stage."""
    table = Table("stage, ms", *STAGE_COLUMNS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, values in stages.items():
        table.add_row(stage, *(f"{values[column]:.2f}" for column in STAGE_COLUMNS))
    return table


def precision_table(report: dict[str, Any]) -> Table:
    """What the accuracy gate measured of each precision of a package."""
    from dapo_edge import gate

    points = ("AUROC, points", "AUPRO, points")  # by which a precision is above or below eager torch
    columns = ("encoder ms", "faster", "MB", "map mean", "map max", "types", "flips", *points, "gate")
    table = Table("precision", *columns, box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    precisions = report["precisions"]
    for name, found in precisions.items():
        drops = found["drops"] or {}
        table.add_row(
            Text(f"{name} ({found['runs_as']})", "bold" if name == report["precision"] else ""),
            f"{found['encode_ms']:.1f}",
            f"{precisions['fp32']['encode_ms'] / found['encode_ms']:.2f}x",
            f"{found['size_bytes'] / 1e6:.0f}",
            f"{found['map_difference_mean']:.2g}",
            f"{found['map_difference_max']:.2g}",
            f"{found['type_agreement']:.2%}",
            "-" if found["flips"] is None else f"{found['flips']:.2%}",
            *("-" if drop is None else gate.points(drop) for drop in map(drops.get, ("image_auroc", "aupro"))),
            Text("passed" if not found["failed"] else "; ".join(found["failed"]), "red" if found["failed"] else ""),
        )
    return table


def demo_table(result: dict[str, Any]) -> Group:
    """The `demo` document."""
    summary, confusion = result["summary"], result["confusion"]
    title = f"{result['package']}: {summary['inspected']} of {summary['captured']} frames inspected"
    alarms = f"{confusion['false_alarms_per_frame']:.2f} false alarms per frame ({confusion['false_alarms']} in all)"
    return Group(
        Text(title, "bold"),
        Text(f"{result['backend']} {result['precision']} on {result['device']['line']}; weights: {result['weights']}"),
        Text(),
        _verdict_confusion(confusion["verdicts"]),
        Text(),
        _type_confusion(confusion["types"]),
        Text(alarms),
        Text(),
        stage_table(result["stages"]),
        Text(),
        *(Text(f"  {path}") for path in result["files"]),
    )


EVAL_COLUMNS = (
    ("image_auroc", "image AUROC"), ("image_ap", "image AP"), ("pixel_auroc", "pixel AUROC"), ("pixel_ap", "pixel AP"),
    ("aupro", "AUPRO"), ("type_pixel_auroc", "type AUROC"), ("type_accuracy", "type accuracy"),
)  # fmt: skip


def eval_table(result: dict[str, Any]) -> Group:
    """The `eval` document: percent, and with `compare` what the second is better or worse by."""
    subject, data, compare = result["subject"], result["dataset"], result.get("compare")
    table = Table("category", "images", *(title for _, title in EVAL_COLUMNS), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    drift = compare["drift"] if compare else {"categories": {}, "mean": {}}
    for name, metrics in result["categories"].items():
        table.add_row(Text(name), *_metric_cells(metrics, drift["categories"].get(name, {})))
    table.add_row("mean", *_metric_cells(result["mean"], drift["mean"]), style="bold")
    verdicts = ", ".join(
        f"{truth}: " + " ".join(f"{count} {verdict}" for verdict, count in counts.items())
        for truth, counts in result["verdicts"].items()
    )
    lines: list[Text | Table] = [
        Text(f"{subject['name']}, {subject['backend']} {subject['precision']}, on {data['layout']} at {data['root']}"),
        table,
        Text(f"verdicts of images, {verdicts}" if result["decides"] else "no verdicts: no thresholds for these words"),
    ]
    if compare:
        other, flips = compare["subject"], compare["flips"]
        count = len(flips["images"])
        differing = "no verdicts to compare" if flips["share"] is None else f"{count} verdicts differ"
        lines.append(
            Text(
                f"in brackets: {other['name']}, {other['backend']} {other['precision']}; "
                f"{differing}, scores differ by at most {flips['score_difference_max'] or 0:.2g}"
            )
        )
    return Group(*lines)


def _metric_cells(metrics: dict[str, Any], drift: dict[str, Any]) -> list[str]:
    cells = [str(metrics["images"])]
    for name, _ in EVAL_COLUMNS:
        text = "-" if metrics[name] is None else f"{100 * metrics[name]:.1f}"
        difference = drift.get(name)
        cells.append(text if difference is None else f"{text} ({round(100 * difference, 2) + 0.0:+.2f})")
    return cells


def _verdict_confusion(verdicts: dict[str, dict[str, int]]) -> Table:
    """What is on the frames against what was decided."""
    rows = {"defective": "defect in view", "barely": "only a sliver of one", "good": "no defect"}
    table = Table("truth, frames", *verdicts["good"], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row, title in rows.items():
        table.add_row(title, *map(str, verdicts[row].values()))
    return table


def _type_confusion(types: dict[str, dict[str, Any]]) -> Table:
    """What became of the true defects, type by type."""
    table = Table("true defect", "regions", "found", "right word", "other words", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, counts in types.items():
        right = str(counts["right"]) if counts["word"] else "no such word"
        wrong = [(word, count) for word, count in counts["called"].items() if word not in (name, "missed")]
        others = ", ".join(f"{word} {count}" for word, count in wrong[:MOST_WORDS])
        table.add_row(Text(name), str(counts["regions"]), str(counts["found"]), right, Text(others))
    if types:
        sums = [str(sum(counts[key] for counts in types.values())) for key in ("regions", "found", "right")]
        table.add_row("all", *sums, style="bold")
    return table


def package_table(content: dict[str, Any]) -> Table:
    """The `show` document."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))  # plain text: words in brackets are no markup

    rows, columns = content["map"]["grid"]
    row("name", content["name"])
    row("method", f"{content['method']}, {'tuned' if content['tuned'] else 'not tuned'}")
    row("backbone", f"{content['backbone']}, weights: {content['weights']}")
    row("input", f"{content['image_size']} px, {rows} x {columns} patches, batch {content['batch']}")
    row("feature layers", ", ".join(map(str, content["feature_layers"])))
    row("precision", content["precision"])
    row("map", f"size {content['map_size']}, smoothing {content['map']['smoothing_px']} px")
    row("image score", content["map"]["score"])
    for name, phrase in content["defects"].items():
        row("defect", name if name == phrase else f"{name}: {phrase}")
    for name in ("image", "pixel"):
        limit = content["thresholds"][name]
        row(f"{name} threshold", _threshold_text(limit, content["thresholds"]["frames"]))
    for precision, drift in content["report"]["precisions"].items():
        row(
            f"drift {precision}",
            f"map at most {drift['map_difference_max']:.2g}, types {drift['type_agreement']:.2%} equal, "
            f"{_flips_text(drift['flips'])}, ran as {drift['runs_as']}, encoder {drift['encode_ms']:.1f} ms when built",
        )
    int8 = content["report"].get("quantization")
    if int8:
        kept = f", {len(int8['kept'])} kept in float: {', '.join(int8['kept'])}" if int8["kept"] else ""
        row("int8", f"{len(int8['quantized'])} Linears{kept}")
        used = f"{int8['frames']['used']} frames of {int8['frames']['source']}"
        row("int8 ranges", f"{int8['estimator']}, outliers moved with alpha {int8['alpha']}, over {used}")
    for name, entry in content["files"].items():
        row("file", f"{name}, {entry['size']:,} bytes")
    row("made", f"{content['created']} by dapo-edge {content['versions']['dapo-edge']}")
    row("digest", content["digest"])
    return table


def doctor_table(diagnosis: Diagnosis) -> Group:
    """The `doctor` document."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for check in diagnosis.checks:
        mark = Text("ok", "green") if check.fine else Text("no", "bold red")
        table.add_row(mark, Text(check.what), Text(check.finding))  # plain text: brackets are no markup
    device = diagnosis.device
    jetson = f"Jetson Linux {device.l4t}" if device.l4t else f"Jetson: {device.jetson}"
    where = f"{jetson}, Python {device.python}" if device.jetson else f"Python {device.python}"
    return Group(Text(device.line(), "bold"), Text(where), table)


def _flips_text(flips: float | None) -> str:
    return "no verdicts to compare" if flips is None else f"verdict flips {flips:.2%}"


def _threshold_text(limit: dict[str, Any] | None, frames: int) -> str:
    if limit is None:
        return "not calibrated: every verdict is 'unsure'"
    low, high = limit["confidence_95"]
    return (
        f"{limit['value']:.4f}, rejects {limit['false_reject_rate']:.1%} of {frames} good frames "
        f"(95 % sure: {low:.1%} to {high:.1%})"
    )
