"""scripts.comparison_pool: what stops a comparison stops its runs, and none is begun after that. Real processes."""

import os
import signal
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.training.interrupt import stop_on_signals
from scripts import comparison_pool
from scripts.comparison_pool import carried_out, processes
from scripts.comparison_runs import Common, Fields, Wanted

PATIENCE = 60  # seconds, of a test that fails
WANTED = [Wanted("ours", 1000, 1.0, seed) for seed in range(6)]


@pytest.fixture
def common(tmp_path, monkeypatch) -> Common:
    """Forked processes, which have what a test puts in the place of a run and do not import everything anew."""
    monkeypatch.setattr(comparison_pool, "get_context", lambda _: get_context("fork"))
    return Common(Path("teacher.yaml"), (), "[]", 256, 1, False, tmp_path)


def note(common: Common, line: str) -> None:
    with (common.output / "log").open("a") as log:
        log.write(f"{line}\n")


def noted(common: Common) -> list[str]:
    path = common.output / "log"
    return path.read_text().splitlines() if path.exists() else []


def train_until_asked(common: Common, one: Wanted) -> Fields:
    """As a run: it notes the signal, saves and ends."""
    with stop_on_signals() as stop:
        note(common, f"begun {one.seed}")
        late = time.monotonic() + PATIENCE
        while not stop.signal and time.monotonic() < late:
            time.sleep(0.01)
    note(common, f"saved {one.seed}")
    raise SystemExit(128 + (stop.signal or 0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs_at_work_and_begins_no_other(common, monkeypatch, capfd, number):
    monkeypatch.setattr(comparison_pool, "carry_out", train_until_asked)

    def ask() -> None:
        while len(noted(common)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as ended, processes(2) as pool:
        carried_out(pool, common, WANTED)
    assert ended.value.code == 128 + number
    assert sorted(noted(common)) == ["begun 0", "begun 1", "saved 0", "saved 1"]
    assert f"stopped by {number.name}; the same command goes on" in capfd.readouterr().err


def fail_at_seed_0(common: Common, one: Wanted) -> Fields:
    if one.seed:
        return train_until_asked(common, one)
    while not noted(common):
        time.sleep(0.01)
    raise UserError("does not fit")


def test_a_mistake_in_one_run_stops_the_others(common, monkeypatch):
    monkeypatch.setattr(comparison_pool, "carry_out", fail_at_seed_0)
    with pytest.raises(UserError, match="does not fit"), processes(2) as pool:
        carried_out(pool, common, WANTED)
    begun = [line.removeprefix("begun ") for line in noted(common) if line.startswith("begun")]
    assert "1" in begun
    assert "saved 1" in noted(common)
    assert len(begun) <= 2  # the process that failed may have been given one more before it was ended


def test_a_process_that_is_killed_is_told(common, monkeypatch):
    monkeypatch.setattr(comparison_pool, "carry_out", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="was ended from outside"), processes(1) as pool:
        carried_out(pool, common, WANTED)


def test_results_come_in_the_order_asked_for(common, monkeypatch):
    monkeypatch.setattr(comparison_pool, "carry_out", lambda _, one: {"loss": one.seed, "kl": 0.0})
    with processes(2) as pool:
        results = carried_out(pool, common, [*WANTED[::-1], WANTED[0]])
    assert [result["loss"] for result in results] == [5, 4, 3, 2, 1, 0, 0]
