"""A teacher beside the data, so that tuning does not forget what the data does not say.

    loss = (1 − w) · CE(data) + w · τ² · D(teacher ‖ student at temperature τ)

Both sums run over the same tokens, the ones that are scored; D is forward KL, reverse KL or the Jensen-Shannon
divergence (``distill.objectives.logits``). Where both models have a plain head, all logits are made a chunk at a time
(``distill.objectives.chunked``). Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282) keeps a network's
old answers in this way, on the new data alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.finetuning.recipe import Guidance
from distill.head import ModelHead, head_of
from distill.objectives import logit_loss, scored_positions
from distill.objectives.logits import next_labels
from distill.objectives.through_head import logit_loss_through_heads
from distill.student import load_model
from distill.vision import trunk_of


@dataclass(frozen=True)
class Guide:
    """A frozen teacher in evaluation mode, and what it is asked for.

    Attributes:
        heads: of student and teacher; None where a model's logits come about in another way.
    """

    teacher: PreTrainedModel
    heads: tuple[ModelHead | None, ModelHead | None]
    asked: Guidance

    def loss_sum(self, student: Any, inputs: dict[str, Any], labels_BT: Tensor) -> Tensor:
        """Summed over scored tokens; a scalar in fp32 (fp64 for fp64 models).

        Args:
            student: without a wrapper of adapters, which are inside its layers.
            inputs: what both models are called with: ids, and positions of packed rows or a mask.
            labels_BT: (B, T) int64, unshifted, -100 where a token is not scored.
        """
        settings: dict[str, Any] = {
            "divergence": self.asked.divergence,
            "temperature": self.asked.temperature,
            "ce_weight": 1 - self.asked.weight,
            "reduction": "sum",
        }
        of_student, of_teacher = self.heads
        if of_student is None or of_teacher is None:
            with torch.no_grad():
                teacher_BTV = self.teacher(**inputs, use_cache=False).logits
            return logit_loss(student(**inputs, use_cache=False).logits, teacher_BTV, labels_BT, **settings)
        scored_BT = scored_positions(labels_BT)
        with torch.no_grad():
            teacher_ND = _final_states(self.teacher, inputs)[scored_BT]
        student_ND = _final_states(student, inputs)[scored_BT]
        target_N = next_labels(labels_BT)[scored_BT]
        return logit_loss_through_heads(
            student_ND, of_student.whole(), teacher_ND, of_teacher.whole(), target_N, **settings
        )


def guide_of(asked: Guidance, student: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Guide:
    """Load the teacher, in the precision that is computed in.

    Args:
        student: as ``Guide.loss_sum`` is given it, before a trainer has changed its forward.
    """
    teacher: Any = load_model(Path(asked.path).expanduser(), dtype=dtype)
    teacher = teacher.to(device).eval().requires_grad_(False)
    return Guide(teacher, (head_of(student), head_of(teacher)), asked)


def _final_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    return trunk_of(model)(**inputs, use_cache=False).last_hidden_state
