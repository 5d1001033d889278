"""Every engine makes the steps that one process makes, on what the stages minimise."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill import convert, load_student
from distill.engines import processes
from distill.engines.choice import make_engine
from distill.engines.launched import Launched
from distill.engines.placement import place_student, place_teacher
from distill.mixers import MIXERS
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.roles import roles
from distill.student import mixers_of
from distill.training import parameter_groups
from distill.training.gradients import Gradients
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import tiny
from tests.distill.engines.several import several

STEPS, MICRO_BATCHES, CLIP = 3, 4, 0.05
CPU = torch.device("cpu")
ENGINES = {
    "one": Launched("one"),
    "ddp": Launched("ddp"),
    "fsdp2": Launched("fsdp2", {"reshard_after_forward": True}),
}
OBJECTIVES: dict[str, tuple[list[str] | None, Any]] = {
    "mixing": (["mixer"], lambda teacher, student: MixingObjective(teacher, student, MixingStage(tokens=1000))),
    "hidden": (["mixer"], lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(tokens=1000))),
    "hidden block": (
        ["mixer", "mlp", "norms"],
        lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(tokens=1000, target="block")),
    ),
    "logits": (None, lambda teacher, student: LogitObjective(teacher, student, LogitsStage(tokens=1000))),
}


class Trained(NamedTuple):
    """What a process has after some steps."""

    losses: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]
    logits: Tensor


def batch(number: int) -> dict[str, Tensor]:
    """Packed documents with padding, of another length in every batch."""
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(3, 97, (2, 16), generator=generator)
    valid = torch.arange(16) < torch.randint(4, 17, (2, 1), generator=generator)
    position_ids = torch.cat([torch.arange(5), torch.arange(11)]).expand(2, 16)
    labels = input_ids.masked_fill((position_ids == 0) | ~valid, -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "valid": valid}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(kind: str, stage: str, folder: Path) -> Trained:
    """Some steps on the models in ``folder``, each of the same micro-batches, shared out among the processes."""
    launched = ENGINES[kind]
    teacher = place_teacher(str(folder / "teacher"), torch.float32, launched, CPU)
    student: PreTrainedModel = place_student(folder / "student", launched, CPU).train()
    trained, make_objective = OBJECTIVES[stage]
    groups = parameter_groups(student, roles(student).__getitem__, trained, lr=1e-3)
    objective = make_objective(teacher, student)
    accumulate = MICRO_BATCHES // processes.world()
    engine = make_engine(
        student,
        groups,
        launched,
        CPU,
        layerwise=objective.layerwise,
        by_layers=False,
        accumulate=accumulate,
        clip=CLIP,
    )
    gradients = Gradients(objective, engine, CPU, torch.float32)
    losses, norms = [], []
    for step in range(STEPS):
        first = step * MICRO_BATCHES + engine.data_rank
        batches = [batch(first + index * engine.data_ranks) for index in range(accumulate)]
        losses.append(gradients.backward(batches, lambda: False)[0])
        norms.append(engine.step(CLIP))
    student.eval()
    with torch.no_grad():
        logits = student(torch.arange(3, 23)[None]).logits
    return Trained(losses, norms, {name: whole(p) for name, p in student.named_parameters()}, logits)


@pytest.fixture(scope="module", params=sorted(MIXERS))
def models(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny("llama").save_pretrained(folder / "teacher")
    convert(folder / "teacher", mixer=request.param, keep_attention=[1]).save_pretrained(folder / "student")
    return folder


def mixer_of(models: Path):
    return next(iter(mixers_of(load_student(models / "student")).values()))


@pytest.mark.slow
@pytest.mark.parametrize("stage", OBJECTIVES)
def test_two_processes_make_the_steps_of_one(models, stage):
    if stage == "mixing" and (reason := mixer_of(models).without_factors):
        pytest.skip(f"no such stage for it: {reason}")
    one = train("one", stage, models)
    assert min(one.norms) > CLIP  # so that clipping is put to the test
    start = dict(load_student(models / "student").named_parameters())
    for kind in ("ddp", "fsdp2"):
        results = several(2, train, kind, stage, models)
        for each in results:
            assert (each.losses, each.norms) == (results[0].losses, results[0].norms)
            for got, expected in zip(each.losses, one.losses, strict=True):
                assert got == pytest.approx(expected, rel=1e-4)
            assert each.norms == pytest.approx(one.norms, rel=1e-3)
            for name, weight in one.weights.items():
                # Of gradients next to nothing AdamW takes the sign, which is not the same in every order of summing.
                moved, apart = (weight - start[name]).norm(), (each.weights[name] - weight).norm()
                assert apart <= 0.02 * moved, (kind, name)
            torch.testing.assert_close(each.logits, one.logits, rtol=1e-3, atol=1e-3)
