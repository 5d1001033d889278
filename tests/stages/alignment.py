"""What tests of objectives share: packed batches, random teachers and students, and layers written out."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import convert
from distill.engines.engine import Groups, Parts
from distill.engines.joint import detached, joint, total
from distill.engines.plain import PlainEngine
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.training import Objective
from distill.within import within
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import tiny

TOKENS = 24
# Lengths of the documents in each row: one, several (one of a single token), and two with padding behind them.
ROWS = ((24,), (9, 1, 14), (7, 11))
SETTINGS = {"tokens": 1000}
OBJECTIVES = {
    "mixing": lambda teacher, student: MixingObjective(teacher, student, MixingStage(**SETTINGS)),
    "hidden": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS)),
    "hidden heads": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS, target="heads")),
    "hidden block": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS, target="block")),
    "logits": lambda teacher, student: LogitObjective(teacher, student, LogitsStage(**SETTINGS)),
    "logits and hidden": lambda teacher, student: LogitObjective(
        teacher, student, LogitsStage(**SETTINGS, hidden_weight=0.3)
    ),
}


def random_teacher(family: str) -> PreTrainedModel:
    model = tiny(family.split()[0])
    if family.endswith("window"):
        model.config.sliding_window = 6
    return model


def showing(teacher: PreTrainedModel) -> PreTrainedModel:
    """The same teacher, which can give its attention matrices."""
    teacher.set_attn_implementation("eager")
    return teacher


def random_student(teacher: PreTrainedModel, **choices: str | int) -> PreTrainedModel:
    """A hybrid whose every parameter is away from the teacher's."""
    made = convert(teacher, keep_attention=[1], **choices).train()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def packed_batch() -> dict[str, Tensor]:
    """Packed documents; as ``distill.data`` makes them, padding is a document of its own."""
    torch.manual_seed(7)
    input_ids = torch.randint(3, 97, (len(ROWS), TOKENS))
    lengths = [(*row, TOKENS - sum(row)) for row in ROWS]
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    valid = torch.stack([torch.arange(TOKENS) < sum(row) for row in ROWS])
    labels = input_ids.masked_fill((position_ids == 0) | ~valid, -100)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "valid": valid}


def documents(batch: dict[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(row, ids (1, L)) of every document, without padding."""
    for row, lengths in enumerate(ROWS):
        for ids in batch["input_ids"][row, : sum(lengths)].split(lengths):
            yield row, ids[None]


def rotation(model: PreTrainedModel, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, as the model's decoder makes them for its layers."""
    return model.model.rotary_emb(torch.zeros(1), positions_BT)


def losses(objective: Objective, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss_sum() for name, loss_sum in objective.parts(batch)}


def close(got: dict[str, Tensor], expected: dict[int, Tensor]) -> None:
    assert list(got) == [f"layers.{index}" for index in expected]
    torch.testing.assert_close(torch.stack(list(got.values())), torch.stack(list(expected.values())))


def head_outputs(attention: nn.Module, u_1TD: Tensor, matrix_HTS: Tensor) -> Tensor:
    v_THP = attention.v_proj(u_1TD)[0].unflatten(-1, (-1, attention.head_dim))
    v_HTP = v_THP.repeat_interleave(len(matrix_HTS) // v_THP.shape[1], dim=1).transpose(0, 1)
    return (matrix_HTS @ v_HTP).transpose(0, 1).flatten(1)[None]


def attention_output(attention: nn.Module, u_1TD: Tensor, matrix_HTS: Tensor) -> Tensor:
    return attention.o_proj(head_outputs(attention, u_1TD, matrix_HTS))


def rest_of_block(layer: nn.Module, residual: Tensor) -> Tensor:
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


class JointEngine(PlainEngine):
    """In one process what DDP, FSDP2 and ZeRO do: the whole loss in one forward of the student, then backward."""

    def __init__(self, student: PreTrainedModel, groups: Groups, layerwise: bool) -> None:
        super().__init__(student, groups)
        self.layerwise = layerwise

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        losses = within(self.student, joint, parts, recompute=self.layerwise)
        total(losses, scale).backward()
        return detached(losses)
