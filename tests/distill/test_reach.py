"""What a stage's loss reaches, by the gradients that it really has."""

import pytest
import torch
from transformers import PreTrainedModel

from distill import convert
from distill.mixers import MIXERS
from distill.objective import Objective
from distill.reach import reached, trained
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Stage
from distill.student import mixers_of
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import FAMILIES, tiny

STAGES: dict[str, tuple[Stage, type]] = {
    "mixing": (MixingStage(tokens=1000), MixingObjective),
    "hidden": (HiddenStage(tokens=1000), HiddenObjective),
    "hidden heads": (HiddenStage(tokens=1000, target="heads"), HiddenObjective),
    "hidden block": (HiddenStage(tokens=1000, target="block", train=("mixer", "mlp", "norms")), HiddenObjective),
    "logits": (LogitsStage(tokens=1000), LogitObjective),
    "logits and hidden": (LogitsStage(tokens=1000, hidden_weight=0.5), LogitObjective),
}


@pytest.fixture(params=sorted(MIXERS))
def student(request, family) -> PreTrainedModel:
    return convert(tiny(family), mixer=request.param, keep_attention=[1]).train()


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def with_gradient(student: PreTrainedModel, objective: Objective) -> set[str]:
    """Names of the parameters in whose gradient anything is not zero."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, 97, (2, 12))
    position_ids = torch.arange(12).expand(2, 12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids, "valid": valid}
    sum(part.loss_sum() for part in objective.parts(batch)).backward()
    return {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reaches_what_has_a_gradient(family, student, stage):
    settings, objective = STAGES[stage]
    if stage == "mixing" and mixers_of(student)[0].without_factors:
        pytest.skip("the recipe is refused")
    torch.manual_seed(2)
    with torch.no_grad():  # at the start of conversion some gradients are zero, such as a closed tap's
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student.requires_grad_(True)
    assert with_gradient(student, objective(tiny(family), student, settings)) == reached(student, settings)


def test_only_named_roles_within_reach_train(student):
    settings, _ = STAGES["hidden block"]
    by_layer = {name.split("layers.")[1][0] for name in trained(student, settings)}
    assert by_layer == {"0", "2"}
    only_mlp = trained(student, settings.model_copy(update={"train": ("mlp",)}))
    assert only_mlp
    assert all(".mlp." in name for name in only_mlp)
