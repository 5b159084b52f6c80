"""How `dapo-edge run` ends, in a process of its own: on signals, whatever hangs, and when nobody reads its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dapo_edge.cli_line import LAST_WORDS_S, OVERTIME_S
from dapo_edge.runtime.run_config import RunConfig

LINE = [sys.executable, str(Path(__file__).with_name("line_main.py"))]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path)])}
SHORT = ("--set", "drain_s=0.4")
IN_TIME_S = 0.4 + OVERTIME_S + LAST_WORDS_S + 2.0  # of a SHORT run; the last is what a busy machine adds


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LINE, "run", "p.dapo", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **environment},
    )  # fmt: skip


def until(process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], object]) -> None:
    """Read stdout up to the line that is wanted."""
    assert process.stdout is not None
    while not wanted(json.loads(process.stdout.readline())):
        pass


def until_said(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line == f"{text}\n", line + process.stderr.read()


def also_to(file: Path) -> tuple[str, ...]:
    return ("--set", "sinks.1.kind=jsonl", "--set", f"sinks.1.path={file}")


def until_many(file: Path) -> None:
    """Wait for more results than a pipe can hold, some 300."""
    until_s = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < 1500:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def is_frame(line: dict[str, Any]) -> bool:
    return "index" in line


def state(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: isinstance(line.get("camera"), dict) and line["camera"]["state"] == name


def ended(process: subprocess.Popen[str], within_s: float) -> tuple[int, list[Any], str]:
    started = time.monotonic()
    output, errors = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert seconds <= within_s, errors
    assert "Traceback" not in errors
    lines = [json.loads(line) for line in output.splitlines()]
    assert sum("summary" in line for line in lines) <= 1
    return process.returncode, lines, errors


def test_by_default_a_stopped_run_ends_within_five_seconds() -> None:
    drain_s = RunConfig.model_fields["drain_s"].default
    assert drain_s + OVERTIME_S + LAST_WORDS_S <= 4.5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_hanging_camera_does_not_hold_up_the_end(number: int, code: int) -> None:
    process = start("hang://a?frames=3", "slow://20", "--json", *SHORT)
    until(process, state("stalled"))
    process.send_signal(number)
    returned, lines, errors = ended(process, IN_TIME_S)
    assert returned == code, errors
    summary = lines[-1]["summary"]
    assert summary["captured"] == summary["inspected"] + summary["dropped"]
    assert summary["in_flight"] == 0
    assert summary["cameras"][1]["inspected"] > 3, "the other camera went on"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everything_captured_comes_out(number: int) -> None:
    """Four frames wait, and one is in the engine: 0.5 s, of the 30 s that they may take."""
    process = start("slow://1", "--policy", "wait", "--json", "--set", "drain_s=30", DAPO_TEST_ENGINE_MS="100")
    until(process, is_frame)
    process.send_signal(number)
    _, lines, _ = ended(process, 20.0)
    summary = lines[-1]["summary"]
    assert summary["captured"] == summary["inspected"] == 1 + len([line for line in lines if "index" in line])


def test_an_engine_that_hangs_does_not_hold_up_the_end() -> None:
    process = start("slow://5", "--json", *SHORT, DAPO_TEST_ENGINE="hang")
    until_said(process, "hanging")
    process.send_signal(signal.SIGTERM)
    returned, lines, errors = ended(process, IN_TIME_S)
    assert returned == 0, errors
    summary = lines[-1]["summary"]
    assert summary["captured"] == summary["dropped"] + summary["failed"] >= 1
    assert summary["in_flight"] == 0


def test_an_engine_that_fails_while_another_call_of_it_hangs() -> None:
    process = start("slow://5", "--json", DAPO_TEST_ENGINE="hang,fail")
    returned, lines, errors = ended(process, 20.0)
    assert returned == 1
    assert errors.splitlines()[0] == "hanging"
    assert errors.splitlines()[-1] == "error: the device is gone. Restart it."
    assert lines[-1]["summary"]["failed"] == 1


def test_a_second_interrupt_stops_at_once() -> None:
    process = start("slow://1", "--policy", "wait", "--json", "--stats-every", "0.1", "--set", "drain_s=60",
                    "--set", "sources.0.queue=50", DAPO_TEST_ENGINE_MS="400")  # fmt: skip
    until(process, lambda line: line.get("statistics", {}).get("in_flight", 0) > 40)
    process.send_signal(signal.SIGINT)
    until(process, state("ended"))
    process.send_signal(signal.SIGINT)
    returned, lines, _ = ended(process, 4.0)
    assert returned == 130
    summary = lines[-1]["summary"]
    assert summary["dropped_by"]["shutdown"] > 20
    assert summary["captured"] == summary["inspected"] + summary["dropped"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_stopping_while_the_engine_loads(number: int, code: int) -> None:
    process = start("slow://5", DAPO_TEST_LOADING_S="60")
    until_said(process, "loading")
    process.send_signal(number)
    assert ended(process, 5.0)[0] == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_a_stopped_run_still_says_that_a_sink_failed(number: int, code: int) -> None:
    process = start("slow://5", "--json", *also_to(Path("/dev/full")))
    until(process, is_frame)
    process.send_signal(number)
    returned, lines, errors = ended(process, 10.0)
    assert returned == code, errors
    first, last = errors.splitlines()[0], errors.splitlines()[-1]
    assert first == "warning: the sink 'jsonl2' fails: '/dev/full' can't be written (No space left on device). " \
        "Free some space, or write to another disk."  # fmt: skip
    assert last == "interrupted" if code == 130 else last.startswith("error: the sink 'jsonl2' failed")
    stdout, file = lines[-1]["summary"]["sinks"]
    assert "error" not in stdout
    assert file["error"].startswith("'/dev/full' can't be written")


def test_a_reader_that_goes_away_ends_the_run() -> None:
    process = start("slow://1", "--json")
    until(process, is_frame)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        errors = process.stderr.read()
    assert (process.wait(timeout=10), "error" in errors) == (0, False), errors


def test_a_reader_that_sleeps_does_not_stall_cameras(tmp_path: Path) -> None:
    """The results of a live camera go on while nobody empties the pipe, and the summary finds another way."""
    file = tmp_path / "r.jsonl"
    process = start("slow://1", "--json", *SHORT, *also_to(file))
    until_many(file)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=IN_TIME_S) == 0, "although stdout is still full"
    _, errors = process.communicate()
    assert " captured, " in errors
    assert "sink jsonl: " in errors
    assert "summary" not in errors


def test_an_error_ends_the_run_though_nobody_reads(tmp_path: Path) -> None:
    file, broken = tmp_path / "r.jsonl", tmp_path / "broken"
    process = start("slow://1", "--json", *also_to(file), DAPO_TEST_FAILS_WITH=str(broken))
    until_many(file)
    broken.touch()
    assert process.wait(timeout=10) == 1
    _, errors = process.communicate()
    assert " captured, " in errors
    assert errors.splitlines()[-1] == "error: the device is gone. Restart it."


def test_files_lose_no_line_to_a_slow_reader() -> None:
    process = start("synthetic://64x64?frames=1500&loop=4", "--json")
    time.sleep(2)
    _, lines, _ = ended(process, 60.0)
    assert [line["index"] for line in lines[:-1]] == list(range(1500))
    assert lines[-1]["summary"]["sinks"] == [{"name": "jsonl", "written": 1500, "lost": 0, "failed": 0}]
