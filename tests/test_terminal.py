"""A signal during long work ends it as an interrupt, wherever it falls."""

from __future__ import annotations

import contextlib
import logging
import signal

import pytest

from dapo_edge.terminal import fail, interruptible_progress, warnings_to_stderr


def deliver(number: signal.Signals) -> None:
    """What Python does about a signal: call its handler in the main thread. Real ones reach commands in test_cli.py."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@NUMBERS
def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_step(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible_progress() as progress:
        progress("working", 0, 2)
        with contextlib.suppress(KeyboardInterrupt):
            deliver(number)
        progress("working", 1, 2)
        pytest.fail("the work went on")


@NUMBERS
def test_an_interrupt_that_comes_out_as_another_error_is_one(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interruptible_progress():
        try:
            deliver(number)
        except KeyboardInterrupt as error:
            raise ImportError("half a module") from error
    assert caught.value.__suppress_context__


def test_an_error_without_a_signal_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="a fault"), interruptible_progress() as progress:
        progress("working", 0, 2)
        raise ValueError("a fault")
    assert capsys.readouterr().err == "working\n"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_warnings_are_one_line_on_stderr_without_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("dapo_edge.some.part")
    with warnings_to_stderr():
        log.info("not worth a word")
        try:
            raise OSError("gone")
        except OSError as error:
            log.warning("%s fails:\n %s", "rtsp://me:hush@h/x", error, exc_info=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "warning: rtsp://***@h/x fails: gone\n"


def test_errors_hold_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    fail("'rtsp:/me:hush@h/x' and 'rtsp://a:hu sh@h/y' and 'rtsp://b:hush@h/z'", ["rtsp://a:hu sh@h/y"])
    assert capsys.readouterr().err == "error: '***@h/x' and 'rtsp://***@h/y' and 'rtsp://***@h/z'\n"
