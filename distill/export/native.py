"""A student as a checkpoint of a class that transformers has: config, weights, tokenizer, generation config.

``AutoModelForCausalLM.from_pretrained`` loads it with no code of ours. Both classes run the same Mamba-2 layer as
``distill.mixers.mamba2``, with as many groups of B and C as heads; what else they ask for stands in ``granite_config``
and ``bamba_config``.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BambaConfig,
    BambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from distill.export.changes import MixerSize, Sizes
from distill.export.facts import StudentFacts
from distill.export.formats import Options
from distill.export.limits import BAMBA, GRANITE, Limits
from distill.export.refusals import check_exportable
from distill.export.shards import write_shards
from distill.export.stored import has_tokenizer, open_weights, read_student_config
from distill.export.verification import verify
from distill.export.weights import translate

CHUNK = 64
"""Positions of a chunk of the scan; four times as many, transformers' default, are twice as slow (docs/export.md)."""
NO_SHARED = 64
"""Width of a shared MLP of zeros, where all the MLP is experts; a number that tensor parallelism divides."""
_PUBLISHED = {
    "experts.gate_up_proj": "input_linear.weight",
    "experts.down_proj": "output_linear.weight",
    "router.weight": "router.layer.weight",
}
"""Names of GraniteMoeHybrid's experts in memory and in its checkpoints, which other programs read too."""


def granite_config(facts: StudentFacts, mixer: MixerSize) -> GraniteMoeHybridConfig:
    """The config of the ``GraniteMoeHybridForCausalLM`` that computes what the student does.

    Without experts, the class runs its shared MLP alone; with them it runs that too, so it gets one of zeros. Scores
    are multiplied with 1 unless told otherwise, and there are no positions unless told so.
    """
    scales = facts.scales
    kinds = ["full_attention" if index in facts.kept else "linear_attention" for index in range(len(facts.kinds))]
    return GraniteMoeHybridConfig(
        **_common(facts, mixer),
        layer_types=kinds,
        position_embedding_type="rope" if any(facts.rotary.values()) else None,
        attention_multiplier=facts.scaling,
        embedding_multiplier=scales.embedding,
        residual_multiplier=scales.residual,
        logits_scaling=scales.logits,
        num_local_experts=facts.experts,
        num_experts_per_tok=facts.config.num_experts_per_tok if facts.experts else 0,
        shared_intermediate_size=NO_SHARED if facts.experts else facts.config.intermediate_size,
    )


def bamba_config(facts: StudentFacts, mixer: MixerSize) -> BambaConfig:
    """The config of the ``BambaForCausalLM`` that computes what the student does.

    The class rotates half of a head's channels unless told that it is all of them.
    """
    values = _common(facts, mixer)
    values["rope_parameters"] = {**values["rope_parameters"], "partial_rotary_factor": 1.0}
    return BambaConfig(
        **values,
        attn_layer_indices=facts.kept,
        mlp_bias=facts.has("mlp.gate_proj.bias"),
    )


def _common(facts: StudentFacts, mixer: MixerSize) -> dict[str, Any]:
    config: Any = facts.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(facts.kinds),
        "num_attention_heads": facts.q_heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": dict(config.rope_parameters),
        "attention_bias": _attention_bias(facts),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "mamba_n_heads": mixer.heads,
        "mamba_n_groups": mixer.heads,
        "mamba_d_head": mixer.head_dim,
        "mamba_d_state": mixer.state,
        "mamba_d_conv": facts.mixer["conv_width"],
        "mamba_expand": mixer.inner // config.hidden_size,
        "mamba_chunk_size": CHUNK,
        "mamba_conv_bias": True,
        "mamba_proj_bias": bool(facts.mixer.get("out_bias")),
        "time_step_limit": (0.0, math.inf),
    }


def _attention_bias(facts: StudentFacts) -> bool:
    return any(facts.has(f"self_attn.{name}_proj.bias") for name in "qkvo")


def write_granite(student: Path, out: Path, options: Options) -> list[str]:
    """Write a ``GraniteMoeHybridForCausalLM``; see ``distill.export.formats.Format``."""
    return _write(student, out, options, GRANITE, granite_config, GraniteMoeHybridForCausalLM)


def write_bamba(student: Path, out: Path, options: Options) -> list[str]:
    """Write a ``BambaForCausalLM``; see ``distill.export.formats.Format``."""
    return _write(student, out, options, BAMBA, bamba_config, BambaForCausalLM)


def _write(
    student: Path,
    out: Path,
    options: Options,
    limits: Limits,
    config_of: Callable[[StudentFacts, MixerSize], PreTrainedConfig],
    native: type[PreTrainedModel],
) -> list[str]:
    facts = check_exportable(read_student_config(student), limits.name)
    size = facts.mixer_size
    padded = limits.padded(facts)
    assert padded is not None, "refusals let through what cannot be padded"
    config = config_of(facts, padded)
    config.architectures = [native.__name__]
    config.dtype = facts.config.dtype
    with open_weights(student, facts.shapes) as stored:
        sizes = Sizes(facts.q_heads, facts.kv_heads, size, padded)
        write_shards(_whole(translate_all(facts, limits, stored, sizes, native, config), native, config), out)
    config.save_pretrained(out)
    lines = _copy_beside(student, out)
    if padded.heads > size.heads:
        lines.append(f"{padded.heads - size.heads} heads of zeros make each mixer {padded.inner} wide")
    return [*lines, verify(student, out)] if options.verify else [*lines, "not verified"]


def translate_all(
    facts: StudentFacts,
    limits: Limits,
    stored: dict[str, Callable[[], Tensor]],
    sizes: Sizes,
    native: type[PreTrainedModel],
    config: PreTrainedConfig,
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor in the native class's names."""
    shapes = native_shapes(native, config)
    yield from translate(limits.rules(facts), len(facts.kinds), stored, sizes, lambda name, axis: shapes[name][axis])


def _whole(
    tensors: Iterator[tuple[str, Tensor]], native: type[PreTrainedModel], config: PreTrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """With zeros where the class has what the student has not.

    That is a bias (Qwen2 has them for q, k, v and not for o), or an MLP beside the experts.
    """
    shapes, made, dtype = native_shapes(native, config), set(), torch.float32
    for name, tensor in tensors:
        assert shapes[name] == tuple(tensor.shape), f"{name} is {tuple(tensor.shape)} and should be {shapes[name]}"
        made.add(name)
        dtype = tensor.dtype
        yield name, tensor
    lacking = [name for name in shapes if name not in made]
    unknown = [name for name in lacking if not name.endswith("_proj.bias") and ".shared_mlp." not in name]
    assert not unknown, f"nothing was made for {unknown}"
    for name in lacking:
        yield name, torch.zeros(shapes[name], dtype=dtype)


def native_shapes(native: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what the class stores; tied heads once."""
    with torch.device("meta"):
        model = native(config)
    return {_published(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _published(name: str) -> str:
    ending = next((ending for ending in _PUBLISHED if name.endswith(f"block_sparse_moe.{ending}")), None)
    return name if ending is None else name.removesuffix(ending) + _PUBLISHED[ending]


def _copy_beside(student: Path, out: Path) -> list[str]:
    """Tokenizer and generation config; what to tell the user where there are none."""
    if (student / "generation_config.json").is_file():
        shutil.copy(student / "generation_config.json", out)
    if not has_tokenizer(student):
        return ["the student has no tokenizer, so neither has this folder"]
    AutoTokenizer.from_pretrained(student).save_pretrained(out)
    return []
