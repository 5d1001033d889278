"""A student's layers on what its teacher's layers read: their outputs beside the teacher's, layer by layer.

    target   both read                      student's output                   teacher's output
    heads    what attention reads           what enters out_proj               what enters attention's output projection
    mixer    what attention reads           what the mixer adds to the stream  what attention adds to it
    block    what enters the layer          what leaves the layer              what leaves the layer

Every layer reads the teacher's hidden state and not the one that the student's layers before it made, so that layers
share nothing and no gradient crosses one. The last layer's output is what leaves it, before the final norm. Copies of a
head (``distill.copies``) count as their mean.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from distill.capture import Field, LayerTrace, as_decoder_calls, sequence_arguments, traced_layers
from distill.copies import mean_of_copies
from distill.decoder import attention_of, layers_of
from distill.objective import Batch
from distill.student import mixers_of
from distill.within import within

Target = Literal["mixer", "block", "heads"]

READS: dict[Target, tuple[Field, Field]] = {
    "heads": ("attention_input", "head_outputs"),
    "mixer": ("attention_input", "attention_output"),
    "block": ("layer_input", "layer_output"),
}


class Outputs(NamedTuple):
    """Of one layer, (B, T, D) each, or (B, T, H·P) with target ``heads``; the teacher's is a constant."""

    student: Tensor
    teacher: Tensor


def outputs_by_layer(
    teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, target: Target
) -> Iterator[tuple[int, Callable[[], Outputs]]]:
    """The index of every layer with a mixer, from the lowest up, and what computes its outputs.

    A teacher's layer is computed when its index is asked for; the student's each time its outputs are.
    """
    layers = layers_of(student)
    sequence = sequence_arguments(batch)  # once, not per layer: a GPU finishes its work before it can answer
    for index, trace in traced_layers(teacher, batch, mixers_of(student), READS[target]):
        yield index, partial(_outputs, layers[index], trace, sequence, target, student.dtype)


def _outputs(layer: Any, trace: LayerTrace, sequence: dict[str, Tensor | None], target: Target, dtype: Any) -> Outputs:
    if target == "block":
        return Outputs(as_decoder_calls(layer, trace.layer_input.to(dtype), trace, sequence), trace.layer_output)
    mixer, u_BTD = attention_of(layer), trace.attention_input.to(dtype)
    arguments = {**sequence, "position_embeddings": trace.position_embeddings}
    if target == "heads":
        heads_BTI = within(mixer, mixer.head_outputs, u_BTD, **arguments)
        n_heads = trace.head_outputs.shape[-1] // mixer.head_dim
        heads_BTHP = mean_of_copies(heads_BTI.unflatten(-1, (-1, mixer.head_dim)), n_heads, dim=2)
        return Outputs(heads_BTHP.flatten(2), trace.head_outputs)
    output_BTD, _ = mixer(u_BTD, **arguments)
    return Outputs(output_BTD, trace.attention_output)
