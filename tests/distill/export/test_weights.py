"""Tables of names and the changes of numbers: there and back again, and exact where they add zeros."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import BambaForCausalLM, GraniteMoeHybridForCausalLM, PreTrainedModel

from distill import convert
from distill.export import changes
from distill.export.changes import MixerSize, Sizes
from distill.export.facts import facts_of
from distill.export.limits import LIMITS
from distill.export.native import bamba_config, granite_config, native_shapes
from distill.export.shards import write_shards
from distill.export.weights import Rule, applicable, translate, unplaced
from distill.mixers import Mamba2Mixer
from distill.weight_files import stored_tensors


@pytest.mark.parametrize("to", sorted(LIMITS))
def test_there_and_back(tiny_model: Callable[..., PreTrainedModel], family: str, to: str) -> None:
    student = convert(tiny_model(family), keep_attention=[1], conv_width=3)
    facts, limits = facts_of(student.config), LIMITS[to]
    padded = limits.padded(facts) or facts.mixer_size
    sizes = Sizes(facts.q_heads, facts.kv_heads, facts.mixer_size, padded)
    state = {name: tensor.clone() for name, tensor in student.named_parameters()}
    stored = {name: partial(state.__getitem__, name) for name in state}
    rules = limits.rules(facts)
    assert unplaced(rules, 3, stored) == []

    there = dict(translate(rules, 3, stored, sizes, lambda name, axis: facts.config.intermediate_size))
    if to != "gguf":
        native, config_of = {
            "granite": (GraniteMoeHybridForCausalLM, granite_config),
            "bamba": (BambaForCausalLM, bamba_config),
        }[to]
        shapes = native_shapes(native, config_of(facts, padded))
        assert {name: tuple(tensor.shape) for name, tensor in there.items()}.items() <= shapes.items()
        assert all(name.endswith("o_proj.bias") for name in shapes.keys() - there.keys())
    else:
        assert all(name.startswith(("blk.", "token_embd", "output")) for name in there)

    back = dict(
        translate(
            [rule.reversed() for rule in applicable(rules, 3, stored)],
            3,
            {name: partial(there.__getitem__, name) for name in there},
            sizes,
            lambda name, axis: state[name].shape[axis],
        )
    )
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        # A rate goes through an exponential and its logarithm, everything else comes back bit for bit.
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6 if name.endswith("A_log") else 0)


def test_fused_matrices_come_apart_in_their_rows() -> None:
    sizes = Sizes(4, 2, MixerSize(4, 8, 8), MixerSize(4, 8, 8))
    q, k, v = torch.randn(32, 5), torch.randn(16, 5), torch.randn(16, 5)
    stored = {"model.layers.0.self_attn.qkv_proj.weight": lambda: torch.cat([q, k, v])}
    expected = {"attn_q": changes.QUERIES.there(q, sizes), "attn_k": changes.KEYS.there(k, sizes), "attn_v": v}
    facts = facts_of(convert_config())
    rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16}
    made = dict(translate(LIMITS["gguf"].rules(facts), 1, stored, sizes, lambda name, axis: rows[name.split(".")[2]]))
    assert {name.split(".")[2] for name in made} == set(expected)
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name.split(".")[2]])
    whole = {name: partial(made.__getitem__, name) for name in made}
    back = [rule.reversed() for rule in LIMITS["gguf"].rules(facts) if "qkv" in rule.ours[0]]
    ((_, fused),) = translate(back, 1, whole, sizes, lambda name, axis: 64)
    assert torch.equal(fused, torch.cat([q, k, v]))


def convert_config():
    from transformers import LlamaConfig

    from distill.conversion import plan

    small = LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8)
    return plan(small, keep_attention=[0])


def test_experts_come_apart_and_together(random_teacher: Callable[..., PreTrainedModel]) -> None:
    mixtral = random_teacher("mixtral", num_local_experts=4, sliding_window=None)
    student = convert(mixtral, keep_attention=[1])
    facts, name = facts_of(student.config), "model.layers.0.mlp.experts.gate_up_proj"
    experts_EID = student.state_dict()[name]
    sizes = Sizes(4, 2, facts.mixer_size, facts.mixer_size)
    rules = [rule for rule in LIMITS["gguf"].rules(facts) if "gate_up_proj" in rule.ours[0]]
    made = dict(translate(rules, 1, {name: lambda: experts_EID}, sizes, lambda name, axis: 48))
    assert torch.equal(made["blk.0.ffn_gate_exps.weight"], experts_EID[:, :48])
    assert torch.equal(made["blk.0.ffn_up_exps.weight"], experts_EID[:, 48:])
    back = [rule.reversed() for rule in rules]
    whole = {name: partial(made.__getitem__, name) for name in made}
    assert torch.equal(dict(translate(back, 1, whole, sizes, lambda name, axis: 96))[name], experts_EID)


def test_pairs_of_channels_are_those_that_llama_cpp_rotates() -> None:
    """Rotating channels i and i + P/2 together, then pairing, is pairing, then rotating 2i and 2i + 1."""
    heads, half = 3, 4
    sizes = Sizes(heads, 1, MixerSize(1, 8, 8), MixerSize(1, 8, 8))
    x, angles = torch.randn(heads, 2 * half, dtype=torch.float64), torch.rand(half, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    halves = torch.complex(x[:, :half], x[:, half:]) * turn
    expected = changes.QUERIES.there(torch.cat([halves.real, halves.imag], dim=1).flatten(), sizes)
    paired = changes.QUERIES.there(x.flatten(), sizes).view(heads, half, 2)
    rotated = torch.view_as_real(torch.view_as_complex(paired) * turn)
    torch.testing.assert_close(rotated.flatten(), expected)


@pytest.mark.parametrize(("heads", "state"), [(7, 6), (4, 11), (9, 16)])
def test_heads_and_state_of_zeros_change_nothing(heads: int, state: int) -> None:
    torch.manual_seed(0)
    small = Mamba2Mixer(hidden_size=20, n_heads=4, head_dim=5, state_dim=6, conv_width=3, norm_eps=1e-5).double()
    wide = Mamba2Mixer(hidden_size=20, n_heads=heads, head_dim=5, state_dim=state, conv_width=3, norm_eps=1e-5).double()
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = Sizes(1, 1, MixerSize(4, 5, 6), MixerSize(heads, 5, state))
    named = {name.split(".self_attn.")[1]: change for name, change in _mixer_changes().items()}
    padded = {name: named[name].there(tensor, sizes) for name, tensor in small.state_dict().items()}
    wide.load_state_dict(padded)
    hidden_BTD = torch.randn(2, 13, 20, dtype=torch.float64)
    torch.testing.assert_close(wide(hidden_BTD)[0], small(hidden_BTD)[0], rtol=0, atol=1e-6)


def _mixer_changes() -> dict[str, changes.Change]:
    rules: list[Rule] = [
        rule for rule in LIMITS["granite"].rules(facts_of(convert_config())) if "mamba" in rule.theirs[0]
    ]
    return {rule.ours[0]: rule.change for rule in rules}


def test_shards_hold_at_most_what_they_are_told(tmp_path) -> None:
    tensors: dict[str, Tensor] = {f"t{index}": torch.full((10,), float(index)) for index in range(7)}
    write_shards(iter(tensors.items()), tmp_path, shard_bytes=80)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-{index:05d}-of-00004.safetensors" for index in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert stored_tensors(tmp_path).keys() == tensors.keys()
