"""Both sides of a SiLU: what spare columns and copies of a head carry is what the activation cut off."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import convert, seeding
from distill.attention import AttentionView, views
from distill.mirrored import BehindSilu
from distill.student import mixers_of
from tests.conftest import tiny


@pytest.fixture(params=["mamba2", "gated_deltanet"])
def kind(request) -> str:
    return request.param


def seeded(family: str, kind: str, **choices) -> tuple[AttentionView, BehindSilu]:
    """Layer 0 of a teacher with biases wherever its family has them, and the mixer in its place; both fp64."""
    teacher = tiny(family).double()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return views(teacher, [0])[0], mixers_of(convert(teacher, mixer=kind, seed=3, **choices))[0]


def both_sides(x: Tensor) -> Tensor:
    return torch.cat([F.silu(x), F.silu(-x)], dim=-1)


@pytest.mark.parametrize("copies", [1, 2])
def test_scores_count_what_agrees_on_either_side(family, kind, copies):
    attention, mixer = seeded(family, kind, state_dim=36, expand=copies)  # more than two of any tiny teacher's heads
    u = torch.randn(2, 7, 32).double()
    terms, _ = mixer._terms(u, None, None, None)
    q, k = (both_sides(attention.scaling**0.5 * part) for part in attention.queries_and_keys(u, None))
    width = 2 * attention.head_dim
    if kind == "mamba2":
        reads, writes, beyond, tolerance = terms.C_BTHN, terms.B_BTHN, terms.C_BTHN, {}
        size = 1.0
    else:  # keys are of length 1, and so are queries with what they have past both sides
        reads, writes, beyond, tolerance = terms.q_BTHN, terms.k_BTHN, terms.k_BTHN, {"rtol": 1e-3, "atol": 1e-4}
        k, size = F.normalize(k, dim=-1), reads[..., :width].norm(dim=-1).mT[..., None]
        q = F.normalize(q, dim=-1)
    ours = torch.einsum("bthn,bshn->bhts", reads[..., :width], writes[..., :width])
    torch.testing.assert_close(ours, size * (q @ k.mT).repeat_interleave(copies, dim=1), **tolerance)
    assert (beyond[..., width:] == 0).all()  # the columns past both sides start without influence


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_together_carry_the_whole_value(family, kind, copies):
    """Weighed as the norm's weight weighs them, but for the size that is the same for all."""
    attention, mixer = seeded(family, kind, expand=copies)
    u = torch.randn(2, 7, 32).double()
    terms, _ = mixer._terms(u, None, None, None)
    weight = mixer.norm.weight.unflatten(0, (-1, copies, attention.head_dim))[..., 0]
    weight = 2 * weight / weight.abs().sum(1, keepdim=True)  # SiLU(x) − SiLU(−x) = x, each side once in all
    together = (weight.flatten()[:, None] * terms.values).unflatten(2, (-1, copies)).sum(3)
    torch.testing.assert_close(together, attention.values(u))
    assert (weight.sign() == torch.tensor([1, -1, 1, -1])[:copies]).all()


@pytest.mark.parametrize("choices", [{}, {"state_dim": 15}], ids=str)
def test_without_room_nothing_is_turned(choices, kind, monkeypatch):
    _, mixer = seeded("qwen2", kind, **choices)
    for name in ("mirror_state_", "mirror_values_"):
        monkeypatch.setattr(seeding, name, lambda *_: False)
    _, plain = seeded("qwen2", kind, **choices)
    for ours, theirs in zip(mixer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_student_of_a_real_teacher_starts_nearer(stdlib_teacher, kind, monkeypatch):
    teacher = AutoModelForCausalLM.from_pretrained(stdlib_teacher)
    text = inspect.getsource(inspect)
    ids = AutoTokenizer.from_pretrained(stdlib_teacher)(text, return_tensors="pt").input_ids[:, :512].view(4, 128)

    def divergence() -> float:
        student = convert(teacher, mixer=kind, expand=2, state_dim=2 * teacher.config.head_dim)
        ours, theirs = (model(ids).logits.log_softmax(-1) for model in (student, teacher))
        return F.kl_div(ours, theirs, log_target=True, reduction="sum").item() / ids.numel()

    both = divergence()
    monkeypatch.setattr(seeding, "mirror_values_", lambda *_: False)
    without_values = divergence()
    monkeypatch.setattr(seeding, "mirror_state_", lambda *_: False)
    assert both < without_values < divergence()
