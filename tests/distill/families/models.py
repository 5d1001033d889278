"""Tiny random teachers of every family: three layers, eight or twelve channels a head, each with its particulars."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Cohere 2": ("cohere2", {**GROUPED, **WINDOWS}),
    "EXAONE 4": ("exaone4", {**GROUPED, **WINDOWS, "head_dim": 12}),
    "Falcon, all heads": ("falcon", {"multi_query": False, "new_decoder_architecture": False, "bias": True}),
    "Falcon, multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "Falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Gemma": ("gemma", {**GROUPED, "head_dim": 12}),
    "Gemma 2": (
        "gemma2",
        {**GROUPED, **WINDOWS, "head_dim": 12, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": ("gemma3_text", {**GROUPED, **WINDOWS, "head_dim": 12, "query_pre_attn_scalar": 24}),
    "GPT-2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-NeoX": ("gpt_neox", {"intermediate_size": 48, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "Granite": (
        "granite",
        {**GROUPED, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "Llama": ("llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "Mistral": ("mistral", {**GROUPED, "head_dim": 12, "sliding_window": 6}),
    "Mixtral": ("mixtral", {**GROUPED, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMo 2": ("olmo2", GROUPED),
    "Phi": ("phi", {**GROUPED, "qk_layernorm": True, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "Phi-3": ("phi3", {**GROUPED, "sliding_window": 6, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "Qwen2": ("qwen2", {**GROUPED, **WINDOWS, "use_sliding_window": True}),
    "Qwen3": ("qwen3", {**GROUPED, "head_dim": 12}),
    "Qwen3-MoE": ("qwen3_moe", {**GROUPED, **EXPERTS, "head_dim": 12, "num_experts": 4}),
    "SmolLM3": ("smollm3", {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    "StarCoder2": ("starcoder2", {**GROUPED, "sliding_window": 6}),
}

# Families without a row, read by looking for names that others use.
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "Cohere *": ("cohere", {**GROUPED, "use_qk_norm": True}),
    "OLMo *": ("olmo", GROUPED),
    "StableLM *": ("stablelm", GROUPED),
}
EVERY = {**CASES, **FOUND}


def tiny(case: str, seed: int = 0) -> PreTrainedModel:
    """A random teacher whose every parameter is away from its initial value, biases and norms included."""
    return built(*EVERY[case], seed=seed)


def config(model_type: str, settings: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **{**COMMON, **settings})


def built(model_type: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(model_type, settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)
