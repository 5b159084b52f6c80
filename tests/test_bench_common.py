"""What the benchmark scripts share: results are refused before anything is measured, and errors are one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from dapo_edge.errors import RecipeError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import outside
import scaling
from common import end_with, result_file


def test_a_file_in_a_folder_that_is_not_there_yet_is_fine(tmp_path: Path) -> None:
    assert result_file(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong, why in (
        ("/dev/full", "it is no plain file"),
        (str(tmp_path), "it is no plain file"),
        (str(tmp_path / "file" / "x.json"), "Not a directory"),
        (str(tmp_path / ("x" * 300)), "File name too long"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            result_file(wrong)


def test_a_wrong_result_file_ends_a_script_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["outside.py", "--out", "/dev/full"])
    with pytest.raises(SystemExit) as stopped:
        outside.main()
    assert stopped.value.code == 2
    assert "argument --out: '/dev/full' can't be written (it is no plain file)" in capsys.readouterr().err


def test_single_curves_do_not_replace_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        scaling.main(["--only", "tiles"])
    assert stopped.value.code == 2
    assert "--only needs --out" in capsys.readouterr().err


def test_an_error_is_one_line() -> None:
    def refuse() -> None:
        raise RecipeError("there is no curve 'x'", "Take another")

    with pytest.raises(SystemExit) as stopped:
        end_with(refuse)
    assert stopped.value.code == "error: there is no curve 'x'. Take another."


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        end_with(interrupt)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted: what was not written yet is lost\n"


@pytest.mark.parametrize("code", [None, 0, 1])
def test_a_script_says_how_it_ended(code: int | None) -> None:
    with pytest.raises(SystemExit) as stopped:
        end_with(lambda: code)
    assert stopped.value.code == code
