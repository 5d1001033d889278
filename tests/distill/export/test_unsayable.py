"""What a format cannot say is refused before anything is written: every reason, its layers, and what would help."""

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from distill import UserError
from distill.conversion import plan
from distill.export.facts import StudentFacts, facts_of
from distill.export.limits import LIMITS
from distill.export.refusals import ELSEWHERE, check_exportable, refusals

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def student(keep: Sequence[int] = (1, 3), teacher: PreTrainedConfig | None = None, **settings: Any) -> PreTrainedConfig:
    return plan(teacher or LlamaConfig(**SIZES), keep_attention=keep, **settings)


def reasons(config: PreTrainedConfig, to: str = "granite") -> list[str]:
    return [str(refusal) for refusal in refusals(facts_of(config), LIMITS[to])]


@pytest.mark.parametrize("to", sorted(LIMITS))
def test_a_plain_hybrid_is_said(to: str) -> None:
    assert reasons(student(), to) == []


@pytest.mark.parametrize("to", sorted(LIMITS))
def test_every_reason_is_listed(to: str) -> None:
    with pytest.raises(UserError) as error:
        check_exportable(student([], mixer="discrete_mamba2"), to)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{to} ({LIMITS[to].program}) cannot say this student:"
    assert lines[1] == "  layers 0, 1, 2, 3: discrete_mamba2 mixers; set student.mixer: mamba2"
    assert lines[2].endswith("does not run without; keep one, such as student.keep_attention: [3]")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("mixer", "why"),
    [("gated_deltanet", "(Qwen3-Next has such"), ("sliding_window", "(attention that"), ("based", ";")],
)
def test_no_native_class_has_the_other_mixers(mixer: str, why: str) -> None:
    for to in LIMITS:
        assert reasons(student([3], mixer=mixer), to)[0].partition(" mixers")[2].lstrip().startswith(why)


def test_no_native_class_has_single_heads_beside_a_mixer() -> None:
    for to in LIMITS:
        assert reasons(student([3], keep_heads={1: [0, 2]}), to) == [
            "layer 1: single attention heads beside a mixer (layer 1: 0, 2); set student.keep_heads: {}, or --to"
            " standalone, which keeps them"
        ]


def test_sliding_windows_matter_where_attention_is_kept() -> None:
    mistral = MistralConfig(**SIZES, sliding_window=16)
    assert reasons(student([1, 3], mistral)) == [
        "layers 1, 3: attention within a sliding window of 16 positions; "
        "no layer of the teacher has attention that would do, distill export --to standalone keeps all of it"
    ]
    # As long as all the positions the model knows, a window hides nothing.
    assert reasons(student([1], MistralConfig(**SIZES, sliding_window=128))) == []
    mixed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    assert reasons(student([1], mixed)) == []
    assert reasons(student([1, 3], mixed)) == [
        "layer 3: attention within a sliding window of 16 positions; leave layer 3 out of student.keep_attention"
    ]


def test_activation_serves_the_convolution_too() -> None:
    gelu = LlamaConfig(**SIZES, hidden_act="gelu")
    assert [line.split(";")[0] for line in reasons(student([1, 3], gelu))] == [
        "layers 0, 2: an MLP with gelu, which would be the convolution's activation too instead of SiLU"
    ]
    assert reasons(student([0, 1, 2, 3], gelu)) == []


def test_partial_and_unknown_rotations() -> None:
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    (reason,) = reasons(student([1], LlamaConfig(**SIZES, rope_parameters=partial)), "bamba")
    assert reason.startswith("layer 1: only 50% of a head's channels are rotated")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    config = student([1], LlamaConfig(**SIZES, rope_parameters=yarn))
    assert reasons(config, "granite") == []
    (reason,) = reasons(config, "gguf")
    assert reason.startswith(
        "layer 1: rotary positions of the kind yarn (gguf is written with: default, linear, llama3)"
    )


def test_gguf_needs_mixers_of_twice_the_width() -> None:
    wide = student([1], LlamaConfig(**SIZES, head_dim=24))
    assert reasons(wide, "granite") == []
    (reason,) = reasons(wide, "gguf")
    assert reason.startswith("layers 0, 2, 3: 4 heads of 24 channels, which no added heads make 2 × 32")
    assert reason.endswith(ELSEWHERE)
    (reason,) = reasons(student([1], expand=5), "gguf")
    assert reason.endswith("20 heads of 8 channels, which no added heads make 2 × 32; set student.expand to 2")
    (reason,) = reasons(student([1], LlamaConfig(**SIZES, head_dim=24), expand=2), "gguf")
    assert reason.endswith(ELSEWHERE)
    (reason,) = reasons(student([1], LlamaConfig(**SIZES, attention_bias=True)), "gguf")
    assert reason.startswith("layers 0, 2, 3: mixers whose output projection has a bias; granite can say it")
    (reason,) = reasons(student([1], conv_width=1), "gguf")
    assert reason.endswith("a short convolution over 1 positions; set student.conv_width to 2 or more")
    (reason,) = reasons(student([0, 1, 2, 3]), "gguf")
    assert reason.startswith("no layer has a mixer")


def changed(config: PreTrainedConfig, **layout: Any) -> PreTrainedConfig:
    """With other arguments of the mixers, as another version or a hand could have written them."""
    config.distill["mixer"] |= layout
    return config


def test_what_mixers_do_that_no_native_class_does() -> None:
    facts = facts_of(student([1]))
    facts.mixer["rope"] = "keep"
    assert [str(reason) for reason in refusals(facts, LIMITS["granite"])] == [
        "layers 0, 2, 3: mixers that rotate B and C; set student.rope: drop"
    ]
    (reason,) = reasons(changed(student([1]), norm_eps=1e-3))
    assert reason.startswith("layers 0, 2, 3: a gated norm with eps 0.001, where all norms share the decoder's 1e-06")


def test_the_layer_to_keep_is_one_that_would_do() -> None:
    mixed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    (reason,) = reasons(student([], mixed))
    assert reason.endswith("keep one, such as student.keep_attention: [1]")
    qwen3 = AutoConfig.for_model("qwen3", **SIZES)
    assert all("no layer of the teacher has attention that would do" in line for line in reasons(student([], qwen3)))
    assert reasons(student([1], qwen3))[0].startswith("layer 1: attention with normalised queries and keys")


@pytest.mark.parametrize("to", sorted(LIMITS))
@pytest.mark.parametrize(
    "family",
    ["falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi", "qwen3_moe", "starcoder2"],
)
def test_families_without_words_are_refused_by_name(family: str, to: str) -> None:
    found = reasons(student([1], AutoConfig.for_model(family, **SIZES)), to)
    assert found[0].startswith(f"{family} layers have not been shown to be what it runs")


def with_facts(config: PreTrainedConfig, **changes: Any) -> StudentFacts:
    from dataclasses import replace

    return replace(facts_of(config), **changes)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("self_attn.q_norm.weight", (8,), "layer 1: attention with normalised queries and keys (self_attn.q_norm"),
        ("self_attn.sinks", (4,), "layer 1: attention with sinks"),
        ("mlp.shared_expert.gate_proj.weight", (40, 32), "layer 1: a mixture of experts"),
        ("mlp.fc1.weight", (40, 32), "layer 1: an MLP without a gate"),
        ("input_layernorm.bias", (32,), "layer 1: a LayerNorm with a bias"),
        ("pre_feedforward_layernorm.weight", (32,), "layer 1: norms in other places"),
    ],
)
def test_parameters_without_a_place(name: str, shape: tuple[int, ...], reason: str) -> None:
    facts = facts_of(student([1]))
    more = {**facts.shapes, f"model.layers.1.{name}": shape}
    (found,) = refusals(with_facts(student([1]), shapes=more), LIMITS["granite"])
    assert str(found).startswith(reason)
    assert ("leave layer 1 out of student.keep_attention" in str(found)) == name.startswith("self_attn")


def test_what_only_some_families_do() -> None:
    config = student([1, 3])
    (found,) = refusals(with_facts(config, rotary={1: True, 3: False}), LIMITS["granite"])
    assert str(found).startswith("layer 3: attention without rotary positions, while other layers have them; leave")
    assert refusals(with_facts(config, rotary={1: False, 3: False}), LIMITS["granite"]) == []
    (found,) = refusals(with_facts(config, rotary={1: False, 3: False}), LIMITS["bamba"])
    assert str(found).startswith("layers 1, 3: attention without rotary positions; leave")
    scaled = with_facts(config, scalings={1: 0.5, 3: 0.5})
    assert refusals(scaled, LIMITS["granite"]) == refusals(scaled, LIMITS["gguf"]) == []
    (found,) = refusals(scaled, LIMITS["bamba"])
    assert "attention scores scaled by 0.5 instead of 1/√8; granite can say it" in str(found)
    (found,) = refusals(with_facts(config, family="olmo9"), LIMITS["granite"])
    assert str(found).startswith("olmo9 layers have not been shown to be what it runs")
    config.final_logit_softcapping, config.attn_logit_softcapping = 30.0, 50.0
    assert [line.split(";")[0] for line in reasons(config)] == [
        "logits with a soft cap",
        "layers 1, 3: attention scores with a soft cap",
    ]
