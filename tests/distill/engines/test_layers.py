"""Processes that train layers of their own make what one process makes, number for number."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import convert
from distill.engines.choice import make_engine
from distill.engines.launched import Launched
from distill.engines.layers import LayersEngine
from distill.objective import Objective, Part
from distill.recipe import HiddenStage, MixingStage
from distill.roles import roles
from distill.training import parameter_groups
from distill.training.gradients import Gradients
from stages.hidden import HiddenObjective
from stages.mixing import MixingObjective
from tests.conftest import tiny
from tests.distill.engines.several import several

STEPS, CLIP = 4, 0.05
ROLES = {"mixing": ["mixer"], "hidden": ["mixer"], "hidden block": ["mixer", "mlp", "norms"]}


class Trained(NamedTuple):
    """What a process has after some steps."""

    losses: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]
    engine: type


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(3, 97, (2, 16), generator=generator)
    valid = torch.arange(16) < torch.randint(4, 17, (2, 1), generator=generator)
    position_ids = torch.arange(16).expand(2, 16)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids, "valid": valid}


def objective_of(stage: str, teacher: PreTrainedModel, student: PreTrainedModel) -> Objective:
    if stage == "mixing":
        return MixingObjective(teacher, student, MixingStage(tokens=1000))
    return HiddenObjective(
        teacher, student, HiddenStage(tokens=1000, target="block" if stage == "hidden block" else "mixer")
    )


def train(stage: str, keep: tuple[int, ...], folder: Path, resume: bool, steps: int = STEPS) -> Trained:
    """Some steps of a stage; by layers, wherever there are several processes."""
    torch.manual_seed(0)
    teacher = tiny("llama")
    student = convert(teacher, keep_attention=keep).train()
    groups = parameter_groups(student, roles(student).__getitem__, ROLES[stage], lr=1e-2)
    engine = make_engine(
        student,
        groups,
        Launched("one"),
        torch.device("cpu"),
        layerwise=True,
        by_layers=True,
        accumulate=2,
        clip=CLIP,
    )
    if resume:
        engine.load(folder)
    gradients = Gradients(objective_of(stage, teacher, student), engine, torch.device("cpu"), torch.float32)
    losses, norms = [], []
    for step in range(STEPS * resume, STEPS * resume + steps):
        loss, _ = gradients.backward([batch(2 * step), batch(2 * step + 1)], lambda: False)
        losses.append(loss)
        norms.append(engine.step(CLIP))
    if not resume:
        engine.save(folder)
    engine.settle()
    return Trained(losses, norms, dict(student.named_parameters()), type(engine))


def require_same(got: Trained, expected: Trained) -> None:
    assert got.losses == expected.losses
    assert got.norms == expected.norms
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name


@pytest.mark.parametrize("stage", ROLES)
def test_two_processes_make_what_one_makes(tmp_path, stage):
    one = train(stage, (), tmp_path / "one", resume=False)
    assert min(one.norms) > CLIP  # so that clipping is put to the test
    both = several(2, train, stage, (), tmp_path / "two", False)
    for each in both:
        assert each.engine is LayersEngine
        assert list(each.losses[0]) == ["layers.0", "layers.1", "layers.2"]
        require_same(each, one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mixing", "hidden"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, stage, before, after):
    train(stage, (1,), tmp_path / "one", resume=False)
    expected = train(stage, (1,), tmp_path / "one", resume=True)
    folder = tmp_path / "several"
    for count, resume in ((before, False), (after, True)):
        arguments = stage, (1,), folder, resume
        results = several(count, train, *arguments) if count > 1 else [train(*arguments)]
    for result in results:
        require_same(result, expected)


def test_a_process_without_a_layer_looks_on(tmp_path):
    one = train("hidden", (0, 1), tmp_path / "one", resume=False)
    for each in several(2, train, "hidden", (0, 1), tmp_path / "two", False):
        require_same(each, one)


def unsettled() -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """The parts a process computed, and its student before and after it is made the same everywhere."""
    torch.manual_seed(0)
    student = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})
    groups = [{"params": list(student.parameters()), "lr": 0.1}]
    engine = LayersEngine(student, groups, {name: name[:8] for name, _ in student.named_parameters()})
    x = torch.ones(1, 2)
    parts = [Part(f"layers.{i}", lambda layer=layer: layer(x).sum()) for i, layer in enumerate(student["layers"])]
    losses = engine.backward(lambda: iter(parts), 1.0, last=True)
    computed = [name for name, loss in losses.items() if loss != 0]
    engine.step(None)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    engine.settle()
    return computed, before, dict(student.named_parameters())


def test_each_trains_its_own_until_they_settle():
    (mine, before, settled), (theirs, other_before, other_settled) = several(2, unsettled)
    assert (mine, theirs) == (["layers.0", "layers.2"], ["layers.1"])
    for name, weight in settled.items():
        assert torch.equal(weight, other_settled[name])
        assert not torch.equal(before[name], other_before[name])
        assert torch.equal(weight, (before if name[:8] in mine else other_before)[name])
