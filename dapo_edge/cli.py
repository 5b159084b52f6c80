"""The command line: parse, one public call, print. Data goes to stdout, people's text to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapo_edge import __version__
from dapo_edge.errors import DapoEdgeError, OutputError, RecipeError
from dapo_edge.extras import named_extras

if TYPE_CHECKING:
    from dapo_edge.runtime.pipeline import Outcome, Statistics
    from dapo_edge.runtime.sources import Source

EXIT_INTERRUPTED = 130
EXIT_FRAMES_FAILED = 5

as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON to stdout.")
backend_option = click.option("--backend", default="openvino", show_default=True, help="Engine that runs the package.")
precision_option = click.option(
    "--precision", type=click.Choice(["fp32", "fp16"]), help="Override the package's precision."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    code = 1
    try:
        with named_extras():
            code = commands.main(args=arguments, prog_name="dapo-edge", standalone_mode=False) or 0
    except DapoEdgeError as error:
        _say(f"error: {error}")
        code = error.exit_code
    except click.UsageError as error:
        _say(f"error: {error.format_message()} See: {error.ctx.command_path if error.ctx else 'dapo-edge'} --help")
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()  # the reader went away, e.g. `| head`: that is its good right
        code = 0
    except MemoryError:
        _say("error: out of memory. Use a smaller model, a smaller map or smaller frames.")
    except Exception as error:
        if os.environ.get("DAPO_EDGE_DEBUG"):
            traceback.print_exc()
        _say(
            f"error: unexpected {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "This is a fault of dapo-edge; set DAPO_EDGE_DEBUG=1 for the whole trace and report it."
        )
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dapo-edge")
def commands() -> None:
    """Build CLIP defect-map engines and run them on camera frames."""


@commands.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Package to write [engines/<name>.dapo].")
@click.option("--schema", is_flag=True, help="Print the recipe's JSON schema and end.")
@click.option("--print-demo-recipe", is_flag=True, help="Print the demo recipe and end.")
@as_json
def build(recipe: Path | None, output: Path | None, schema: bool, print_demo_recipe: bool, json_output: bool) -> None:
    """Compile RECIPE (YAML) into an engine package."""
    from dapo_edge.config import load_recipe, recipe_schema

    if schema:
        click.echo(recipe_schema())
        return
    if print_demo_recipe:
        click.echo(_demo_recipe_path().read_text(encoding="utf-8"), nl=False)
        return
    if recipe is None:
        raise RecipeError("no recipe given", "Name a YAML file; start from: dapo-edge build --print-demo-recipe")
    package = _build_with_progress(load_recipe(recipe), output)
    if json_output:
        _print_json({"package": str(package.path), "digest": package.digest, "report": package.report()})
    _say(f"built {package.path}")


@commands.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True)
@click.option("--frames", type=click.IntRange(min=1), help="Inspect at most this many frames of each source.")
@click.option("--out", type=click.Path(path_type=Path), help="Save overlays: a folder for PNG, or a file .mp4.")
@click.option("--map-size", help="model, frame, or WIDTHxHEIGHT [as the package says].")
@backend_option
@precision_option
@as_json
def run(
    package: Path,
    sources: tuple[str, ...],
    frames: int | None,
    out: Path | None,
    map_size: str | None,
    backend: str,
    precision: str | None,
    json_output: bool,
) -> None:
    """Inspect every frame of SOURCES (files, folders, videos, synthetic://640x480@30) with PACKAGE."""
    from dapo_edge.runtime.inspector import Inspector
    from dapo_edge.runtime.pipeline import Statistics, inspect_stream
    from dapo_edge.runtime.sources import open_source

    size = _parse_map_size(map_size)
    opened = [open_source(source) for source in sources]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(opened[0])  # a source that is not there shows before the engine is loaded
        recorder = stack.enter_context(_recorder(out, first.properties.fps)) if out else None
        inspector = stack.enter_context(Inspector(package, backend=backend, precision=precision, map_size=size))
        stopped = stack.enter_context(_stop_on_sigterm(lambda: _close(opened)))
        statistics = Statistics()
        stream = inspect_stream(inspector, opened, statistics, limit=frames, stopped=lambda: bool(stopped))
        try:
            for outcome in stream:
                _print_outcome(outcome, json_output)
                if recorder and outcome.frame and outcome.inspection:
                    from dapo_edge.outputs.overlay import draw

                    recorder.write(draw(outcome.frame, outcome.inspection), outcome.frame)
        finally:
            _print_summary(statistics, inspector, json_output)
    if statistics.failed:
        sys.exit(EXIT_FRAMES_FAILED)


@commands.command()
@click.argument("package", type=click.Path(path_type=Path))
@as_json
def show(package: Path, json_output: bool) -> None:
    """Show what PACKAGE holds, after verifying every file."""
    from dapo_edge.package import EnginePackage

    opened = EnginePackage.open(package)
    bank = opened.bank()
    content = {
        **opened.manifest.model_dump(mode="json"),
        "digest": opened.digest,
        "defects": dict(zip(bank.names[1:], bank.phrases[1:], strict=True)),
        "prompts": dict(bank.origin),
        "thresholds": opened.thresholds().model_dump(mode="json"),
        "report": opened.report(),
    }
    if json_output:
        _print_json(content)
        return
    from dapo_edge.tables import package_table

    _print_rich(package_table(content))


@commands.command()
@click.argument("package", required=False, type=click.Path(path_type=Path))
@as_json
def doctor(package: Path | None, json_output: bool) -> None:
    """Say what this machine can do, and whether PACKAGE runs here."""
    from dapo_edge.doctor import diagnose

    diagnosis = diagnose(package)
    if json_output:
        _print_json(diagnosis.as_json())
    else:
        from dapo_edge.tables import doctor_table

        _print_rich(doctor_table(diagnosis))
    if diagnosis.problem:
        raise diagnosis.problem


@commands.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--source", default="synthetic://1920x1080@30", show_default=True, help="Frames to time.")
@click.option("--frames", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--warmup", default=20, show_default=True, type=click.IntRange(min=0))
@click.option("--map-size", help="model, frame, or WIDTHxHEIGHT [as the package says].")
@backend_option
@precision_option
@as_json
def bench(
    package: Path,
    source: str,
    frames: int,
    warmup: int,
    map_size: str | None,
    backend: str,
    precision: str | None,
    json_output: bool,
) -> None:
    """Time PACKAGE on this machine: percentiles per stage, one frame at a time."""
    from dapo_edge.bench import bench as measure
    from dapo_edge.runtime.inspector import Inspector

    size = _parse_map_size(map_size)
    with (
        Inspector(package, backend=backend, precision=precision, map_size=size) as inspector,
        _progress_bar() as progress,
    ):
        result = measure(
            inspector,
            source,
            frames=frames,
            warmup=warmup,
            on_frame=lambda done, of: progress("timing frames", done, of),
        )
    if json_output:
        _print_json(result)
        return
    from dapo_edge.tables import bench_table

    _print_rich(bench_table(result))


@commands.command()
@click.option("--engines", default="engines", show_default=True, type=click.Path(path_type=Path))
@click.option("--frames", default=200, show_default=True, type=click.IntRange(min=1))
@as_json
def demo(engines: Path, frames: int, json_output: bool) -> None:
    """Build the demo package, inspect a generated belt, leave a video and a contact sheet."""
    from dapo_edge.config import load_recipe
    from dapo_edge.demo import inspect_belt

    package = _build_with_progress(load_recipe(_demo_recipe_path()), engines / "surface-tiny.dapo")
    with _progress_bar() as progress:
        result = inspect_belt(
            package, engines / "surface-tiny-demo", frames, lambda done, of: progress("inspecting the belt", done, of)
        )
    if json_output:
        _print_json(result)
        return
    from dapo_edge.tables import demo_table

    _print_rich(demo_table(result))


def _demo_recipe_path() -> Path:
    return Path(__file__).parent / "assets" / "surface-tiny.yaml"


def _build_with_progress(recipe: Any, output: Path | None) -> Any:
    from dapo_edge.engine.build import build as build_package

    with _progress_bar() as progress, _stop_on_sigterm(_interrupt):
        package = build_package(recipe, output, progress)
    if not package.manifest.tuned:
        _say("note: the prompts are not tuned, so the maps follow the backbone alone ('prompts.tuned' in the recipe)")
    if package.manifest.weights.startswith("seeded"):
        _say("note: the backbone has seeded weights, so the maps mean nothing yet ('backbone.pretrained')")
    return package


def _close(sources: Sequence[Source]) -> None:
    for source in sources:
        source.close()  # also wakes one that waits for its next frame


def _interrupt() -> None:
    raise KeyboardInterrupt


def _parse_map_size(text: str | None) -> Any:
    if text in (None, "model", "frame"):
        return text
    from dapo_edge.config import MAX_MAP_SIDE_PX

    width, _, height = str(text).lower().partition("x")
    if not (width.isdigit() and height.isdigit()) or not all(
        1 <= int(side) <= MAX_MAP_SIDE_PX for side in (width, height)
    ):
        raise RecipeError(
            f"'{text}' is not a map size", f"Use model, frame or WIDTHxHEIGHT with sides up to {MAX_MAP_SIDE_PX}"
        )
    return int(width), int(height)


def _recorder(out: Path, fps: float | None) -> Any:
    from dapo_edge.outputs.overlay import Recorder

    return Recorder(out, fps=fps or 25.0)


@contextlib.contextmanager
def _stop_on_sigterm(then: Callable[[], object]) -> Iterator[list[int]]:
    """Collect SIGTERM in a list, so that the work in hand is finished, and call `then`, e.g. to end a wait."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        then()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Any]:
    """A bar on a terminal; plain lines, one per step, where stderr is a file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: list[str] = []

        def line(step: str, done: int, of: int) -> None:
            if not seen or seen[-1] != step:
                seen.append(step)
                _say(step)

        yield line
        return
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, of: int) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=bar.tasks[task].total)
                tasks[step] = bar.add_task(step, total=of)
            bar.update(tasks[step], completed=done, total=of)

        yield update
        for task in tasks.values():
            bar.update(task, completed=bar.tasks[task].total)


def _print_outcome(outcome: Outcome, json_output: bool) -> None:
    from dapo_edge.outputs.events import frame_json, frame_text

    if json_output:
        _print_json(frame_json(outcome), indent=None)
    else:
        _say(frame_text(outcome))


def _print_summary(statistics: Statistics, inspector: Any, json_output: bool) -> None:
    backend = inspector.backend
    summary = {
        **statistics.as_json(),
        "backend": backend.name,
        "precision": backend.precision,
        "device": backend.device,
    }
    if json_output:
        _print_json({"summary": summary}, indent=None)
    else:
        counts = ", ".join(f"{summary[name]} {name}" for name in ("captured", "inspected", "dropped", "failed"))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in statistics.verdicts.items())
        _say(f"{counts}; {verdicts}; {summary['fps']} frames/s on {backend.device}, {backend.precision}")


def _print_json(content: Any, indent: int | None = 2) -> None:
    try:
        sys.stdout.write(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        raise OutputError.refused("stdout", error) from error


def _forget_stdout() -> None:
    """What stdout still holds can't be written; without this Python would try once more at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_rich(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
