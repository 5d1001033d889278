"""Stage 3: the whole student is matched to its teacher's next-token distributions (Hinton et al., arXiv 1503.02531).

    python -m stages.logits recipes/quickstart.yaml

min (1 − w) τ² D(teacher ‖ student at temperature τ) + w CE(text), a mean over scored tokens, where D is forward KL,
reverse KL or the Jensen-Shannon divergence.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.handover import StageRecord
from distill.objectives import logit_loss, scored_positions
from distill.recipe import LogitsStage
from distill.run import Run, train_stage
from distill.training import Batch, Part
from stages.command import run_program


class LogitObjective:
    """The divergence between the two models' predictions; a mean over scored tokens."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: LogitsStage) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings

    def weight(self, batch: Batch) -> float:
        """Positions whose next token is in the same document."""
        return float(scored_positions(batch["labels"]).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One part: nothing of an end-to-end loss can be freed early."""
        with torch.no_grad():
            teacher_BTV = _logits(self.teacher, batch)
        loss_sum = logit_loss(
            _logits(self.student, batch),
            teacher_BTV,
            batch["labels"],
            divergence=self.settings.divergence,
            temperature=self.settings.temperature,
            ce_weight=self.settings.ce_weight,
            reduction="sum",
        )
        yield Part("logits", loss_sum)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    # use_cache=False and no mask: only so do attention layers keep packed documents apart.
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def main(run: Run) -> StageRecord:
    return train_stage(run, "logits", LogitObjective)


if __name__ == "__main__":
    run_program(main, "Stage 3: match the student's next-token distributions to its teacher's.")
