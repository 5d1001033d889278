"""What adapters attach to in every family, and what is refused: dead adapters, and DoRA on rows of zeros."""

import copy
import re

import pytest
import torch
from torch import nn

from distill import convert
from distill.adapters import default_lora_targets, require_gradients, require_norms, uncovered_weights
from distill.decoder import layers_of
from distill.errors import UserError
from distill.student import mixers_of
from tests.conftest import tiny
from tests.distill.families.models import EVERY
from tests.distill.families.models import tiny as of_family
from tests.vision_models import tiny_vision

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")


def covered(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules() if re.fullmatch(default_lora_targets(model), name)}


@pytest.mark.parametrize("case", EVERY)
def test_every_matrix_of_every_layer_is_a_target_or_named(case):
    """Counted by parameters, not by kinds of module, so that no kind can be forgotten on both sides."""
    student = convert(of_family(case), keep_attention=[1])
    targets, named = covered(student), set(uncovered_weights(student))
    layers = next(name for name, module in student.named_modules() if module is layers_of(student))
    for name, parameter in student.named_parameters():
        inside = re.fullmatch(rf"{layers}\.\d+\.(.+)", name)
        if inside is None:
            assert name.rpartition(".")[0] not in targets
        elif parameter.dim() > 1 and ".conv1d." not in name and "norm" not in name:
            assert (name.removesuffix(".weight") in targets) != (inside[1] in named), name
    assert {f"{layers}.0.{name}" for name in of_mixer(student)} <= targets
    assert len(default_lora_targets(student)) < 250
    assert bool(named) == ("Mixtral" in case or "MoE" in case)


def of_mixer(student: nn.Module) -> list[str]:
    first = layers_of(student)[0]
    place = next(name for name, module in first.named_modules() if module is mixers_of(student)[0])
    return [f"{place}.in_proj", f"{place}.out_proj"]


def test_peft_finds_the_same_in_gpt2():
    """Its linear maps are Conv1D, with the weight the other way round."""
    student = convert(of_family("GPT-2"), keep_attention=[1])
    wanted = covered(student)
    config = peft.LoraConfig(r=2, target_modules=default_lora_targets(student))
    adapted = peft.get_peft_model(student, config)
    assert set(adapted.targeted_module_names) == wanted
    assert {name.rpartition(".")[2] for name in wanted} == {"in_proj", "out_proj", "c_attn", "c_proj", "c_fc"}


def test_fused_experts_are_named():
    assert uncovered_weights(of_family("Mixtral")) == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    ]


def test_no_vision_tower_is_touched():
    student = convert(tiny_vision("qwen2_vl"), keep_attention=[1])
    decoder = set(student.get_decoder().modules())
    touched = [module for name, module in student.named_modules() if name in covered(student)]
    assert touched
    assert all(module in decoder for module in touched)


def backward(model: nn.Module) -> None:
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def adapted(student: nn.Module, **settings: object) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=default_lora_targets(student), **settings)
    return peft.get_peft_model(student, config)


def test_adapters_that_train_pass_in_both_of_the_first_steps():
    model = adapted(convert(tiny("llama"), keep_attention=[1]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        backward(model)
        require_gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def test_an_adapter_that_is_passed_by_is_named():
    """What a fused kernel does: it reads the output projection's weight and never calls the module."""
    student = convert(tiny("llama"), keep_attention=[1])
    model = adapted(student)
    projection = mixers_of(student)[0].out_proj
    projection.forward = lambda x: nn.functional.linear(x, projection.base_layer.weight)
    backward(model)
    with pytest.raises(UserError, match=r"2 of \d+ adapter parameters had no gradient.*layers\.0\.self_attn\.out_proj"):
        require_gradients(model)


def test_an_adapter_with_a_gradient_of_zeros_is_named():
    student = convert(tiny("llama"), keep_attention=[1])
    with torch.no_grad():
        mixers_of(student)[2].out_proj.weight.zero_()
    model = adapted(student)
    backward(model)
    with pytest.raises(UserError, match=r"1 of \d+ .*layers\.2\.self_attn\.in_proj\.lora_B"):
        require_gradients(model)


def test_a_frozen_model_is_refused():
    with pytest.raises(UserError, match="nothing is trained"):
        require_gradients(convert(tiny("llama"), keep_attention=[1]).requires_grad_(False))


def test_dora_on_rows_of_zeros_is_refused_and_really_is_nan():
    student = convert(tiny("llama"), keep_attention=[1])
    targets = default_lora_targets(student)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.in_proj \(the rows of dt\).*use lora or rslora"):
        require_norms(student, targets)
    ids = torch.arange(3, 15)[None]
    dora = adapted(copy.deepcopy(student), use_dora=True)
    assert dora(input_ids=ids, use_cache=False).logits.isnan().any()

    with torch.no_grad():
        for mixer in mixers_of(student).values():
            mixer.in_proj.weight.add_(0.01)
    require_norms(student, targets)
    assert not adapted(student, use_dora=True)(input_ids=ids, use_cache=False).logits.isnan().any()


def test_a_row_of_zeros_outside_mixers_is_named_too():
    student = convert(of_family("GPT-2"), keep_attention=[0, 1, 2])
    require_norms(student, default_lora_targets(student))
    with torch.no_grad():
        layers_of(student)[1].mlp.c_fc.weight[:, 5] = 0  # Conv1D: a column here is a row there
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc \(row 5\)"):
        require_norms(student, default_lora_targets(student))
