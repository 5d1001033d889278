"""What each layer of a frozen teacher reads and writes, from one forward pass.

In the first two stages every mixer is fed its teacher's hidden state and matched to its teacher's matrix or output:
this is where both come from. The language-model head is not run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.documents import document_starts
from distill.within import within

Batch = dict[str, Tensor]


@dataclass
class LayerTrace:
    """One decoder layer's traffic; tensors (B, T, D) in the teacher's dtype.

    Attributes:
        layer_input: the hidden state that enters the layer.
        layer_kwargs: what else the decoder hands to its layers (positions, masks).
        attention_input: what attention reads: the layer's norm applied to its input.
        attention_output: what attention adds to the residual stream, after the output projection.
        layer_output: the hidden state that leaves the layer.
    """

    layer_input: Tensor = field(init=False)
    layer_kwargs: dict[str, Any] = field(init=False)
    attention_input: Tensor = field(init=False)
    attention_output: Tensor = field(init=False)
    layer_output: Tensor = field(init=False)

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor]:
        return self.layer_kwargs["position_embeddings"]


@torch.no_grad()
def layer_traces(model: PreTrainedModel, batch: Batch, layers: Iterable[int]) -> dict[int, LayerTrace]:
    """Run ``model``'s decoder on a batch and keep what passes through the given layers.

    Args:
        model: a stock Hugging Face model, usually the frozen teacher.
        batch: ``input_ids`` and ``position_ids`` (B, T); positions restart with every packed document.
        layers: indices of the decoder layers to watch.
    """
    decoder = model.get_decoder()
    traces = {index: LayerTrace() for index in layers}
    handles = []
    for index, trace in traces.items():
        layer = decoder.layers[index]
        handles += [
            layer.register_forward_pre_hook(partial(_layer_reads, trace), with_kwargs=True),
            layer.register_forward_hook(partial(_layer_writes, trace)),
            layer.self_attn.register_forward_pre_hook(partial(_attention_reads, trace), with_kwargs=True),
            layer.self_attn.register_forward_hook(partial(_attention_writes, trace)),
        ]
    try:
        within(model, decoder, input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return traces


def sequence_arguments(batch: Batch) -> dict[str, Tensor | None]:
    """What a mixer needs to know of a batch besides hidden states: padding and document borders."""
    valid_BT = batch["valid"]
    return {
        "valid_BT": None if bool(valid_BT.all()) else valid_BT,
        "resets_BT": document_starts(batch["position_ids"]),
    }


def _layer_reads(trace: LayerTrace, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    rest = dict(kwargs)
    trace.layer_input = args[0] if args else rest.pop("hidden_states")
    trace.layer_kwargs = rest


def _layer_writes(trace: LayerTrace, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    trace.layer_output = output[0] if isinstance(output, tuple) else output


def _attention_reads(trace: LayerTrace, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    trace.attention_input = args[0] if args else kwargs["hidden_states"]


def _attention_writes(trace: LayerTrace, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    trace.attention_output = output[0]
