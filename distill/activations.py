"""How much a layer keeps for its backward pass, found by running it on tensors that have shapes but no data.

A formula for this would have to know the inside of every mixer and change with it. Running the layer itself on
fake tensors counts what autograd really keeps, for any width and length, in milliseconds and without memory.

All that a layer keeps is linear in T, so two short runs say what a long one keeps. That one would be as many operations
as a real sweep, and without data each costs more than with it.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.attention import rotated_channels
from distill.decoder import attention_of
from distill.experts import make_dense_
from distill.objectives.streamed_mixing import streamed_mixing_distance

_SHORT = 64


class Saved(NamedTuple):
    """Bytes kept for backward.

    Attributes:
        a_sequence: what each sequence of the batch adds.
        once: what is kept whatever the batch: under autocast the bfloat16 copies of the weights.
        widest: of what each sequence adds, the largest single tensor. Backward holds its gradient beside it.
    """

    a_sequence: int
    once: int
    widest: int


def of_layer(layer: nn.Module, hidden: int, block: int, dtype: torch.dtype) -> Saved:
    """What one whole decoder layer keeps, whether it has a mixer or attention.

    Args:
        layer: a layer of a student, on the meta device or with weights; it is not touched.
        hidden: D, the size of the hidden state.
        block: T, tokens a sequence.
        dtype: what it computes in; bfloat16 by autocast over fp32 weights.
    """

    def run(layer: Any, hidden_BTD: Tensor) -> None:
        attention = attention_of(layer)
        known = {"position_embeddings": _rotation(attention, hidden_BTD.shape[1])}
        layer(hidden_BTD, **_arguments(layer, known))

    return _at_length(layer, run, hidden, block, dtype)


def of_mixer(mixer: nn.Module, hidden: int, block: int, dtype: torch.dtype) -> Saved:
    """What one mixer alone keeps; arguments as `of_layer`."""

    def run(mixer: Any, hidden_BTD: Tensor) -> None:
        mixer(hidden_BTD, position_embeddings=_rotation(mixer, hidden_BTD.shape[1]))

    return _at_length(mixer, run, hidden, block, dtype)


def of_heads(mixer: nn.Module, hidden: int, block: int, dtype: torch.dtype) -> Saved:
    """What one mixer keeps up to its output projection; arguments as `of_layer`."""

    def run(mixer: Any, hidden_BTD: Tensor) -> None:
        mixer.head_outputs(hidden_BTD, position_embeddings=_rotation(mixer, hidden_BTD.shape[1]))

    return _at_length(mixer, run, hidden, block, dtype)


def of_matrix(mixer: nn.Module, hidden: int, block: int, dtype: torch.dtype) -> Saved:
    """What the distance of one mixer's matrix from the teacher's takes, which holds no T×T tensor: it grows with T.

    That is what the mixer keeps, the gradient with respect to the matrix's factors, which is formed in the forward
    pass, and what else is there while it is formed: the factors, and the teacher's queries and keys. The room to form
    it in comes on top, `distill.objectives.strips.working_bytes`.
    """

    def run(mixer: Any, hidden_BTD: Tensor) -> None:
        factors = mixer.matrix_factors(hidden_BTD, position_embeddings=_rotation(mixer, hidden_BTD.shape[1]))
        B, T, H, N = factors.B_BTHN.shape
        q_BHTN = torch.empty(B, H, T, N)
        streamed_mixing_distance(factors, q_BHTN, q_BHTN, scaling=1.0)

    kept, once, widest = _at_length(mixer, run, hidden, block, dtype)
    of_mixer: Any = mixer
    heads, width, state = int(of_mixer.n_heads), int(of_mixer.head_dim), int(of_mixer.state_dim)
    factors = block * heads * (width + 2 * state) * dtype.itemsize
    queries_and_keys = 2 * block * heads * width * 4
    return Saved(kept + factors + queries_and_keys, once, widest)


def _arguments(layer: nn.Module, known: dict[str, Any]) -> dict[str, Any]:
    """What of ``known`` a layer's forward asks for, and None for what else it insists on."""
    _, *others = inspect.signature(layer.forward).parameters.values()
    asked = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {p.name: known.get(p.name) for p in asked if p.name in known or p.default is p.empty}


def _rotation(attention_or_mixer: Any, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, which all layers share and which are therefore once and not a sequence's own."""
    width = rotated_channels(attention_or_mixer)
    width = min(width, getattr(attention_or_mixer, "state_dim", width))
    cos_1TW = torch.empty(1, length, width)
    return cos_1TW, cos_1TW


def _at_length(
    module: nn.Module, run: Callable[[Any, Tensor], None], hidden: int, block: int, dtype: torch.dtype
) -> Saved:
    """What is kept of sequences of ``block`` tokens."""
    if block <= 2 * _SHORT:
        return _saved(module, run, hidden, block, dtype)
    one, two = (_saved(module, run, hidden, length, dtype) for length in (_SHORT, 2 * _SHORT))
    return Saved(*(a + (b - a) * (block - _SHORT) // _SHORT for a, b in zip(one, two, strict=True)))


def _saved(module: nn.Module, run: Callable[[Any, Tensor], None], hidden: int, block: int, dtype: torch.dtype) -> Saved:
    """From batches of two and of three: what the third sequence adds, and what none does.

    A batch of one keeps a little less: with a dimension of one some copies are views.
    """
    module = copy.deepcopy(module).to("meta")
    make_dense_(module)
    two, three = (_kept(module, run, (batch, block, hidden), dtype) for batch in (2, 3))
    return Saved(
        a_sequence=sum(three) - sum(two),
        once=3 * sum(two) - 2 * sum(three),
        widest=max((kept // 3 for kept in three if 2 * kept / 3 in two), default=0),
    )


def _kept(
    module: nn.Module, run: Callable[[Any, Tensor], None], shape_BTD: tuple[int, int, int], dtype: torch.dtype
) -> list[int]:
    """Bytes of every storage that autograd saves in ``run(module, hidden_BTD)``, parameters apart."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        _on_fake_cpu(module)
        hidden_BTD = torch.empty(shape_BTD, requires_grad=True)
        # Without the cache of copies, as in training.
        autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False)
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(module, hidden_BTD)
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    return [storage.nbytes() for key, storage in saved.items() if key not in parameters]


def _on_fake_cpu(module: nn.Module) -> None:
    """New parameters of the same shapes, made inside a `FakeTensorMode`; autocast does not know the meta device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape)))
