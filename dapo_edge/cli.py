"""The command line: parse, one public call, print. Data goes to stdout, people's text to stderr."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapo_edge import __version__
from dapo_edge.cli_calibrate import calibrate
from dapo_edge.cli_compile import compile_
from dapo_edge.cli_eval import evaluate
from dapo_edge.cli_workshop import build, demo, synth, tune
from dapo_edge.errors import DapoEdgeError, OutputError, SourceError
from dapo_edge.extras import named_extras
from dapo_edge.terminal import (
    PACKAGE_PATH,
    PRECISION,
    ReaderGone,
    as_json,
    fail,
    map_size_option,
    parse_map_size,
    prepare_streams,
    print_json,
    print_rich,
    progress_bar,
    say,
    stop_on_signals,
)

if TYPE_CHECKING:
    from dapo_edge.runtime.pipeline import Outcome, Statistics
    from dapo_edge.runtime.sources import Source

EXIT_INTERRUPTED = 130

backend_option = click.option(
    "--backend",
    default="openvino",
    show_default=True,
    help="Engine that runs the package: openvino, or tensorrt after dapo-edge compile.",
)
precision_option = click.option("--precision", type=PRECISION, help="Override the package's precision.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it decides
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 1
    try:
        with named_extras():
            code = commands.main(args=arguments, prog_name="dapo-edge", standalone_mode=False) or 0
    except DapoEdgeError as error:
        fail(str(error), given)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        code = 2
    except click.UsageError as error:
        fail(f"{error.format_message()} See: {error.ctx.command_path if error.ctx else 'dapo-edge'} --help", given)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        code = EXIT_INTERRUPTED
    except ReaderGone:
        code = 0  # e.g. `| head`: that is its good right
    except MemoryError:
        fail("out of memory. Use a smaller model, a smaller map or smaller frames.", given)
    except OSError as error:
        place = f" '{error.filename}'" if error.filename else ""
        fail(
            f"the system refused{place} ({error.strerror or error}). Check the path, its permissions and the disk.",
            given,
        )
    except Exception as error:
        if os.environ.get("DAPO_EDGE_DEBUG"):
            traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        fail(
            f"unexpected {type(error).__name__}: {first}. "
            "This is a fault of dapo-edge; set DAPO_EDGE_DEBUG=1 for the whole trace and report it.",
            given,
        )
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dapo-edge")
def commands() -> None:
    """Build CLIP defect-map engines and run them on camera frames."""


for _command in (build, calibrate, compile_, tune, evaluate, synth, demo):
    commands.add_command(_command)


@commands.command()
@click.argument("package", type=PACKAGE_PATH)
@click.argument("sources", nargs=-1, required=True)
@click.option("--frames", type=click.IntRange(min=1), help="Inspect at most this many frames of each source.")
@click.option("--out", type=click.Path(path_type=Path), help="Save overlays: a folder for PNG, or a file .mp4.")
@map_size_option
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

    size = parse_map_size(map_size)
    opened = [open_source(source) for source in sources]
    if out:
        _protect_sources(out, sources)
    with stop_on_signals(lambda: _close_beside(opened)) as received, contextlib.ExitStack() as stack:
        for source in opened:
            stack.enter_context(source)  # one that is not there shows before the engine is loaded
        recorder = stack.enter_context(_recorder(out, opened[0].properties.fps)) if out else None
        inspector = stack.enter_context(Inspector(package, backend=backend, precision=precision, map_size=size))
        statistics = Statistics()
        stream = inspect_stream(inspector, opened, statistics, limit=frames, stopped=lambda: bool(received))
        try:
            for outcome in stream:
                _print_outcome(outcome, json_output)
                if recorder and outcome.frame and outcome.inspection:
                    from dapo_edge.outputs.overlay import draw

                    recorder.write(draw(outcome.frame, outcome.inspection), outcome.frame)
        finally:
            _print_summary(statistics, inspector, json_output)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if statistics.failed:
        raise SourceError(
            f"{statistics.failed} of {statistics.captured} frames could not be used",
            "See the lines with an error; all other frames were inspected",
        )


@commands.command()
@click.argument("package", type=PACKAGE_PATH)
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
        print_json(content)
        return
    from dapo_edge.tables import package_table

    print_rich(package_table(content))


@commands.command()
@click.argument("package", required=False, type=PACKAGE_PATH)
@as_json
def doctor(package: Path | None, json_output: bool) -> None:
    """Say what this machine can do, and whether PACKAGE runs here."""
    from dapo_edge.doctor import diagnose

    diagnosis = diagnose(package)
    if json_output:
        print_json(diagnosis.as_json())
    else:
        from dapo_edge.tables import doctor_table

        print_rich(doctor_table(diagnosis))
    if diagnosis.problem:
        raise diagnosis.problem


@commands.command()
@click.argument("package", type=PACKAGE_PATH)
@click.option("--source", default="synthetic://1920x1080@30", show_default=True, help="Frames to time.")
@click.option("--frames", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--warmup", default=20, show_default=True, type=click.IntRange(min=0))
@map_size_option
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

    size = parse_map_size(map_size)
    with (
        Inspector(package, backend=backend, precision=precision, map_size=size) as inspector,
        progress_bar() as progress,
    ):
        result = measure(
            inspector,
            source,
            frames=frames,
            warmup=warmup,
            on_frame=lambda done, of: progress("timing frames", done, of),
        )
    if json_output:
        print_json(result)
        return
    from dapo_edge.tables import bench_table

    print_rich(bench_table(result))


def _close_beside(sources: Sequence[Source]) -> None:
    """Close sources, which wakes one that waits for its next frame.

    In a thread of its own: a signal interrupts the main thread anywhere, also where it holds a source's lock.
    """

    def close() -> None:
        for source in sources:
            source.close()

    threading.Thread(target=close).start()


def _protect_sources(out: Path, sources: Sequence[str]) -> None:
    """Refuse to write where is read: overlays would replace the pictures that they were made of."""
    from dapo_edge.data.pictures import IMAGE_EXTENSIONS
    from dapo_edge.outputs.recorder import names_pictures
    from dapo_edge.runtime.sources.uri import path_of, split

    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(out)):  # a path has one slash of the URI's two already
        raise OutputError(f"'{out}' is not a path", "Name a folder, or a file that ends in .mp4")
    target = Path(os.path.realpath(out))
    is_video = target.suffix.lower() == ".mp4"
    written = target.parent if names_pictures(target) else target
    for source in sources:
        address = split(source)
        if address is not None and address.scheme not in ("dir", "file", "image"):
            continue
        read = (Path(source) if address is None else path_of(address.body)).absolute()
        read = Path(os.path.realpath(read))
        is_pictures = read.is_dir() or read.suffix.lower() in IMAGE_EXTENSIONS
        pictures = read if read.is_dir() else read.parent
        if target == read or (is_pictures and not is_video and written == pictures):
            raise OutputError(f"'{out}' is where the source '{source}' lies", "Save overlays to another folder")


def _recorder(out: Path, fps: float | None) -> Any:
    from dapo_edge.outputs.overlay import Recorder

    return Recorder(out, fps=fps or 25.0)


def _print_outcome(outcome: Outcome, json_output: bool) -> None:
    from dapo_edge.outputs.events import frame_json, frame_text

    if json_output:
        print_json(frame_json(outcome), indent=None)
    else:
        say(frame_text(outcome))


def _print_summary(statistics: Statistics, inspector: Any, json_output: bool) -> None:
    backend = inspector.backend
    summary = {
        **statistics.as_json(),
        "backend": backend.name,
        "precision": backend.precision,
        "device": backend.device,
    }
    if json_output:
        print_json({"summary": summary}, indent=None)
    else:
        counts = ", ".join(f"{summary[name]} {name}" for name in ("captured", "inspected", "dropped", "failed"))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in statistics.verdicts.items())
        say(f"{counts}; {verdicts}; {summary['fps']} frames/s on {backend.device}, {backend.precision}")


if __name__ == "__main__":
    main()
