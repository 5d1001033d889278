"""Stage 3: the whole student is matched to its teacher's next-token distributions (Hinton et al., arXiv 1503.02531).

    python -m stages.logits recipes/quickstart.yaml

min (1 − w) τ² D(teacher ‖ student at temperature τ) + w CE(text), a mean over scored tokens, where D is forward KL,
reverse KL or the Jensen-Shannon divergence.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.handover import StageRecord
from distill.objectives import logit_loss, scored_positions
from distill.objectives.topk import topk_loss
from distill.recipe import LogitsStage
from distill.run import Run
from distill.teacher_cache import CachedBatches
from distill.teacher_cache.offline import complete_teacher_cache
from distill.train_stage import train_stage
from distill.training import Batch, Part
from stages.command import run_program


class LogitObjective:
    """The divergence between the two models' predictions; a mean over scored tokens."""

    layerwise = False

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: LogitsStage) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings

    def weight(self, batch: Batch) -> float:
        """Positions whose next token is in the same document."""
        return float(scored_positions(batch["labels"]).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One part: nothing of an end-to-end loss can be freed early."""
        yield Part("logits", partial(self._divergence, batch))

    def _divergence(self, batch: Batch) -> Tensor:
        """Summed over scored tokens."""
        with torch.no_grad():
            teacher_BTV = _logits(self.teacher, batch)
        return logit_loss(
            _logits(self.student.forward, batch),  # not a call: an engine has called the student around this
            teacher_BTV,
            batch["labels"],
            divergence=self.settings.divergence,
            temperature=self.settings.temperature,
            ce_weight=self.settings.ce_weight,
            reduction="sum",
        )


class OfflineLogitObjective:
    """The same with the teacher's top k and its tail, which come with the batch."""

    layerwise = False

    def __init__(self, student: PreTrainedModel, settings: LogitsStage) -> None:
        self.student, self.settings = student, settings

    def weight(self, batch: Batch) -> float:
        """Positions whose next token is in the same document."""
        return float(scored_positions(batch["labels"]).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One part: nothing of an end-to-end loss can be freed early."""
        yield Part("logits", partial(self._divergence, batch))

    def _divergence(self, batch: Batch) -> Tensor:
        """Summed over scored tokens."""
        return topk_loss(
            _logits(self.student.forward, batch),
            batch["teacher_ids"],
            batch["teacher_log_probs"],
            batch["teacher_log_tail"],
            batch["labels"],
            divergence=self.settings.divergence,
            ce_weight=self.settings.ce_weight,
            reduction="sum",
        )


def _logits(model: Callable[..., Any], batch: Batch) -> Tensor:
    # use_cache=False and no mask: only so do attention layers keep packed documents apart.
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def main(run: Run) -> StageRecord:
    stage = run.recipe.stages.logits
    if stage is not None and stage.offline_teacher is not None:
        cache = complete_teacher_cache(run)
        run.forget_teacher()
        return train_stage(
            run,
            "logits",
            OfflineLogitObjective,
            enrich=lambda batches: CachedBatches(batches, cache),
        )
    return train_stage(run, "logits", partial(LogitObjective, run.teacher))


if __name__ == "__main__":
    run_program(main, "Stage 3: match the student's next-token distributions to its teacher's.")
