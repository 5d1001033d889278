"""Asked to stop, a run finishes its step and saves it, however often it is asked."""

import os
import signal
from dataclasses import replace

import pytest
from tiny_run import ACCUMULATE, CADENCE, STEPS, metrics, run, saved, stop_at

STOPS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_signal_finishes_the_step_saves_and_exits(tmp_path, capsys, number, code):
    handlers = [signal.getsignal(number) for number, _ in STOPS]
    run(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", batch=stop_at(ACCUMULATE * 6, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.code == code
    assert f"stopped by {number.name} after step 7 of {STEPS}" in capsys.readouterr().err
    assert saved(tmp_path / "stopped") == ["step-00000004", "step-00000007"]
    assert [signal.getsignal(number) for number, _ in STOPS] == handlers
    run(tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def kill(*numbers: signal.Signals):
    """Send this very process signals."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize("number", [number for number, _ in STOPS])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(tmp_path, number):
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        run(tmp_path, batch=stop_at(ACCUMULATE * 6, kill(number)))
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, handler)
    assert saved(tmp_path)[-1] == f"step-{STEPS:08d}"


def test_a_second_sigint_does_not_wait(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batch=stop_at(2, kill(signal.SIGINT, signal.SIGINT)))


def test_a_first_sigint_after_other_signals_still_waits(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, batch=stop_at(ACCUMULATE * 2, kill(signal.SIGTERM, signal.SIGHUP, signal.SIGINT)))
    assert stopped.value.code == 130
    assert saved(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_launchers_send_again_changes_nothing(tmp_path, monkeypatch, number):
    """In the step, and at every flush of the checkpoint that the first one asked for."""
    send, fsync = kill(number, number), os.fsync

    def at_the_seventh_step() -> None:
        monkeypatch.setattr(os, "fsync", lambda handle: (send(), fsync(handle)))
        send()

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", batch=stop_at(ACCUMULATE * 6, at_the_seventh_step))
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    assert saved(tmp_path / "stopped") == ["step-00000004", "step-00000007"]
    for name in ("stopped", "whole"):
        run(tmp_path / name)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path):
    calls = []

    def evaluate() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, evaluate=evaluate, cadence=replace(CADENCE, eval_every=None))
    assert stopped.value.code == 143
    assert saved(tmp_path)[-1] == f"step-{STEPS:08d}"
