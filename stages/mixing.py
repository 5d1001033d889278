"""Stage 1: each mixer's matrix is matched to the attention matrix it replaces (MOHAWK, arXiv 2408.10189, section 3.1).

    python -m stages.mixing recipes/quickstart.yaml

For layer l with teacher hidden state u:  min ‖ softmax-attention(u) − mixing-matrix(u) ‖_F, a mean over heads.
Every mixer reads the teacher's hidden state, so layers train alone and one layer's graph is alive at a time.
"""

from collections.abc import Iterator

from transformers import PreTrainedModel

from distill.attention import family_of, view
from distill.capture import layer_traces, sequence_arguments
from distill.documents import document_index
from distill.handover import StageRecord
from distill.objectives import attention_matrix, mixing_distance
from distill.recipe import MixingStage
from distill.run import Run, train_stage
from distill.student import mixers_of
from distill.training import Batch, Part
from stages.command import run_program


class MixingObjective:
    """The sum over layers of the distance between matrices; a mean over sequences and heads."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, _settings: MixingStage) -> None:
        self.teacher = teacher
        self.mixers = mixers_of(student)
        family, layers = family_of(teacher.config), teacher.get_decoder().layers
        self.attention = {index: view(layers[index].self_attn, family) for index in self.mixers}

    def weight(self, batch: Batch) -> float:
        """Sequences with anything in them."""
        return float(batch["valid"].any(dim=1).sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One distance a layer."""
        traces = layer_traces(self.teacher, batch, self.mixers)
        sequence, document_BT = sequence_arguments(batch), document_index(batch["position_ids"])
        for index, mixer in self.mixers.items():
            trace, attention = traces.pop(index), self.attention[index]
            q_BHTP, k_BHTP = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
            target_BHTT = attention_matrix(
                q_BHTP,
                k_BHTP,
                scaling=attention.scaling,
                document_BT=document_BT,
                window=attention.sliding_window,
            )
            matrix_BHTT = mixer.mixing_matrix(trace.attention_input.to(mixer.in_proj.weight.dtype), **sequence)
            yield Part(f"layers.{index}", mixing_distance(matrix_BHTT, target_BHTT, batch["valid"], reduction="sum"))


def main(run: Run) -> StageRecord:
    return train_stage(run, "mixing", MixingObjective)


if __name__ == "__main__":
    run_program(main, "Stage 1: match each mixer's matrix to the attention matrix it replaces.")
