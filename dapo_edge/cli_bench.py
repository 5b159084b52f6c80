"""`dapo-edge bench`: how fast a package is on this machine."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from dapo_edge.cli_start import EXIT_INTERRUPTED
from dapo_edge.errors import DeadlineError, RecipeError, SourceError
from dapo_edge.terminal import (
    PACKAGE_PATH,
    PRECISION,
    FiniteFloat,
    as_json,
    interruptible_progress,
    map_size_option,
    parse_map_size,
    print_json,
    print_rich,
    say,
)

DEFAULT_SOURCE = "synthetic://1920x1080@30"  # of dapo_edge.bench, which is loaded when it is needed
MANY_AT_ONCE = (
    "the engine was opened for the most frames per second of several cameras: a single frame may take longer "
    "than without --cameras"
)


class Counts(click.ParamType):
    """1,2,4: whole numbers with commas between."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """The numbers, or click's usage error."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and len(part.strip()) < 6 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers such as 1,2,4.", param, context)
        return tuple(int(part) for part in parts)


@click.command()
@click.argument("package", type=PACKAGE_PATH)
@click.option("--source", default=DEFAULT_SOURCE, show_default=True, help="Frames to time.")
@click.option("--frames", default=200, show_default=True, type=click.IntRange(min=1), help="Frames to time.")
@click.option("--seconds", type=FiniteFloat(min=0, min_open=True), help="Time for so long instead.")
@click.option(
    "--warmup",
    "warm_up",
    type=click.IntRange(min=0),
    help="Frames that do not count. [default: until times are steady]",
)
@click.option(
    "--rate",
    "rate_fps",
    type=FiniteFloat(min=0, min_open=True),
    help="Frames arrive so many times per second, ready or not; their waiting counts.",
)
@click.option(
    "--deadline-ms",
    type=FiniteFloat(min=0, min_open=True),
    help="From arrival to written result; exit code 6 when p99 is above it.",
)
@click.option("--find-rate", is_flag=True, help="Find the highest rate whose p99 meets the deadline.")
@click.option(
    "--cameras", type=Counts(), default=(), help="1,2,4: also time so many cameras at once; one number: --rate of each."
)
@click.option("--batches", type=Counts(), default=(), help="1,2,4: also time calls with so many frames each.")
@click.option("--compare", type=PACKAGE_PATH, help="Another package, or the same one, on the same frames by turns.")
@click.option("--compare-precision", type=PRECISION, help="Precision of the other package.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML page with plots.")
@map_size_option
@click.option(
    "--backend",
    default="openvino",
    show_default=True,
    help="Engine that runs the package: openvino, or tensorrt after dapo-edge compile.",
)
@click.option("--precision", type=PRECISION, help="Override the package's precision.")
@as_json
def bench(
    package: Path,
    map_size: str | None,
    backend: str,
    precision: str | None,
    compare: Path | None,
    compare_precision: str | None,
    report: Path | None,
    json_output: bool,
    **measure: Any,
) -> int:
    """Time PACKAGE on this machine: percentiles per stage, one frame at a time or at a line's rate."""
    from dapo_edge.bench import BenchPlan
    from dapo_edge.bench import bench as run_bench
    from dapo_edge.runtime.inspector import Inspector

    plan = BenchPlan(**measure)
    if compare_precision and not compare:
        raise RecipeError("--compare-precision is that of another package", "Name it with --compare")
    if report:
        from dapo_edge.bench.report import check_can_write

        check_can_write(report)
    options = {"backend": backend, "map_size": parse_map_size(map_size)}
    # As `run` opens the engine: for the single frame of one camera, or for the most frames of several.
    options["throughput"] = max(plan.cameras, default=1) > 1
    with (
        interruptible_progress() as progress,
        Inspector(package, precision=precision, **options) as inspector,
        Inspector(compare, precision=compare_precision, **options) if compare else nullcontext() as other,
    ):
        result = run_bench(inspector, plan, compare=other, command=sys.argv, progress=progress)
    if options["throughput"] and (plan.rate_fps is None or plan.swept_cameras):
        result["warnings"].append(MANY_AT_ONCE)
    _tell(result, json_output, report)
    if result["error"]:
        raise SourceError(**result["error"])
    if result["interrupted"]:
        return EXIT_INTERRUPTED
    check_deadline(result)
    return 0


def check_deadline(result: dict[str, Any]) -> None:
    """Raises `DeadlineError` when the run did not meet its deadline."""
    deadline = result["deadline"]
    if deadline is None or deadline["met"]:
        return
    p99 = result["stages"]["total"]["p99"]
    raise DeadlineError(
        f"p99 of {p99:.1f} ms against a deadline of {deadline['ms']:g} ms: "
        f"{deadline['misses']} frames late or lost ({deadline['share']:.2%})",
        "Lower the rate, the map size or the precision, take a faster machine, or a later deadline",
    )


def _tell(result: dict[str, Any], json_output: bool, report: Path | None) -> None:
    if json_output:
        print_json(result)
    else:
        from dapo_edge.bench.table import bench_table

        print_rich(bench_table(result))
    if report:
        from dapo_edge.bench.report import write_report

        write_report(result, report)
        say(f"written: {report}")
