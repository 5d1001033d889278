"""Stage 3: the whole student is matched to its teacher's next-token distributions (Hinton et al., arXiv 1503.02531).

    python -m stages.logits recipes/quickstart.yaml

min (1 − w) τ² D(teacher ‖ student at temperature τ) + w CE(text), a mean over scored tokens, where D is forward KL,
reverse KL or the Jensen-Shannon divergence. Both models' logits are made chunk by chunk (`distill.objectives.chunked`).

With ``hidden_weight`` v, on top of it  v Σ_l ‖ layer_l(h*) − layer*_l(h*) ‖₂  over the layers l with a mixer, each fed
the teacher's hidden state h*, a mean over the same scored tokens, so that v means the same at any length and batch.
This is MaTVLM's loss (arXiv 2503.13440) but for its scale: it sums the divergence over the T tokens of a sequence and
takes one norm over all B T tokens of a batch, which together are about v = (B / T)^½.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distill.evaluating import frozen
from distill.handover import StageRecord
from distill.head import ModelHead, final_states, head_of, trunk_output
from distill.objectives import hidden_distance, logit_loss, scored_positions
from distill.objectives.logits import next_labels
from distill.objectives.through_head import logit_loss_through_heads, topk_loss_through_head
from distill.objectives.topk import TopK, topk_loss
from distill.recipe import LogitsStage
from distill.run import Run
from distill.stepwise import Replacement
from distill.teacher_cache import CachedBatches
from distill.teacher_cache.offline import complete_teacher_cache
from distill.teacher_fed import Outputs, outputs_by_layer
from distill.train_stage import train_stage
from distill.training import Batch, Part
from distill.vision import for_lack_of_images, model_arguments, shared_features
from distill.within import opened, within
from stages.command import run_program


class LogitObjective:
    """The divergence between the two models' predictions; a mean over scored tokens."""

    layerwise = False

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: LogitsStage) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.heads: tuple[ModelHead | None, ModelHead | None] | None = None
        self.replacement = Replacement(teacher, student, settings.stepwise) if settings.stepwise else None

    def begin(self, done: float) -> None:
        """Where layers change over one part after another, it is some layers' turn."""
        if self.replacement:
            self.replacement.begin(done)

    def weight(self, batch: Batch) -> float:
        """Positions whose next token is in the same document."""
        return float(scored_positions(batch["labels"]).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """The divergence, of which nothing can be freed early; then, if they weigh anything, layer by layer."""
        yield Part("logits", partial(opened, self.teacher, self._divergence, batch))
        if self.settings.hidden_weight:
            scored_BT = scored_positions(batch["labels"])
            for index, outputs in outputs_by_layer(self.teacher, self.student, batch, "block"):
                yield Part(f"layers.{index}", partial(self._distance, outputs, scored_BT))

    def _distance(self, outputs: Callable[[], Outputs], scored_BT: Tensor) -> Tensor:
        """The weighted distance of one layer, summed over scored tokens."""
        return self.settings.hidden_weight * hidden_distance(*outputs(), scored_BT, reduction="sum")

    def _divergence(self, batch: Batch) -> Tensor:
        """Summed over scored tokens; called where the weights of both models are whole."""
        self.heads = self.heads or (head_of(self.student), head_of(self.teacher))
        student_head, teacher_head = self.heads
        settings: dict[str, Any] = {
            "divergence": self.settings.divergence,
            "temperature": self.settings.temperature,
            "ce_weight": self.settings.ce_weight,
            "reduction": "sum",
        }
        if student_head is None or teacher_head is None:
            with frozen(self.teacher):
                teacher_BTV = _logits(self.teacher, batch)
            divergence = logit_loss(_logits(self.student, batch), teacher_BTV, batch["labels"], **settings)
            return divergence + for_lack_of_images(self.student, batch)

        scored_BT = scored_positions(batch["labels"])
        if self.settings.ce_weight == 1:
            return self._cross_entropy(batch, student_head, scored_BT)
        with frozen(self.teacher):
            theirs = trunk_output(self.teacher, batch)
            teacher_ND = theirs.last_hidden_state[scored_BT]

        def loss(student_ND: Tensor) -> Tensor:
            heads = student_head.whole(), teacher_head.whole()
            target_N = next_labels(batch["labels"])[scored_BT]
            return logit_loss_through_heads(student_ND, heads[0], teacher_ND, heads[1], target_N, **settings)

        ours = trunk_output(self.student, batch, shared_features(self.student, theirs))
        student_ND = ours.last_hidden_state[scored_BT]
        divergence = opened(teacher_head.linear, within, student_head.linear, loss, student_ND)
        return divergence + for_lack_of_images(self.student, batch)

    def _cross_entropy(self, batch: Batch, head: ModelHead, scored_BT: Tensor) -> Tensor:
        """The loss of the text alone, for which the teacher is not run."""
        target_N = next_labels(batch["labels"])[scored_BT]

        def loss(student_ND: Tensor) -> Tensor:
            whole, unseen_ND = head.whole(), student_ND.detach()  # in the teacher's place, at which nobody looks
            return logit_loss_through_heads(
                student_ND, whole, unseen_ND, whole, target_N, ce_weight=1.0, reduction="sum"
            )

        student_ND = final_states(self.student, batch)[scored_BT]
        return within(head.linear, loss, student_ND) + for_lack_of_images(self.student, batch)


class OfflineLogitObjective:
    """The same with the teacher's top k and its tail, which come with the batch."""

    layerwise = False

    def __init__(self, student: PreTrainedModel, settings: LogitsStage) -> None:
        self.student, self.settings = student, settings
        self.head: tuple[ModelHead | None] | None = None

    def begin(self, done: float) -> None:
        """Every step has the same loss."""

    def weight(self, batch: Batch) -> float:
        """Positions whose next token is in the same document."""
        return float(scored_positions(batch["labels"]).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One part: nothing of an end-to-end loss can be freed early."""
        yield Part("logits", partial(self._divergence, batch))

    def _divergence(self, batch: Batch) -> Tensor:
        """Summed over scored tokens; called in the place of the student's forward."""
        self.head = self.head or (head_of(self.student),)
        (head,) = self.head
        settings: dict[str, Any] = {
            "divergence": self.settings.divergence,
            "ce_weight": self.settings.ce_weight,
            "reduction": "sum",
        }
        teacher = TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_tail"])
        if head is None:
            return topk_loss(_logits(self.student, batch), *teacher, batch["labels"], **settings)

        scored_BT = scored_positions(batch["labels"])

        def loss(student_ND: Tensor) -> Tensor:
            kept = TopK(*(x[scored_BT] for x in teacher))
            target_N = next_labels(batch["labels"])[scored_BT]
            return topk_loss_through_head(student_ND, head.whole(), *kept, target_N, **settings)

        return within(head.linear, loss, final_states(self.student, batch)[scored_BT])


def _logits(model: Any, batch: Batch) -> Tensor:
    # Not a call of the model: this runs in the place of its forward.
    return model.forward(**model_arguments(model.config, batch), use_cache=False).logits


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
