"""Stage 2: each layer's output is matched to its teacher's (MOHAWK, arXiv 2408.10189, section 3.2).

    python -m stages.hidden recipes/quickstart.yaml

For layer l with teacher hidden state u:  min ‖ attention(u) − mixer(u) ‖₂, a mean over tokens; with ``target: block``
the whole decoder layer instead, MLP included. Every layer reads the teacher's hidden state, so layers train alone and
one layer's graph is alive at a time. The last layer's target is what leaves the layer, before the final norm.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distill.capture import Field, LayerTrace, sequence_arguments, traced_layers
from distill.handover import StageRecord
from distill.objectives import hidden_distance
from distill.recipe import HiddenStage
from distill.run import Run
from distill.student import mixers_of
from distill.train_stage import train_stage
from distill.training import Batch, Part
from stages.command import run_program

READS: dict[str, tuple[Field, Field]] = {
    "mixer": ("attention_input", "attention_output"),
    "block": ("layer_input", "layer_output"),
}


class HiddenObjective:
    """The sum over converted layers of the distance between outputs; a mean over tokens.

    ``target: mixer`` compares what mixer and attention add to the residual stream, ``target: block`` what leaves the
    decoder layer.
    """

    layerwise = True

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: HiddenStage) -> None:
        self.teacher, self.target, self.dtype = teacher, settings.target, student.dtype
        layers = student.get_decoder().layers
        self.layers = {index: layers[index] for index in mixers_of(student)}

    def weight(self, batch: Batch) -> float:
        """Tokens that are not padding."""
        return float(batch["valid"].sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One distance a layer."""
        sequence = sequence_arguments(batch)  # once, not per layer: a GPU finishes its work before it can answer
        for index, trace in traced_layers(self.teacher, batch, self.layers, READS[self.target]):
            yield Part(f"layers.{index}", partial(self._distance, self.layers[index], trace, batch, sequence))

    def _distance(self, layer: Any, trace: LayerTrace, batch: Batch, sequence: dict[str, Tensor | None]) -> Tensor:
        """The distance of one layer, summed over tokens."""
        if self.target == "mixer":
            positions = trace.layer_kwargs.get("position_embeddings")
            u_BTD = trace.attention_input.to(self.dtype)
            output_BTD, _ = layer.self_attn(u_BTD, position_embeddings=positions, **sequence)
            target_BTD = trace.attention_output
        else:
            output_BTD = layer(trace.layer_input.to(self.dtype), **{**trace.layer_kwargs, **sequence})
            target_BTD = trace.layer_output
        return hidden_distance(output_BTD, target_BTD, batch["valid"], reduction="sum")


def main(run: Run) -> StageRecord:
    return train_stage(run, "hidden", partial(HiddenObjective, run.teacher))


if __name__ == "__main__":
    run_program(main, "Stage 2: match each layer's output to its teacher's.")
