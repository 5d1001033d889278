"""A student without what some of its layers mix in: what does each of them do?

    y_t = mix(u)_t        what a layer's mixer, or its attention, adds to the residual stream at token t
    y_t ← 0               ablated by zero: nothing is mixed
    y_t ← E_t[mix(u)_t]   ablated by its mean over a text: what does not depend on the input stays

A hybrid may learn to leave everything to the attention it kept; then ablating its other layers costs it nothing. The
mean is the gentler of the two: a layer that merely adds a constant is needed by the rest of the model, and still does
not mix. Mean ablation as in "Interpretability in the Wild" (Wang et al. 2022), section 3; the mean is one vector for
all positions, so that nothing of a sequence leaks through it, in generation neither.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.vision import model_arguments, trunk_of
from distill.within import within

By = Literal["zero"] | Mapping[int, Tensor]


@contextmanager
def ablated(model: PreTrainedModel, layers: Sequence[int], by: By = "zero") -> Iterator[PreTrainedModel]:
    """Inside, what these layers' mixers (or attention) put out is replaced; afterwards all is as it was.

    They still run, so that caches and states are those of any other call. No weight is touched.

    Args:
        model: a student, or any model with decoder layers.
        layers: 0-based indices.
        by: ``"zero"``, or a vector (D,) for each of the layers, such as ``mean_outputs`` gives.

    Raises:
        UserError: a layer is not there, or has no vector.
    """
    depth = len(layers_of(model))
    outside = [index for index in layers if not 0 <= index < depth]
    if outside:
        named = ", ".join(map(str, outside))
        raise UserError(f"layer {named} cannot be ablated: the model has {depth}, numbered 0 to {depth - 1}")
    if not isinstance(by, str) and (lacking := [index for index in layers if index not in by]):
        raise UserError(f"layer {', '.join(map(str, lacking))} is to be ablated by its mean, and none is given for it")
    hooks = []
    try:
        for index in layers:
            vector = None if isinstance(by, str) else by[index]
            hooks.append(attention_of(layers_of(model)[index]).register_forward_hook(_replacing(vector)))
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def mean_outputs(
    model: PreTrainedModel, layers: Sequence[int], batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, Tensor]:
    """What each of these layers' mixers (or attention) puts out on average over a text's tokens, (D,) each.

    Args:
        batches: dicts of ``input_ids``, ``position_ids`` (B, T) int64 and ``valid`` (B, T) bool.

    Returns:
        In the model's dtype; summed in fp64.
    """
    sums: dict[int, Tensor] = {}
    tokens, valid_BT = 0, torch.empty(0)

    def adding(index: int) -> Callable[..., None]:
        def add(_mixer: nn.Module, _args: Any, output: Any) -> None:
            sum_D = _first(output)[valid_BT].sum(dim=0, dtype=torch.float64)
            sums[index] = sums[index] + sum_D if index in sums else sum_D

        return add

    hooks = [attention_of(layers_of(model)[index]).register_forward_hook(adding(index)) for index in layers]
    try:
        with evaluating(model):
            for batch in batches:
                rows = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
                valid_BT = rows["valid"]
                tokens += int(valid_BT.sum())
                within(model, trunk_of(model), **model_arguments(model.config, rows), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise UserError("there is no valid token to take the mean over")
    return {index: (sum_D / tokens).to(model.dtype) for index, sum_D in sums.items()}


def _replacing(vector_D: Tensor | None) -> Callable[..., Any]:
    """A hook behind a mixer or an attention layer, whose output is a tensor (B, T, D) or begins with one."""

    def replace(_mixer: nn.Module, _args: Any, output: Any) -> Any:
        y_BTD = _first(output)
        instead = torch.zeros_like(y_BTD) if vector_D is None else vector_D.to(y_BTD).expand_as(y_BTD)
        return instead if isinstance(output, Tensor) else (instead, *output[1:])

    return replace


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
