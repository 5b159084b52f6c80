"""The command line: parse, one public call, print. Data goes to stdout, people's text to stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from dapo_edge import __version__
from dapo_edge.cli_bench import bench
from dapo_edge.cli_calibrate import calibrate
from dapo_edge.cli_cameras import cameras
from dapo_edge.cli_compile import compile_
from dapo_edge.cli_eval import evaluate
from dapo_edge.cli_line import leave
from dapo_edge.cli_run import run
from dapo_edge.cli_start import EXIT_INTERRUPTED, is_run, on_signals
from dapo_edge.cli_workshop import build, demo, synth, tune
from dapo_edge.errors import DapoEdgeError
from dapo_edge.extras import named_extras
from dapo_edge.terminal import (
    PACKAGE_PATH,
    ReaderGone,
    as_json,
    fail,
    prepare_streams,
    print_json,
    print_rich,
    say,
    warnings_to_stderr,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    threads = threading.enumerate()
    prepare_streams()
    # For the whole process or not at all: errors say what could not be read, and a lost camera is tried for days.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if not is_run(given):  # which answers signals itself as soon as it has something to end
        with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it decides
            on_signals(signal.default_int_handler)
    code = 1
    try:
        with named_extras(), warnings_to_stderr():
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
    leave(code, threads)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dapo-edge")
def commands() -> None:
    """Build CLIP defect-map engines and run them on camera frames."""


for _command in (build, calibrate, compile_, tune, evaluate, bench, run, cameras, synth, demo):
    commands.add_command(_command)


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


if __name__ == "__main__":
    main()
