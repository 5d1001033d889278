"""Stage 1: each mixer's matrix is matched to the attention matrix it replaces (MOHAWK, arXiv 2408.10189, section 3.1).

    python -m stages.mixing recipes/quickstart.yaml

For layer l with teacher hidden state u:  min ‖ softmax-attention(u) − mixing-matrix(u) ‖_F, a mean over heads, or one
of the other forms of `distill.objectives.mixing`; heads that are kept beside a mixer have their matrix and are no part,
and of several copies of a head each is matched to it by itself. Layers of attention behind a window
(``student.window_layers``) have a matrix without factors, which starts as the teacher's, and are left alone.
Every mixer reads the teacher's hidden state, so layers train alone and one layer's graph is alive at a time. Neither
matrix is ever written out: memory grows with T, not with T².
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import views
from distill.capture import LayerTrace, sequence_arguments, traced_layers
from distill.copies import copies_of
from distill.decoder import layers_of
from distill.engines import processes
from distill.evaluating import frozen
from distill.handover import StageRecord
from distill.layout import kept_heads
from distill.mixers import bare, is_mixer
from distill.objectives import Form, streamed_mixing_distance
from distill.recipe import MixingStage
from distill.run import Run
from distill.student import mixers_of
from distill.train_stage import train_stage
from distill.training import Batch, Part
from distill.within import within
from stages.command import run_program


class MixingObjective:
    """The sum over layers of the distance between matrices; a mean over sequences and heads."""

    layerwise = True

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: MixingStage) -> None:
        self.teacher, self.dtype = teacher, student.dtype
        self.form: Form = settings.form
        self.apart = settings.parallel == "layers"
        slots = mixers_of(student)
        self.mixers = {index: slot for index, slot in slots.items() if is_mixer(slot) and slot.without_factors is None}
        self.layers, self.attention = layers_of(teacher), views(teacher, self.mixers)
        kept = kept_heads(student.config)
        self.matched = {
            index: [head for head in range(attention.n_heads) if head not in kept[index]]
            for index, attention in self.attention.items()
            if index in kept
        }

    def begin(self, done: float) -> None:
        """Every step has the same loss."""

    def weight(self, batch: Batch) -> float:
        """Sequences with anything in them."""
        return float(batch["valid"].any(dim=1).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One distance a layer."""
        sequence = sequence_arguments(batch)  # once, not per layer: a GPU finishes its work before it can answer
        for index, trace in traced_layers(self.teacher, batch, self.mixers, wants=["attention_input"]):
            # Where each process computes the losses of its own layers alone, all ask for the teacher's weights here,
            # since they may hold these together. Elsewhere the distance does, lest all layers' queries and keys are
            # held until the one backward pass that they may share.
            matched = self._queries_and_keys(index, trace) if self.apart else None
            yield Part(f"layers.{index}", partial(self._distance, index, trace, matched, **sequence))

    def _queries_and_keys(self, index: int, trace: LayerTrace) -> tuple[Tensor, Tensor]:
        """Of the matrix that a layer is matched to: queries (B, H, T, P), and keys, (B, K, T, P) or as many."""
        attention, mixer = self.attention[index], self.mixers[index]
        with frozen(self.teacher):
            q_BHTP, k_BKTP = within(
                self.layers[index], attention.queries_and_shared_keys, trace.attention_input, trace.position_embeddings
            )
        # Every copy of a head is matched to the head by itself; which of them looks how far back sets them apart.
        q_BHTP = q_BHTP.repeat_interleave(copies_of(mixer, attention), dim=1)
        if (matched := self.matched.get(index)) is not None:  # heads kept beside the mixer have their matrix
            q_BHTP, k_BKTP = q_BHTP[:, matched], attention.per_query_head(k_BKTP, dim=1)[:, matched]
        return q_BHTP, k_BKTP

    def _distance(
        self,
        index: int,
        trace: LayerTrace,
        matched: tuple[Tensor, Tensor] | None,
        valid_BT: Tensor | None,
        resets_BT: Tensor | None,
    ) -> Tensor:
        """The distance of one layer, summed over sequences."""
        attention, mixer = self.attention[index], self.mixers[index]
        q_BHTP, k_BKTP = matched or self._queries_and_keys(index, trace)

        def distance(u_BTD: Tensor) -> Tensor:
            positions = trace.position_embeddings
            return streamed_mixing_distance(
                mixer.matrix_factors(u_BTD, valid_BT=valid_BT, resets_BT=resets_BT, position_embeddings=positions),
                q_BHTP,
                k_BKTP,
                valid_BT,
                scaling=attention.scaling,
                document_BT=None if resets_BT is None else resets_BT.cumsum(1),
                window=attention.sliding_window,
                softcap=attention.softcap,
                form=self.form,
                reduction="sum",
            )

        # All of it within the mixer: D is one of its weights, which engines take away when its forward ends.
        inner = bare(mixer)  # of one with heads beside it
        call = distance if inner is mixer else partial(within, inner, distance)
        return within(mixer, call, trace.attention_input.to(self.dtype))


def main(run: Run) -> StageRecord:
    if (windows := run.recipe.student.window_layers) and processes.is_main():
        named = f"layer{'s' if len(windows) > 1 else ''} {', '.join(map(str, sorted(windows)))}"
        print(f"mixing leaves {named} alone: attention behind a window, whose matrix has no factors", flush=True)
    return train_stage(run, "mixing", partial(MixingObjective, run.teacher))


if __name__ == "__main__":
    run_program(main, "Stage 1: match each mixer's matrix to the attention matrix it replaces.")
