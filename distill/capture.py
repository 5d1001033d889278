"""What each layer of a frozen teacher reads and writes, from one forward pass.

In the first two stages every mixer is fed its teacher's hidden state and matched to its teacher's matrix or output:
this is where both come from. The language-model head is not run.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from distill.documents import document_starts
from distill.within import within

Batch = dict[str, Tensor]
Field = Literal["layer_input", "attention_input", "attention_output", "layer_output"]
FIELDS: tuple[Field, ...] = get_args(Field)


@dataclass
class LayerTrace:
    """One decoder layer's traffic; tensors (B, T, D) in the teacher's dtype. What was not asked for is not there.

    Attributes:
        layer_input: the hidden state that enters the layer.
        layer_kwargs: what else the decoder hands to its layers (positions, masks); always there, and the same for all.
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


def layer_traces(
    model: PreTrainedModel, batch: Batch, layers: Iterable[int], wants: Collection[Field] = FIELDS
) -> dict[int, LayerTrace]:
    """Run ``model``'s decoder on a batch and keep what passes through the given layers.

    Args:
        model: a stock Hugging Face model, usually the frozen teacher.
        batch: ``input_ids`` and ``position_ids`` (B, T); positions restart with every packed document.
        layers: indices of the decoder layers to watch.
        wants: which tensors to keep; each is one (B, T, D) a layer, until the trace goes.
    """
    traces: dict[int, LayerTrace] = {}
    watch_layers(model, batch, layers, traces.__setitem__, wants)
    return traces


@torch.no_grad()
def watch_layers(
    model: PreTrainedModel,
    batch: Batch,
    layers: Iterable[int],
    see: Callable[[int, LayerTrace], None],
    wants: Collection[Field] = FIELDS,
) -> None:
    """``layer_traces``, one layer at a time: ``see`` has each as the decoder leaves it, and nothing is kept here."""
    decoder = model.get_decoder()
    handles = [
        handle for index in layers for handle in _watch(decoder.layers[index], partial(see, index), frozenset(wants))
    ]
    try:
        within(model, decoder, input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def sequence_arguments(batch: Batch) -> dict[str, Tensor | None]:
    """What a mixer needs to know of a batch besides hidden states: padding and document borders."""
    valid_BT = batch["valid"]
    return {
        "valid_BT": None if bool(valid_BT.all()) else valid_BT,
        "resets_BT": document_starts(batch["position_ids"]),
    }


def _watch(layer: Any, see: Callable[[LayerTrace], None], wants: frozenset[Field]) -> list[RemovableHandle]:
    trace = LayerTrace()

    def keep(name: Field, tensor: Tensor) -> None:
        if name in wants:
            setattr(trace, name, tensor)

    def enters(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal trace
        trace = LayerTrace()
        trace.layer_kwargs = dict(kwargs)
        keep("layer_input", args[0] if args else trace.layer_kwargs.pop("hidden_states"))

    def attends(_attention: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        keep("attention_input", args[0] if args else kwargs["hidden_states"])

    def attended(_attention: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        keep("attention_output", output[0])

    def leaves(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        nonlocal trace
        keep("layer_output", output[0] if isinstance(output, tuple) else output)
        seen, trace = trace, LayerTrace()
        see(seen)

    return [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        layer.register_forward_hook(leaves),
        layer.self_attn.register_forward_pre_hook(attends, with_kwargs=True),
        layer.self_attn.register_forward_hook(attended),
    ]
