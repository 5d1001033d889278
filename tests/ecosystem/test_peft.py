"""PEFT on a student: adapters everywhere, each with a gradient, merged without a difference, loaded by plain PEFT."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill import convert
from distill.adapters import default_lora_targets, require_gradients
from distill.mixers import MIXERS
from distill.student import mixers_of
from tests.conftest import tiny

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(3, 97, (4, 24))


def trained_looking(student: PreTrainedModel) -> PreTrainedModel:
    """Off what conversion starts with: rows of zeros, which DoRA would divide by."""
    torch.manual_seed(6)
    with torch.no_grad():
        for mixer in mixers_of(student).values():
            mixer.in_proj.weight.add_(0.05 * torch.randn_like(mixer.in_proj.weight))
    return student


def train(model: nn.Module, ids: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_adapters_train_merge_save_and_load(mixer, kind, ids, tmp_path):
    base = trained_looking(convert(tiny("llama"), mixer=mixer, keep_attention=[1]))
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=default_lora_targets(base), task_type="CAUSAL_LM", **KINDS[kind])
    model = peft.get_peft_model(base, config).train()

    losses = []
    for _ in range(2):  # at the start B is zero, so that A has no gradient until the second step
        losses += train(model, ids, steps=1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        require_gradients(model)
        model.zero_grad()
    losses += train(model, ids, steps=5)
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path / "adapter")
    adapted = model(ids, use_cache=False).logits
    cached = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=False))

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(fresh(ids, use_cache=False).logits, adapted)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, adapted)
    exact = loaded.double()(ids, use_cache=False).logits
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids, use_cache=False).logits, exact, rtol=1e-9, atol=1e-9)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(ids, use_cache=False).logits, merged(ids, use_cache=False).logits)
