"""What each layer of a frozen teacher reads and writes, from one forward pass.

In the first two stages every mixer is fed its teacher's hidden state and matched to its teacher's matrix or output:
this is where both come from. The language-model head is not run.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill.attention import family_of, view
from distill.decoder import attention_of, layers_of, replace_layers
from distill.decoder_inputs import told
from distill.documents import document_starts
from distill.projections import module_of
from distill.within import within

Batch = dict[str, Tensor]
Field = Literal["layer_input", "attention_input", "head_outputs", "attention_output", "layer_output"]
FIELDS: tuple[Field, ...] = get_args(Field)


@dataclass
class LayerTrace:
    """One decoder layer's traffic; tensors in the teacher's dtype. What was not asked for is not there.

    All are (B, T, D) but for ``head_outputs``, which is (B, T, H·P).

    Attributes:
        layer_input: the hidden state that enters the layer.
        layer_args, layer_kwargs: what else the decoder hands to its layers (positions, masks); always there.
        attention_input: what attention reads: the layer's norm applied to its input.
        head_outputs: what attention's heads make and its output projection reads.
        attention_output: what attention adds to the residual stream, after the output projection.
        layer_output: the hidden state that leaves the layer.
    """

    layer_input: Tensor = field(init=False)
    layer_args: tuple[Any, ...] = field(init=False)
    layer_kwargs: dict[str, Any] = field(init=False)
    attention_input: Tensor = field(init=False)
    head_outputs: Tensor = field(init=False)
    attention_output: Tensor = field(init=False)
    layer_output: Tensor = field(init=False)

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        """(cos, sin); None where a family learns its positions."""
        return self.layer_kwargs.get("position_embeddings")


def traced_layers(
    model: PreTrainedModel, batch: Batch, layers: Iterable[int], wants: Collection[Field] = FIELDS
) -> Iterator[tuple[int, LayerTrace]]:
    """What passes through the given layers, from the lowest up: a layer is computed when it is asked for.

    So what is done with one layer is done before the next has any activations. Layers above the last are not run, nor
    is the language-model head.

    Args:
        model: a stock Hugging Face model, usually the frozen teacher.
        batch: ``input_ids`` and ``position_ids`` (B, T); positions restart with every packed document.
        layers: indices of the decoder layers to watch.
        wants: which tensors to keep; each is one a layer, until the trace goes.
    """
    watched = set(layers)
    if not watched:
        return
    trace, decoder_layers = LayerTrace(), layers_of(model)
    with _watched(decoder_layers[0], trace, wants, model.config) if 0 in watched else nullcontext():
        hidden_BTD, calls = _first_layer(model, batch)
    if 0 in watched:
        yield 0, trace
    for index in range(1, max(watched) + 1):
        trace = LayerTrace()
        with _watched(decoder_layers[index], trace, wants, model.config) if index in watched else nullcontext():
            hidden_BTD = _called(decoder_layers[index], hidden_BTD, calls[index])
        if index in watched:
            yield index, trace


def layer_traces(
    model: PreTrainedModel, batch: Batch, layers: Iterable[int], wants: Collection[Field] = FIELDS
) -> dict[int, LayerTrace]:
    """``traced_layers``, all of them at once."""
    return dict(traced_layers(model, batch, layers, wants))


def sequence_arguments(batch: Batch) -> dict[str, Tensor | None]:
    """What a mixer needs to know of a batch besides hidden states: padding and document borders."""
    valid_BT = batch["valid"]
    return {
        "valid_BT": None if bool(valid_BT.all()) else valid_BT,
        "resets_BT": document_starts(batch["position_ids"]),
    }


def as_decoder_calls(layer: Any, hidden_BTD: Tensor, trace: LayerTrace, sequence: dict[str, Tensor | None]) -> Tensor:
    """What leaves a student's ``layer`` when it is called as the teacher's was, with the mixer's arguments besides."""
    return _hidden(layer(hidden_BTD, *trace.layer_args, **told(layer, trace.layer_kwargs, sequence)))


class _Call(NamedTuple):
    """What a decoder hands to one of its layers besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands where a layer stands and notes what it is called with.

    The first layer runs; the others give out what that one gave, so that a decoder finds what its layers return, be it
    a tensor or a tuple.
    """

    def __init__(self, layer: nn.Module, calls: list[_Call], outputs: list[Any]) -> None:
        super().__init__()
        vars(self).update(layer=layer, calls=calls, outputs=outputs)  # not as a submodule: it is the decoder's

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)  # some decoders ask a layer what kind it is

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD, *rest = args or (kwargs.pop("hidden_states"),)
        self.calls.append(_Call(tuple(rest), kwargs))
        if not self.outputs:
            self.outputs.append(self.layer(hidden_BTD, *rest, **kwargs))
        return self.outputs[0]


@torch.no_grad()
def _first_layer(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, list[_Call]]:
    """What leaves the first layer, and how the decoder calls each: masks differ where windows do."""
    layers, calls, outputs = layers_of(model), list[_Call](), list[Any]()
    replace_layers(model, nn.ModuleList(_Recorder(layer, calls, outputs) for layer in layers))
    decoder = model.get_decoder()
    try:
        within(model, decoder, input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        replace_layers(model, layers)
    return _hidden(outputs[0]), calls


@torch.no_grad()
def _called(layer: nn.Module, hidden_BTD: Tensor, call: _Call) -> Tensor:
    return _hidden(layer(hidden_BTD, *call.args, **call.kwargs))


def _hidden(output: Any) -> Tensor:
    """The hidden state, which some families' layers return in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _watched(layer: Any, trace: LayerTrace, wants: Collection[Field], config: PreTrainedConfig) -> Iterator[None]:
    """Inside, a call of ``layer`` fills ``trace``."""

    def keep(name: Field, tensor: Tensor) -> None:
        if name in wants:
            setattr(trace, name, tensor)

    def enters(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        trace.layer_args, trace.layer_kwargs = args[1:], kwargs
        keep("layer_input", args[0])

    def attends(_attention: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        keep("attention_input", args[0] if args else kwargs["hidden_states"])

    def projects(_projection: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep("head_outputs", args[0])

    def attended(_attention: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        keep("attention_output", _hidden(output))

    def leaves(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        keep("layer_output", _hidden(output))

    attention = attention_of(layer)
    handles = [
        layer.register_forward_pre_hook(enters, with_kwargs=True),
        layer.register_forward_hook(leaves),
        attention.register_forward_pre_hook(attends, with_kwargs=True),
        attention.register_forward_hook(attended),
    ]
    if "head_outputs" in wants:  # alone: a student's layers, which have no such projection, are watched too
        handles.append(module_of(view(attention, family_of(config)).o).register_forward_pre_hook(projects))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
