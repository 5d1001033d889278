"""A step reads no more values from tensors into Python the more layers it trains: a GPU waits at each of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill import convert
from distill.recipe import HiddenStage, MixingStage
from distill.training import Batch
from stages.hidden import HiddenObjective
from stages.mixing import MixingObjective
from tests.conftest import tiny

OBJECTIVES = {"mixing": (MixingObjective, MixingStage), "hidden": (HiddenObjective, HiddenStage)}


class Waits(TorchDispatchMode):
    """Counts values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def packed() -> Batch:
    """Two documents in the second row, no padding."""
    ids = torch.arange(3, 27).reshape(2, 12)
    positions = torch.stack([torch.arange(12), torch.cat([torch.arange(5), torch.arange(7)])])
    return {"input_ids": ids, "position_ids": positions, "valid": torch.ones(2, 12, dtype=torch.bool)}


def waits(stage: str, keep_attention: list[int]) -> int:
    make_objective, make_settings = OBJECTIVES[stage]
    teacher = tiny("llama")
    objective = make_objective(teacher, convert(teacher, keep_attention=keep_attention), make_settings(tokens=1000))
    batch = packed()
    with Waits() as waited:
        for part in objective.parts(batch):
            part.loss_sum().backward()
    return waited.count


@pytest.mark.parametrize("stage", sorted(OBJECTIVES))
def test_layers_do_not_wait(stage):
    assert waits(stage, []) == waits(stage, [0, 1]) > 0
