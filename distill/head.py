"""A model's language-model head, apart from its decoder: so that a loss can run through it chunk by chunk.

    hidden = decoder(tokens)                        final norm included
    logits = cap(s · (hidden Wᵀ + b))               cap(x) = c·tanh(x/c)

Families differ in s and c only, which their configs name; whether that is all there is between hidden states and
logits is not believed but tried, on a few tokens. A model whose logits come about otherwise (a head under an adapter,
quantised weights, a family with a head of its own) has no ``ModelHead`` and goes through its ``forward``.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.evaluating import evaluating
from distill.objectives.chunked import Head, full_dtype
from distill.vision import model_arguments, trunk_of
from distill.within import opened

TRIED_TOKENS = 8


@dataclass(frozen=True)
class ModelHead:
    """Where a model keeps its head; its weights may be in pieces.

    Attributes:
        linear: W and b. Its weights are whole inside ``within(linear, …)``, itself inside ``within(model, …)``.
        scale: s.
        softcap: c, or None.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def whole(self) -> Head:
        """For a moment in which the weights are whole."""
        return Head(self.linear.weight, self.linear.bias, self.scale, self.softcap)


def final_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, D): what the head reads. Called in the place of ``model``'s forward."""
    return trunk_output(model, batch).last_hidden_state


def trunk_output(model: Any, batch: dict[str, Tensor], features: Any = None) -> Any:
    """The same, with the image features that it was made from; or made from such features."""
    return trunk_of(model)(**model_arguments(model.config, batch, features), use_cache=False)


@torch.no_grad()
def head_of(model: Any) -> ModelHead | None:
    """The head, if ``ModelHead`` says all there is to say about it; else None, with a warning.

    Called in the place of ``model``'s forward, by all processes at once.
    """
    found = _described(model)
    if found is None or not _gives_the_logits(model, found):
        warnings.warn(
            f"the logits of {type(model).__name__} are not a linear layer of its decoder's output, scaled and capped as"
            " its config says: they are kept for a whole micro-batch instead of a chunk; if memory is short, lower"
            " micro_batch_size",
            stacklevel=2,
        )
        return None
    return found


def _described(model: PreTrainedModel) -> ModelHead | None:
    """What the config says; names are those of Gemma, Cohere, Granite and Falcon-H1."""
    linear: Any = model.get_output_embeddings()
    # A subclass with a forward of its own, as quantisation brings, computes something else.
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    for name, factor in _SCALES.items():
        if getattr(config, name, None):
            scale *= factor(float(getattr(config, name)))
    return ModelHead(linear, scale, getattr(config, "final_logit_softcapping", None) or None)


_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,
    "lm_head_multiplier": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
}


def _gives_the_logits(model: Any, head: ModelHead) -> bool:
    """Whether ``head``, on the very hidden states of a forward pass, gives the logits of that pass."""
    decoder, seen = model.get_decoder(), []
    ids_BT = torch.arange(TRIED_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    handle = decoder.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    try:
        # Nothing random: a resumed run tries its head too, and must not draw a number for it.
        with evaluating(model), torch.autocast(model.device.type, enabled=False):
            batch = {"input_ids": ids_BT, "position_ids": torch.arange(TRIED_TOKENS, device=model.device)[None]}
            expected_NV = model.forward(**batch, use_cache=False).logits[0]
            if len(seen) != 1 or not isinstance(getattr(seen[0], "last_hidden_state", None), Tensor):
                return False
            hidden_ND = seen[0].last_hidden_state[0]
            return opened(head.linear, _equal, head, hidden_ND, expected_NV)
    finally:
        handle.remove()


def _equal(head: ModelHead, hidden_ND: Tensor, expected_NV: Tensor) -> bool:
    """Up to the rounding of the model's dtype."""
    whole = head.whole()
    if expected_NV.shape != (len(hidden_ND), whole.vocabulary) or hidden_ND.dtype != whole.weight_VD.dtype:
        return False
    got_NV = whole.logits(hidden_ND, expected_NV.new_empty(expected_NV.shape, dtype=full_dtype(expected_NV.dtype)))
    allowed = 16 * torch.finfo(expected_NV.dtype).eps * expected_NV.abs().max()
    return bool((got_NV - expected_NV).abs().max() <= allowed)
