"""Mixtures of experts as planning sees them, beside the real layer."""

import pytest
import torch

from distill.activations import of_layer
from distill.decoder import layers_of
from distill.experts import idle_parameters
from tests.distill.families.models import tiny

# (D, I, E, k) of models.py
SHAPES = {"Mixtral": (32, 48, 4, 2), "Qwen3-MoE": (32, 24, 4, 2)}


@pytest.mark.parametrize("case", SHAPES)
def test_a_token_does_not_meet_the_other_experts(case):
    D, inner, E, k = SHAPES[case]
    assert idle_parameters(tiny(case)) == 3 * (E - k) * 3 * D * inner
    assert idle_parameters(tiny("Llama")) == 0


@pytest.mark.parametrize("case", SHAPES)
def test_what_experts_keep_for_backward_is_what_they_really_keep(case):
    """The router's own few numbers a token are not counted."""
    model = tiny(case).requires_grad_(True)
    layer = layers_of(model)[0]

    def kept(batch: int) -> int:
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        hidden = torch.randn(batch, 64, 32, requires_grad=True)
        rotary = model.model.rotary_emb(hidden, torch.arange(64)[None])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(hidden, position_embeddings=rotary, attention_mask=None)
        parameters = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
        return sum(storage.nbytes() for key, storage in saved.items() if key not in parameters)

    assert of_layer(layer, 32, 64, torch.float32).a_sequence == pytest.approx(kept(3) - kept(2), rel=0.03)
