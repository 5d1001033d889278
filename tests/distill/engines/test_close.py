"""What an engine leaves behind: of a stage that is over nothing, of a step that is given up no changed weight."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from distill import convert
from distill.engines import zero
from distill.engines.choice import make_engine
from distill.engines.launched import Launched
from distill.engines.placement import place_student, place_teacher
from distill.recipe import LogitsStage
from distill.roles import roles
from distill.training import checkpoint, parameter_groups
from distill.training.gradients import Gradients
from stages.logits import LogitObjective
from tests.conftest import tiny
from tests.distill.engines.several import several
from tests.distill.engines.test_same_steps import batch
from tests.distill.engines.test_same_steps import whole as whole_shards

CPU = torch.device("cpu")
ENGINES = {
    "one": Launched("one"),
    "ddp": Launched("ddp"),
    "fsdp2": Launched("fsdp2", {"reshard_after_forward": True}),
    "zero1": Launched("zero1", {"zero_optimization": {"stage": 1}}),
    "zero2": Launched("zero2", {"zero_optimization": {"stage": 2}}),
    "zero3": Launched("zero3", {"zero_optimization": {"stage": 3}}),
}


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole weight, wherever it lies."""
    if hasattr(parameter, "ds_id"):
        with zero.whole([parameter]):
            return parameter.detach().clone()
    return whole_shards(parameter)


def what_lives_on(kind: str, folder: Path) -> list[str]:
    """What is still there after a stage of two steps, and after an evaluation, when nobody asks for it any more."""
    launched = ENGINES[kind]
    teacher = place_teacher(str(folder / "teacher"), torch.float32, launched, CPU)

    def train() -> dict[str, weakref.ref]:
        student = place_student(folder / "student", launched, CPU).train()
        groups = parameter_groups(student, roles(student).__getitem__, None, lr=1e-3)
        objective = LogitObjective(teacher, student, LogitsStage(tokens=1000))
        engine = make_engine(student, groups, launched, CPU, layerwise=False, by_layers=False, accumulate=2, clip=1.0)
        gradients = Gradients(objective, engine, CPU, torch.float32)
        for step in range(2):
            gradients.backward([batch(2 * step), batch(2 * step + 1)], lambda: False)
            engine.step(1.0)
        engine.settle()
        engine.close()
        weight = next(student.parameters())
        return {
            "student": weakref.ref(student),
            "a weight": weakref.ref(weight),
            "optimizer": weakref.ref(engine.optimizer),
        }

    def measure() -> dict[str, weakref.ref]:
        student = place_student(folder / "student", launched, CPU, frozen=True)
        with torch.no_grad():
            student(**{name: batch(0)[name] for name in ("input_ids", "position_ids")})
        return {"measured student": weakref.ref(student)}

    held = train() | measure()
    gc.collect()
    return [name for name, found in held.items() if found() is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_of_a_stage_stays_in_memory(kind, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", keep_attention=[1]).save_pretrained(tmp_path / "student")
    for lives_on in several(1 if kind == "one" else 2, what_lives_on, kind, tmp_path):
        assert lives_on == []


def weights_after_a_search(kind: str, folder: Path) -> bool:
    """Whether a step that is given up after its losses, and computed again to see what was wrong, moves any weight."""
    launched = ENGINES[kind]
    teacher = place_teacher(str(folder / "teacher"), torch.float32, launched, CPU)
    student = place_student(folder / "student", launched, CPU).train()
    before = [whole(parameter) for parameter in student.parameters()]
    groups = parameter_groups(student, roles(student).__getitem__, None, lr=1e-3)
    objective = LogitObjective(teacher, student, LogitsStage(tokens=1000))
    engine = make_engine(student, groups, launched, CPU, layerwise=False, by_layers=False, accumulate=2, clip=1.0)
    gradients, batches = Gradients(objective, engine, CPU, torch.float32), [batch(0), batch(1)]
    gradients.backward(batches, lambda: False)
    gradients.origin_of_nonfinite(student, batches, checkpoint.rng_state())
    return any(not torch.equal(whole(p), held) for p, held in zip(student.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ENGINES if kind != "one"])
def test_looking_for_what_was_wrong_moves_no_weight(kind, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", keep_attention=[1]).save_pretrained(tmp_path / "student")
    assert several(2, weights_after_a_search, kind, tmp_path) == [False, False]
