"""The loop on two real processes: one run, whoever of them is asked to stop, fails, or was not there before."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CADENCE, STEPS, Student, crash, metrics, micro_batch, run, saved, stop_at, train_lines
from torch import Tensor, nn

from distill.engines import processes
from distill.engines.ddp import DdpEngine
from distill.engines.layers import LayersEngine
from distill.errors import UserError
from distill.training import Best, Hook, NonFiniteLoss, TrainResult, checkpoint
from tests.distill.engines.several import several


def ddp(student: Student, groups: Any) -> DdpEngine:
    return DdpEngine(student, groups, layerwise=True, device=torch.device("cpu"))


def by_layers(student: Student, groups: Any) -> LayersEngine:
    return LayersEngine(
        student, groups, {name: ".".join(name.split(".")[:2]) for name, _ in student.named_parameters()}
    )


ONE_EACH = partial(micro_batch, sequences=1)


def quiet(**changed: Any) -> dict[str, Any]:
    """A run without chance in it, whose numbers do not depend on who computes what."""
    torch.manual_seed(0)
    return {"student": Student(dropout=0.0), "noise": 0.0, "batch": ONE_EACH} | changed


def require_close(folder: Path, expected: Path) -> None:
    for got, wanted in zip(train_lines(folder), train_lines(expected), strict=True):
        assert got["tokens"] == wanted["tokens"]
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def shared(folder: Path, accumulate: int) -> tuple[TrainResult, list[int]]:
    asked: list[int] = []

    def batch(number: int) -> dict[str, Tensor]:
        asked.append(number)
        return ONE_EACH(number)

    return run(folder, make_engine=ddp, **quiet(accumulate=accumulate, batch=batch)), asked


def test_two_processes_make_the_steps_of_one(tmp_path):
    run(tmp_path / "one", **quiet(accumulate=4))
    (result, first), (same, second) = several(2, shared, tmp_path / "two", 2)
    assert first == list(range(0, 4 * STEPS, 2))
    assert second == list(range(1, 4 * STEPS, 2))
    assert replace(result, seconds=0) == replace(same, seconds=0)
    require_close(tmp_path / "two", tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"metrics.jsonl", "checkpoints"}


def layers_apart(folder: Path, changed: dict[str, Any]) -> list[Tensor]:
    arguments = quiet(**changed)
    run(folder, make_engine=by_layers, **arguments)
    return list(arguments["student"].parameters())


@pytest.mark.parametrize("changed", [{}, {"evaluate": None}], ids=["", "without evaluations"])
def test_layers_on_two_processes_make_the_very_numbers_of_one(tmp_path, changed):
    arguments = quiet(**changed)
    run(tmp_path / "one", **arguments)
    for weights in several(2, layers_apart, tmp_path / "two", changed):
        assert all(map(torch.equal, weights, arguments["student"].parameters()))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


def best_apart_at_one_rate(folder: Path) -> tuple[TrainResult, list[Tensor]]:
    hooks = [Hook(lambda student, step: {"score": -abs(step - 8.0)}, 4)]
    arguments = quiet(evaluate=None, schedule=lambda step: 1.0, hooks=hooks)
    result = run(folder, make_engine=by_layers, keep_best=Best("score", "max", 4), **arguments)
    return result, list(arguments["student"].parameters())


def test_layers_on_two_processes_go_back_to_the_best_step_of_all(tmp_path):
    """Each process trained its own layers: after going back all must hold all of them."""
    until_then = quiet(evaluate=None, schedule=lambda step: 1.0, steps=8)
    run(tmp_path / "one", **until_then)
    for result, weights in several(2, best_apart_at_one_rate, tmp_path / "two"):
        assert (result.steps, result.kept_step) == (STEPS, 8)
        assert all(map(torch.equal, weights, until_then["student"].parameters()))


NO_EVALUATION_BETWEEN = replace(CADENCE, eval_every=None)


def noisy(folder: Path, crash_at: int | None, seed: int) -> None:
    """Each process draws its own dropout and jitter."""
    batch = micro_batch if crash_at is None else stop_at(2 * crash_at + processes.rank(), crash)
    run(folder, make_engine=ddp, seed=seed + processes.rank(), batch=batch, accumulate=1, cadence=NO_EVALUATION_BETWEEN)


def crashed_noisily(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        noisy(folder, 9, 0)


@pytest.mark.slow
def test_a_crashed_run_goes_on_exactly_with_the_generators_of_each_process(tmp_path):
    several(2, noisy, tmp_path / "whole", None, 0)
    several(2, crashed_noisily, tmp_path / "crashed")
    assert saved(tmp_path / "crashed") == ["step-00000004", "step-00000008"]
    several(2, noisy, tmp_path / "crashed", None, 99)
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")


def crashed_quietly(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(folder, make_engine=ddp, **quiet(accumulate=2, batch=stop_at(4 * 9 + processes.rank(), crash, ONE_EACH)))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    run(tmp_path / "whole", **quiet(accumulate=4))
    several(2, crashed_quietly, tmp_path / "fewer")
    run(tmp_path / "fewer", **quiet(accumulate=4))
    require_close(tmp_path / "fewer", tmp_path / "whole")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path / "more", **quiet(accumulate=4, batch=stop_at(4 * 9, crash, ONE_EACH)))
    several(2, shared, tmp_path / "more", 2)
    require_close(tmp_path / "more", tmp_path / "whole")


def refused(folder: Path) -> tuple[str, bool]:
    with pytest.raises(UserError) as other_settings:
        run(folder, make_engine=ddp, **quiet(accumulate=2, clip=9.0))
    return str(other_settings.value), other_settings.value.everyones


def test_all_refuse_the_checkpoints_of_other_settings(tmp_path):
    run(tmp_path, **quiet(accumulate=4))
    (message, everyones), other = several(2, refused, tmp_path)
    assert "was made with other settings: clip changed" in message
    assert everyones
    assert other == (message, True)


def ends_with(program: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as stopped:
        program()
    return stopped.value.code


def asked_to_stop(folder: Path, rank: int, number: signal.Signals) -> object:
    def ask() -> None:
        if processes.rank() == rank:
            os.kill(os.getpid(), number)

    return ends_with(
        lambda: run(
            folder, make_engine=ddp, **quiet(accumulate=2, batch=stop_at(4 * 6 + processes.rank(), ask, ONE_EACH))
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number", "code"), [(1, signal.SIGTERM, 143), (0, signal.SIGHUP, 129)])
def test_all_stop_when_one_is_asked_to(tmp_path, rank, number, code):
    assert several(2, asked_to_stop, tmp_path, rank, number) == [code, code]
    assert saved(tmp_path) == ["step-00000004", "step-00000007"]
    several(2, shared, tmp_path, 2)
    run(tmp_path / "whole", **quiet(accumulate=4))
    require_close(tmp_path, tmp_path / "whole")


class Poison(nn.Module):
    """On one process, a layer whose output is not finite from its ``at``-th call on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (self.weight * math.nan if self.calls >= self.at and processes.rank() == 1 else self.weight)


def poisoned(folder: Path) -> str:
    arguments = quiet(accumulate=1)
    arguments["student"].layers[1][1] = Poison(at=2 * 6 + 1)  # every step calls it twice: part by part, recomputed
    with pytest.raises(NonFiniteLoss) as failed:
        run(folder, make_engine=ddp, **arguments)
    return str(failed.value)


def test_a_loss_that_is_not_finite_on_one_process_is_found_there(tmp_path):
    messages = several(2, poisoned, tmp_path)
    assert messages[0] == messages[1]
    assert "the loss of layers.1 is not finite at step 7" in messages[0]
    assert "It began at the output of layers.1.1 on process 1." in messages[0]
    assert saved(tmp_path) == ["step-00000004"]


def without_a_token(folder: Path, rank: int | None) -> str:
    """No process has a token to learn from, or one has not."""

    def batch(number: int) -> dict[str, Tensor]:
        made = micro_batch(number)
        empty = rank in (None, processes.rank())
        return made | {"valid": torch.zeros_like(made["valid"])} if empty else made

    try:
        run(folder, make_engine=ddp, **quiet(batch=batch, steps=2))
    except UserError as error:
        return str(error)
    return "trained"


def test_a_step_needs_a_token_on_any_process(tmp_path):
    assert several(2, without_a_token, tmp_path / "some", 1) == ["trained"] * 2
    for said in several(2, without_a_token, tmp_path / "none", None):
        assert "no token to learn from" in said


def on_a_full_disk(folder: Path, rank: int) -> tuple[str, bool]:
    """The second checkpoint finds a full disk on one process."""
    fsync = os.fsync

    def full(handle: int) -> None:
        if processes.rank() == rank and (folder / "checkpoints/.step-00000008.partial").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    os.fsync = full
    try:
        run(folder, make_engine=ddp, **quiet(accumulate=2))
    except UserError as error:
        return str(error), error.everyones
    return "trained", False


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_is_full_for_all(tmp_path, rank):
    (first, everyones), other = several(2, on_a_full_disk, tmp_path, rank)
    assert other == (first, everyones) == (first, True)
    assert "step-00000008: the disk is full. Writing it needs" in first
    assert saved(tmp_path) == ["step-00000004"]
    several(2, shared, tmp_path, 2)
    run(tmp_path / "whole", **quiet(accumulate=4))
    require_close(tmp_path, tmp_path / "whole")


def found(folder: Path) -> tuple[int | None, str | None]:
    """The newest intact checkpoint, and what is wrong with the newest of all."""
    damage = checkpoint.damage_of(checkpoint.newest_path(folder))
    newest = checkpoint.newest(folder)
    return newest and newest.step, damage


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:refused a damaged")
def test_what_one_process_finds_damaged_all_refuse(tmp_path):
    several(2, shared, tmp_path, 2)
    folder = tmp_path / "checkpoints"
    assert several(2, found, folder) == [(STEPS, None)] * 2
    newest = checkpoint.newest_path(folder)
    for name in checkpoint_files(newest):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        results = several(2, found, folder)
        assert results[0] == results[1]
        step, damage = results[0]
        assert step == 16
        assert damage.startswith(f"{newest / name} was changed")
        (newest / name).write_bytes(content)


def hide(hidden: dict[int, str], looks: float = math.inf) -> None:
    """Let a process not see a file, as on a network file system, until it has looked for it so often."""
    name, is_file, rglob = hidden.get(processes.rank()), Path.is_file, Path.rglob

    def sees(self: Path) -> bool:
        nonlocal looks
        if self.name == name and looks > 0:
            looks -= 1
            return False
        return is_file(self)

    Path.is_file = sees
    Path.rglob = lambda self, pattern: (path for path in rglob(self, pattern) if path.name != name or looks <= 0)


def written_under_views(folder: Path, hidden: dict[int, str]) -> None:
    def write_state(state: Path) -> None:
        state.mkdir(exist_ok=True)
        (state / f"part-{processes.rank()}").write_text("weights")

    hide(hidden)
    checkpoint.save(folder, 1, write_state, {}, keep=1)


VIEWS: dict[str, dict[int, str]] = {
    "the main process": {0: "part-1"},
    "another one": {1: "rng-00000.pt"},
    "both": {0: "rng-00001.pt", 1: "part-0"},
}


@pytest.mark.parametrize("who", VIEWS)
def test_the_manifest_has_every_file_whoever_does_not_see_it_yet(tmp_path, who):
    several(2, written_under_views, tmp_path, VIEWS[who])
    saved = tmp_path / "step-00000001"
    names = checkpoint_files(saved)
    assert {"state/part-0", "state/part-1"} < {*names}
    assert sorted(json.loads((saved / "manifest.json").read_text())["files"]) == names
    assert checkpoint.damage_of(saved) is None


def found_under_views(folder: Path, hidden: str, looks: float) -> str | None:
    checkpoint.VIEW = 60.0 if math.isfinite(looks) else 0.2
    hide({1: hidden}, looks)
    return checkpoint.damage_of(folder)


@pytest.mark.parametrize("hidden", ["manifest.json", "loop.json", "rng-00001.pt", "part-0"])
def test_what_shows_late_is_waited_for(tmp_path, hidden):
    several(2, written_under_views, tmp_path, {})
    assert several(2, found_under_views, tmp_path / "step-00000001", hidden, 3) == [None] * 2


def test_what_one_process_never_sees_is_named(tmp_path):
    several(2, written_under_views, tmp_path, {})
    saved = tmp_path / "step-00000001"
    first, second = several(2, found_under_views, saved, "rng-00001.pt", math.inf)
    assert first == second
    assert first.startswith(f"{saved / 'rng-00001.pt'} is there for the main process and not for process 1")


def checkpoint_files(folder: Path) -> list[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert {"rng-00000.pt", "rng-00001.pt", "loop.json"} < names
    return sorted(names)
