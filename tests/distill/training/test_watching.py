"""What a run measures changes nothing; what it decides by it (the best step, an early end) survives every restart."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import ACCUMULATE, CADENCE, STEPS, Student, crash, metrics, run, saved, stop_at

from distill.errors import UserError
from distill.training import Best, Cadence, Hook, Patience
from distill.training.watching import is_better

PLAIN = Cadence(eval_every=None, checkpoint_every=50, keep_checkpoints=1)


def scripted(values: dict[int, float], name: str = "score", every: int = 4) -> Hook:
    """A measure that finds these values at these steps."""
    return Hook(lambda student, step: {name: values[step]}, every)


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in student.parameters()]


def trained(folder: Path, **changed) -> tuple[Student, object]:
    torch.manual_seed(0)
    student = Student()
    return student, run(folder, student=student, **{"evaluate": None, "cadence": PLAIN} | changed)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def meddling(student: Student, step: int) -> dict[str, float]:
    """Draws from every generator, and leaves modes and the default dtype as it likes."""
    assert not student.training
    assert not torch.is_grad_enabled()
    student.layers[0].train()
    torch.set_default_dtype(torch.float64)
    return {"drawn": random.random() + float(np.random.rand()) + float(torch.rand(()))}


def test_measuring_changes_nothing(tmp_path):
    watched, _ = trained(tmp_path / "watched", hooks=[Hook(meddling, 3)])
    assert torch.get_default_dtype() == torch.float32
    left_alone, _ = trained(tmp_path / "alone")
    assert same(weights(watched), weights(left_alone))
    assert all(module.training for module in watched.modules())


def test_each_hook_has_its_own_pace_and_one_line_holds_all(tmp_path):
    told: list[tuple[str, int]] = []

    def hook(name: str, every: int | None) -> Hook:
        return Hook(lambda student, step: told.append((name, step)) or {name: float(step)}, every)

    trained(tmp_path, hooks=[hook("a", 6), hook("b", 9), hook("c", None)], evaluate=lambda: {"loss": 1.0})
    assert [step for name, step in told if name == "a"] == [0, 6, 12, 18, STEPS]
    assert [step for name, step in told if name == "b"] == [0, 9, 18, STEPS]
    assert [step for name, step in told if name == "c"] == [0, STEPS]
    lines = {line["step"]: line for line in metrics(tmp_path) if line["kind"] == "eval"}
    assert [set(line) & {"loss", "a", "b", "c"} for line in lines.values()] == [
        {"loss", "a", "b", "c"},
        {"a"},
        {"b"},
        {"a"},
        {"a", "b"},
        {"loss", "a", "b", "c"},
    ]


SCORES = {0: 9.0, 4: 1.0, 8: 5.0, 12: 2.0, 16: 5.0, 20: 3.0}


@pytest.mark.parametrize(("mode", "best"), [("max", 8), ("min", 4)])
def test_the_best_step_is_handed_on(tmp_path, mode, best):
    """The start is none; of two as good the first counts; no other checkpoint is written for it."""
    at: dict[int, list[torch.Tensor]] = {}
    seen = Hook(lambda student, step: at.update({step: weights(student)}) or {}, 4)
    student, result = trained(tmp_path, hooks=[scripted(SCORES), seen], keep_best=Best("score", mode, 4))
    assert (result.best_step, result.kept_step, result.best, result.steps) == (best, best, SCORES[best], STEPS)
    assert same(weights(student), at[best])
    assert not same(at[best], at[STEPS])
    assert saved(tmp_path) == [f"step-{best:08d}", "step-00000020"]


def test_where_the_last_is_the_best_nothing_is_put_back(tmp_path):
    rising = {step: float(step) for step in SCORES}
    student, result = trained(tmp_path / "a", hooks=[scripted(rising)], keep_best=Best("score", "max", 4))
    assert (result.best_step, result.kept_step) == (STEPS, None)
    assert same(weights(student), weights(trained(tmp_path / "b")[0]))


def test_no_number_is_never_the_best(tmp_path):
    values = dict.fromkeys(SCORES, float("nan"))
    _, result = trained(tmp_path / "none", hooks=[scripted(values)], keep_best=Best("score", "max", 4))
    assert (result.best_step, result.kept_step) == (None, None)
    _, result = trained(tmp_path / "one", hooks=[scripted(values | {8: -1.0})], keep_best=Best("score", "max", 4))
    assert result.kept_step == 8


@pytest.mark.parametrize("killed", [5, 9, 13, 19])
def test_a_killed_run_hands_on_the_same(tmp_path, killed):
    """Checkpoints of its own besides those for the best: wherever it goes on from, no measure is lost or made twice."""
    arguments = {
        "hooks": [scripted(SCORES)],
        "keep_best": Best("score", "max", 4),
        "cadence": replace(PLAIN, checkpoint_every=6),
    }
    student, result = trained(tmp_path / "whole", **arguments)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trained(tmp_path / "killed", **arguments, batch=stop_at(killed * ACCUMULATE, crash))
    again, resumed = trained(tmp_path / "killed", **arguments)
    assert same(weights(again), weights(student))
    assert replace(resumed, seconds=0) == replace(result, seconds=0)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    # And killed after its last step, before anything was handed on.
    once_more, resumed = trained(tmp_path / "killed", **arguments)
    assert same(weights(once_more), weights(student))
    assert resumed.kept_step == 8


def test_a_best_checkpoint_that_was_damaged_is_not_handed_on(tmp_path):
    def harm(student: Student, step: int) -> dict[str, float]:
        if step == STEPS:
            file = next(path for path in (tmp_path / "checkpoints/step-00000008/state").rglob("*") if path.is_file())
            file.write_bytes(b"")
        return {}

    with pytest.raises(UserError, match=r"best step's checkpoint cannot be used: .* bytes instead of"):
        trained(tmp_path, hooks=[scripted(SCORES), Hook(harm)], keep_best=Best("score", "max", 4))


@pytest.mark.parametrize(
    ("patience", "delta", "ends"),
    [(1, 0.0, 12), (2, 0.0, 16), (3, 0.0, 20), (1, 4.5, 8), (9, 0.0, 20)],
)
def test_training_ends_where_nothing_gets_better(tmp_path, patience, delta, ends):
    values = {0: 1.0, 4: 2.0, 8: 5.0, 12: 4.0, 16: 5.0, 20: 9.0}
    stop = Patience("score", "max", patience, delta)
    if delta:
        values |= {4: 6.0}  # better by 5; then 5.0 is not
    student, result = trained(tmp_path / "early", hooks=[scripted(values)], stop_early=stop)
    assert result.steps == ends
    assert (tmp_path / "early" / "checkpoints" / f"step-{ends:08d}").is_dir(), "a signal there would lose it"
    lines = metrics(tmp_path / "early")
    assert max(line["step"] for line in lines) == ends
    at: dict[int, list[torch.Tensor]] = {}
    trained(tmp_path / "whole", hooks=[Hook(lambda s, step: at.update({step: weights(s)}) or {}, 4)])
    assert same(weights(student), at[ends])


def test_a_killed_run_ends_early_at_the_same_step_and_with_its_best(tmp_path):
    arguments = {
        "hooks": [scripted(SCORES), scripted({s: -v for s, v in SCORES.items()}, "other", 4)],
        "keep_best": Best("score", "max", 4),
        "stop_early": Patience("other", "min", 2),
        "cadence": CADENCE,
    }
    student, result = trained(tmp_path / "whole", **arguments)
    assert (result.steps, result.kept_step, result.stale) == (8, None, 2), "the start has the lowest of all"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trained(tmp_path / "killed", **arguments, batch=stop_at(6 * ACCUMULATE, crash))
    again, resumed = trained(tmp_path / "killed", **arguments)
    assert same(weights(again), weights(student))
    assert replace(resumed, seconds=0) == replace(result, seconds=0)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("killed", [None, 7, 13])
def test_the_last_step_of_a_run_that_ends_early_has_every_measure(tmp_path, killed):
    """In one line, though its pace alone would not have called for it; after a restart too."""
    values = {0: 1.0, 4: 2.0, 8: 5.0, 12: 4.0, 16: 5.0}
    arguments = {
        "evaluate": lambda: {"loss": 1.0},
        "hooks": [scripted(values), Hook(lambda student, step: {"seen": float(step)}, 3)],
        "stop_early": Patience("score", "max", 2),
        "cadence": CADENCE,
    }
    if killed:
        with pytest.raises(RuntimeError, match="pulled the plug"):
            trained(tmp_path, **arguments, batch=stop_at(killed * ACCUMULATE, crash))
    _, result = trained(tmp_path, **arguments)
    lines = [line for line in metrics(tmp_path) if line["kind"] == "eval"]
    assert result.steps == 16
    assert [line["step"] for line in lines if "seen" in line] == [0, 3, 6, 9, 12, 15, 16]
    assert [line["step"] for line in lines if "loss" in line] == [0, 6, 12, 16]
    assert {"loss", "score", "seen"} < lines[-1].keys()
    trained(tmp_path, **arguments)  # finished, and called again
    assert [line for line in metrics(tmp_path) if line["kind"] == "eval"] == lines


def test_what_counts_as_better():
    assert is_better(1.0, None, "max")
    assert not is_better(float("nan"), None, "max")
    assert is_better(2.0, 1.0, "max", 0.5)
    assert not is_better(1.5, 1.0, "max", 0.5)
    assert is_better(1.0, 2.0, "min", 0.5)
    assert not is_better(2.0, 2.0, "min")
