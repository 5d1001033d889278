"""metrics.jsonl, TensorBoard, and the line a run shows while it goes."""

import json
import re
import sys

import pytest

from distill.engines import processes
from distill.errors import UserError
from distill.training import progress as progress_module
from distill.training.progress import progress
from distill.training.tracking import MetricsLog, NoLog, require_trackers


def lines(folder) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in map(json.loads, (folder / "metrics.jsonl").open())]


def write_run(folder, resumed: int = 0, until: int = 4) -> None:
    """An evaluation at 0 and 2, as the loop orders them."""
    with MetricsLog(folder, [], resumed) as log:
        for step in range(resumed, until + 1):
            if step > resumed:
                log.write("train", step, 10 * step, {"loss": 1.0 / step})
            if step % 2 == 0:
                log.write("eval", step, 10 * step, {"perplexity": 2.0})


def test_lines_are_written_at_once(tmp_path):
    with MetricsLog(tmp_path / "new folder", [], 0) as log:
        log.write("train", 1, 10, {"loss": 0.5, "parts": {"a": 0.25}})
        expected = {"kind": "train", "step": 1, "tokens": 10, "loss": 0.5, "parts": {"a": 0.25}}
        assert json.loads((tmp_path / "new folder" / "metrics.jsonl").read_text()) == expected


@pytest.mark.parametrize("resumed", [0, 1, 2, 3, 4])
def test_a_resumed_file_reads_as_if_never_interrupted(tmp_path, resumed):
    write_run(tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    write_run(tmp_path, resumed)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize("torn", ['{"kind": "tra', '{"kind": "train", "step": 2}', "\0\0\0\n"])
def test_a_half_written_line_is_cut(tmp_path, torn):
    write_run(tmp_path, until=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    MetricsLog(tmp_path, [], 5).__exit__(None, None, None)
    assert lines(tmp_path) == [("eval", 0), ("train", 1)]


def test_infinities_become_null(tmp_path):
    with MetricsLog(tmp_path, [], 0) as log:
        log.write("eval", 0, 0, {"perplexity": float("inf"), "parts": {"a": float("nan"), "b": 1.0}})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["perplexity"], line["parts"]) == (None, {"a": None, "b": 1.0})


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ["tensorboard"], 0) as log:
        for step in (1, 2):
            log.write("train", step, step, {"loss": step / 2, "parts": {"a": 1.0}})
    with MetricsLog(tmp_path, ["tensorboard"], 1) as log:
        log.write("train", 2, 2, {"loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 7.0)]


def test_unknown_and_missing_trackers_are_named(monkeypatch):
    require_trackers([])
    with pytest.raises(UserError, match="'wandb' is unknown; allowed: tensorboard"):
        require_trackers(["wandb"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=re.escape("pip install 'distill-ssm[tensorboard]'")):
        require_trackers(["tensorboard"])


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 8.0, 12.0, 14.0, 30.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress("hidden", steps=10, done=2) as show:
        for step in range(3, 8):
            show(step, 1.23456, 5400.4)
    assert capsys.readouterr().err.splitlines() == [
        "hidden: step 3/10, loss 1.2346, 5,400 tokens/s, 0:00:28 left",
        "hidden: step 6/10, loss 1.2346, 5,400 tokens/s, 0:00:14 left",
        "hidden: step 7/10, loss 1.2346, 5,400 tokens/s, 0:00:18 left",
    ]


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("hidden", steps=10, done=2) as show:
        show(10, 1.5, 5400.0)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "hidden" in shown
    assert "10/10" in shown
    assert "loss 1.5000, 5,400 tokens/s" in shown


def test_the_processes_that_do_not_write_say_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    with NoLog() as log, progress("hidden", steps=10, done=2) as show:
        log.write("train", 1, 10, {"loss": 0.5})
        log.flush_to_disk()
        show(10, 1.5, 5400.0)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
