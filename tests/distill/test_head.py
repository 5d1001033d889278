"""A model's head apart from its decoder: tried on the model itself, refused where it is not all there is."""

import warnings

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from distill import convert
from distill.head import ModelHead, final_states, head_of
from distill.within import opened
from tests.conftest import FAMILIES, SHAPE, tiny

OTHERS = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)),
}


def model_of(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return tiny(family)
    torch.manual_seed(0)
    return OTHERS[family]().eval().requires_grad_(False)


def batch() -> dict[str, torch.Tensor]:
    ids_BT = torch.arange(24).view(2, 12) * 7 % SHAPE["vocab_size"]
    return {"input_ids": ids_BT, "position_ids": torch.arange(12).expand(2, -1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_head_gives_the_logits_of_the_model(family, dtype):
    model = model_of(family).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = opened(model, head_of, model)
    expected_NV = model(**batch(), use_cache=False).logits.flatten(0, 1)
    hidden_ND = final_states(model, batch()).flatten(0, 1)
    got_NV = head.whole().logits(hidden_ND, torch.empty(expected_NV.shape))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert (got_NV - expected_NV).abs().max() <= tolerance * expected_NV.abs().max()


def test_a_student_has_the_head_of_its_teacher(family):
    student = convert(tiny(family), keep_attention=[1])
    assert isinstance(head_of(student), ModelHead)


def test_scale_and_cap_come_from_the_config():
    found = {family: head_of(model_of(family)) for family in OTHERS}
    assert (found["gemma2"].scale, found["gemma2"].softcap) == (1, 2)
    assert (found["cohere"].scale, found["granite"].scale) == (0.25, 1 / 8)


class Louder(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def louder(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight
    model.lm_head = Louder(*weight.shape[::-1], bias=False)
    model.lm_head.weight = weight


def shifted(model: PreTrainedModel) -> None:
    forward = model.forward

    def changed(**inputs: object) -> object:
        output = forward(**inputs)
        output.logits = output.logits + torch.linspace(0, 1e-3, output.logits.shape[-1])
        return output

    model.forward = changed


def wrapped(model: PreTrainedModel) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize("change", [louder, shifted, wrapped])
def test_a_model_that_does_more_has_none_and_says_so(change):
    model = tiny("qwen2")
    change(model)
    with pytest.warns(UserWarning, match="kept for a whole micro-batch"):
        assert head_of(model) is None


def test_trying_draws_no_random_number_and_leaves_every_mode():
    model = tiny("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert head_of(model) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not model.model._forward_hooks
