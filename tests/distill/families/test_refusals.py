"""What no mixer can start from is refused by family, layer and reason, and the teacher is left as it was."""

import pickle
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from distill import UserError, convert
from distill.conversion import convert_with_report, plan
from distill.decoder import attention_of, layers_of
from distill.turning import rotation_of
from tests.distill.families.models import GROUPED, built, config, tiny

MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 8,
}
CHUNKS = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
REFUSED = {
    "falcon": ({"alibi": True}, "this falcon has ALiBi, a bias on the scores"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 3}, "this mpt has ALiBi, a bias on the scores"),
    "deepseek_v3": (MLA, "layer 0 of this deepseek_v3 cannot be converted: .* has no linear q_proj, k_proj, v_proj"),
    "gpt2": ({"add_cross_attention": True}, "this gpt2 has cross attention"),
    "gemma3_text": ({**GROUPED, "use_bidirectional_attention": True}, "has attention in both directions"),
    "llama4_text": (CHUNKS, "has layers of the kind chunked_attention"),
    "gpt_oss": ({**GROUPED, "head_dim": 8}, "layer 0 of this gpt_oss .* also has sinks, which is no part of any view"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_config_is_enough_to_refuse(model_type):
    settings, message = REFUSED[model_type]
    with pytest.raises(UserError, match=message):
        plan(config(model_type, settings))


def test_documents_that_see_each_other_are_found():
    opt = built("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32})
    with pytest.raises(UserError, match=r"layer 0 of this opt .* documents packed into a row see each other"):
        convert(opt)


def test_a_norm_that_is_called_otherwise_is_found():
    stablelm = built("stablelm", {**GROUPED, "qk_layernorm": True})
    with pytest.raises(UserError, match="layer 0 of this stablelm cannot be converted: "):
        convert(stablelm)


def _noisy(attention, by=0.01):
    attention.register_forward_hook(lambda _m, _a, output: (output[0] * (1 + by), output[1]))


@pytest.mark.parametrize("case", ["Llama", "Qwen3"])
def test_attention_that_is_not_what_it_seems_is_refused_with_its_error(case):
    teacher = tiny(case)
    _noisy(attention_of(layers_of(teacher)[2]))
    with pytest.raises(UserError, match=r"layer 2 of this \w+ cannot be converted: .* off by 0\.01 of its size"):
        convert(teacher, keep_attention=[1])
    convert(teacher, keep_attention=[2])  # which nobody reads


@pytest.mark.parametrize("case", ["Llama", "Gemma 2"])
def test_a_teacher_in_fp64_may_take_its_softmax_in_fp32(case):
    """As eager attention does, which Gemma 2 has unless told otherwise; sdpa computes in fp64, and is held to it."""
    teacher = tiny(case).double()
    teacher.set_attn_implementation("eager")
    _, told = convert_with_report(teacher, keep_attention=[1])
    assert 1e-9 < told.view_error < 1e-6
    _noisy(attention_of(layers_of(teacher)[2]), by=1e-5)
    with pytest.raises(UserError, match=r"off by 1e-05 of its size \(1e-06 is allowed\)"):
        convert(teacher)


def test_a_mask_in_both_directions_is_found():
    teacher = tiny("Llama")
    for layer in layers_of(teacher):
        attention_of(layer).register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": torch.zeros(2, 1, 40, 40)}), with_kwargs=True
        )
    with pytest.raises(UserError, match=r"layer 0 of this llama cannot be converted: .* more than .* causal mask"):
        convert(teacher)


def test_attention_that_returns_something_else_is_refused():
    teacher = tiny("Llama")
    attention_of(layers_of(teacher)[0]).register_forward_hook(lambda _m, _a, output: (*output, None))
    teacher.get_decoder().layers[0].forward = lambda hidden, **kwargs: (
        hidden + attention_of(layers_of(teacher)[0])(hidden_states=hidden, **kwargs)[0]
    )
    with pytest.raises(UserError, match="its attention returns 3 things, and a mixer two"):
        convert(teacher)


def test_the_largest_error_is_reported_and_none_where_nothing_changes():
    teacher = tiny("Phi")
    _, report = convert_with_report(teacher, keep_attention=[1])
    assert 0 < report.view_error < 1e-5
    assert convert_with_report(teacher, keep_attention=range(3))[1].view_error is None


def test_a_type_without_a_causal_language_model_is_named():
    with pytest.raises(UserError, match="no causal language model of the type 'vit'"):
        plan(AutoConfig.for_model("vit"))


def test_layers_with_heads_of_another_size_are_named_with_what_would_do():
    """Gemma 4 has larger heads where it sees everything."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 5, "layer_types": kinds, "head_dim": 8, "global_head_dim": 16}
    teacher = config("gemma4_text", {**GROUPED, **sizes})
    told = r"layers 0, 2, 3: 4 heads of 8 channels; layers 1, 4: 4 heads of 16 channels\); put layers 1, 4 in keep_att"
    with pytest.raises(UserError, match=rf"this gemma4_text have different heads, and mixers .* \({told}"):
        plan(teacher)
    plan(teacher, keep_attention=[1, 4])


def test_a_rotation_that_is_not_found_is_told_of_its_attention(monkeypatch):
    teacher = tiny("Llama")
    monkeypatch.delattr(sys.modules[type(attention_of(layers_of(teacher)[0])).__module__], "apply_rotary_pos_emb")
    rotate = rotation_of(attention_of(layers_of(teacher)[0]))
    says = r"LlamaAttention has no apply_rotary_pos_emb beside it, .*; take a teacher of another family, or"
    with pytest.raises(UserError, match=says):
        rotate(torch.ones(1), torch.ones(1))
    pickle.dumps(rotate)  # a student's heads hold it


def test_a_decoder_without_layers_or_attention_is_named():
    class Model(nn.Module):
        def get_decoder(self):
            return nn.Linear(2, 2)

    asks = r"; take a teacher of another family, or add the name that it has to"
    with pytest.raises(UserError, match=f"Linear has no list of layers under layers, h, blocks{asks} LAYERS"):
        layers_of(Model())
    with pytest.raises(UserError, match=f"Linear has no attention under self_attn, attn, .*{asks} ATTENTION"):
        attention_of(nn.Linear(2, 2))
