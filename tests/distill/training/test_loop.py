"""The loop beside a few plain lines of torch, and what it promises on the way."""

import errno
import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_run import (
    ACCUMULATE,
    CADENCE,
    STEPS,
    TOKENS,
    Alignment,
    Student,
    crash,
    groups_of,
    metrics,
    micro_batch,
    run,
    saved,
    stop_at,
    train_lines,
)
from torch import nn

from distill.engines import training_state
from distill.errors import UserError
from distill.objectives import hidden_distance
from distill.training import NonFiniteLoss, Part, checkpoint, schedule


def test_it_equals_a_few_lines_of_torch(tmp_path):
    student = Student(dropout=0.0)
    plain = Student(dropout=0.0)
    plain.load_state_dict(student.state_dict())
    run(tmp_path, student=student, noise=0.0)

    optimizer = torch.optim.AdamW(groups_of(plain, lr=0.01))
    for step, line in enumerate(train_lines(tmp_path)):
        batches = [micro_batch(step * ACCUMULATE + i) for i in range(ACCUMULATE)]
        ids, valid = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "valid"))
        inputs = plain.embed(ids)
        loss = sum(hidden_distance(layer(inputs), inputs.flip(-1), valid) for layer in plain.layers)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        factor = schedule(step, STEPS, "wsd", 0.2, 0.2)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.step()
        assert line["step"] == step + 1
        assert line["tokens"] == (step + 1) * TOKENS
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert line["lr"] == pytest.approx(0.01 * factor)
    for got, expected in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def whole(step: int) -> dict[str, torch.Tensor]:
    """Four micro-batches of one sequence as one."""
    batches = [micro_batch(4 * step + i, sequences=1) for i in range(4)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


CUTS = {1: whole, 4: partial(micro_batch, sequences=1)}


def run_cut(folder: Path, accumulate: int, **changed) -> None:
    torch.manual_seed(0)
    student = Student(dropout=0.0)
    run(folder, student=student, noise=0, **{"batch": CUTS[accumulate], "accumulate": accumulate} | changed)


def require_close(folder: Path, expected: Path) -> None:
    for got, wanted in zip(train_lines(folder), train_lines(expected), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_how_a_batch_is_cut_up_changes_nothing(tmp_path):
    """Micro-batches have different numbers of valid tokens, so averaging their means would be seen."""
    for accumulate in CUTS:
        run_cut(tmp_path / str(accumulate), accumulate)
    require_close(tmp_path / "1", tmp_path / "4")


def test_the_result_and_the_lines_agree(tmp_path):
    result = run(tmp_path)
    lines = train_lines(tmp_path)
    assert (result.loss_start, result.loss_end) == (lines[0]["loss"], lines[-1]["loss"])
    assert (result.steps, result.tokens) == (STEPS, STEPS * TOKENS)
    assert result.loss_end < result.loss_start
    assert result.seconds > 0
    assert all(sum(line["parts"].values()) == line["loss"] for line in lines)
    assert lines[0]["parts"].keys() == {"layers.0", "layers.1"}
    timed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open() if "train" in line]
    assert all(line["tokens_per_second"] > 0 and line["cpu_seconds"] >= 0 for line in timed)


def test_an_objective_is_told_how_far_training_is_also_after_an_interruption(tmp_path):
    told: list[float] = []

    class Told(Alignment):
        def begin(self, done):
            told.append(done)

    torch.manual_seed(0)
    student = Student()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path, student=student, objective=Told(student, 1.0), batch=stop_at(6 * ACCUMULATE, crash))
    assert told == [step / STEPS for step in range(6)]
    run(tmp_path, student=student, objective=Told(student, 1.0))
    assert told[6:] == [step / STEPS for step in range(4, STEPS)]  # from the checkpoint on


def test_each_part_is_sent_backward_before_the_next_is_computed(tmp_path):
    student = Student()

    class InOrder:
        layerwise = True

        def begin(self, done):
            pass

        def weight(self, batch):
            return 1.0

        def parts(self, batch):
            for index, layer in enumerate(student.layers):
                assert not torch.is_autocast_enabled("cpu")  # the teacher's part, in its own precision
                inputs = student.embed(batch["input_ids"]).detach()
                assert layer[0].weight.grad is None
                yield Part(f"layers.{index}", partial(self.loss_sum, layer, inputs))
                assert layer[0].weight.grad is not None

        def loss_sum(self, layer, inputs):
            assert torch.is_autocast_enabled("cpu")
            output = layer(inputs)
            assert output.dtype == torch.bfloat16
            output.register_hook(lambda grad: outside.append(not torch.is_autocast_enabled("cpu")))
            return output.float().square().sum()

    outside: list[bool] = []
    run(tmp_path, student=student, objective=InOrder(), accumulate=1, steps=2, precision=torch.bfloat16)
    assert outside == [True] * 4
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


def test_frozen_weights_neither_change_nor_are_saved(tmp_path):
    student = Student()
    before = student.embed.weight.clone()
    run(tmp_path, student=student)
    assert torch.equal(student.embed.weight, before)
    weights = training_state.read_weights(checkpoint.newest(tmp_path / "checkpoints").folder / "state")
    assert weights.keys() == {name for name, _ in student.named_parameters()} - {"embed.weight"}


@pytest.mark.parametrize(("every", "expected"), [(None, [0, STEPS]), (6, [0, 6, 12, 18, STEPS])])
def test_it_evaluates_at_both_ends_and_every_so_often(tmp_path, every, expected):
    student = Student()
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append((student.layers[0].training, torch.is_grad_enabled()))
        return {"perplexity": 3.0}

    run(tmp_path, student=student, evaluate=evaluate, cadence=replace(CADENCE, eval_every=every))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == expected
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[0] == {"kind": "eval", "step": 0, "tokens": 0, "perplexity": 3.0}
    assert seen == [(False, False)] * len(expected)
    assert student.training


def test_without_evaluation_there_are_only_train_lines(tmp_path):
    run(tmp_path, evaluate=None)
    assert len(metrics(tmp_path)) == len(train_lines(tmp_path)) == STEPS


@pytest.mark.parametrize("step", [0, 3, 4, 11, 19])
def test_a_crashed_run_goes_on_exactly(tmp_path, step):
    run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path / "crashed", batch=stop_at(ACCUMULATE * step + 1, crash))
    # Another seed at the restart: what counts is in the checkpoint, if there is one yet.
    result = run(tmp_path / "crashed", seed=0 if step < 4 else 99)
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")
    assert result.loss_start == train_lines(tmp_path / "whole")[0]["loss"]


def test_a_finished_run_is_not_run_again(tmp_path):
    student = Student()
    result = run(tmp_path, student=student)
    before = metrics(tmp_path)
    again = Student()
    assert run(tmp_path, student=again, batch=stop_at(0, crash)) == result
    assert metrics(tmp_path) == before
    assert torch.equal(again.layers[1][0].weight, student.layers[1][0].weight)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 30}, "schedule, steps changed"),
        ({"lr": 0.02}, "lr of group rest, lr of group rest, no decay changed"),
        ({"clip": 1.0, "tokens_per_step": 99}, "settings: clip, tokens per step changed"),
        ({"clip": 1.0, "accumulate": 4}, "settings: clip changed"),
        ({"origin": {"the text": "abc"}}, "the text changed"),
        ({"student": Student(width=8)}, "parameters of group rest.* changed"),
    ],
)
def test_other_settings_do_not_continue_an_old_run(tmp_path, changed, named):
    run(tmp_path)
    before = saved(tmp_path)
    with pytest.raises(UserError, match=named):
        run(tmp_path, **changed)
    assert saved(tmp_path) == before


def test_a_run_goes_on_with_another_cut(tmp_path):
    """As it would on another number of processes."""
    run_cut(tmp_path / "whole", 1)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_cut(tmp_path / "changed", 4, batch=stop_at(4 * 9, crash, CUTS[4]))
    run_cut(tmp_path / "changed", 1)
    require_close(tmp_path / "changed", tmp_path / "whole")


class Poison(nn.Module):
    """A layer whose output, or only whose gradient, is not finite from its ``at``-th call on."""

    def __init__(self, at: int, poison: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.at, self.poison, self.calls = at, poison, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls < self.at:
            return x + self.weight
        return x + (self.weight * math.nan if self.poison == "output" else self.weight.sqrt())


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        ("output", "the loss of layers.1 is not finite at step 7. It began at the output of layers.1.1."),
        ("gradient", "the gradient is not finite at step 7. It began at the gradient of layers.1.1.weight."),
    ],
)
def test_a_non_finite_step_names_its_origin_and_changes_nothing(tmp_path, poison, said):
    student = Student()
    student.layers[1][1] = Poison(at=6 * ACCUMULATE + 1, poison=poison)
    after: list[dict] = []
    grab = stop_at(6 * ACCUMULATE, lambda: after.append({k: v.clone() for k, v in student.state_dict().items()}))
    if poison == "gradient":
        student.layers[1][1].weight.register_hook(lambda grad: grad if student.layers[1][1].calls > 12 else grad * 0)
    with pytest.raises(NonFiniteLoss) as failed:
        run(tmp_path, student=student, batch=grab)
    newest = tmp_path / "checkpoints/step-00000004"
    assert said in str(failed.value)
    assert f"the last good checkpoint is {newest}" in str(failed.value)
    assert (failed.value.step, failed.value.checkpoint) == (7, newest)
    assert failed.value.part == ("layers.1" if poison == "output" else None)
    assert saved(tmp_path) == ["step-00000004"]
    assert [line["step"] for line in train_lines(tmp_path)] == list(range(1, 7))
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, after[0][name]), name


def test_the_origin_is_found_with_the_same_dropout(tmp_path):
    class Unlucky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (torch.rand(()) > 0.04).float()

    student = Student()
    student.layers[1][1] = Unlucky()
    with pytest.raises(NonFiniteLoss, match=r"began at the output of layers\.1\.1"):
        run(tmp_path, student=student)


def test_a_non_finite_first_step_has_no_checkpoint_to_name(tmp_path):
    student = Student()
    student.layers[0][1] = Poison(at=1, poison="output")
    with pytest.raises(NonFiniteLoss, match=r"at step 1.*layers\.0\.1.*there is no checkpoint yet") as failed:
        run(tmp_path, student=student)
    assert isinstance(failed.value, UserError)


def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    fsync = os.fsync

    def full(handle: int) -> None:
        if (tmp_path / "full/checkpoints/.step-00000008.partial").exists():
            raise OSError(errno.ENOSPC, "full")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="step-00000008: the disk is full"):
        run(tmp_path / "full")
    monkeypatch.undo()
    assert saved(tmp_path / "full") == ["step-00000004"]
    run(tmp_path / "full")
    assert metrics(tmp_path / "full") == metrics(tmp_path / "whole")


def test_bf16_weights_and_empty_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"torch.bfloat16: small updates would be rounded away"):
        run(tmp_path, student=Student().bfloat16())
    with pytest.raises(UserError, match="no token to learn from"):
        run(tmp_path, batch=lambda index: micro_batch(index) | {"valid": torch.zeros(3, 8, dtype=torch.bool)})
