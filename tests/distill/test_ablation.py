"""Ablated layers: what is replaced, that nothing else is, and that all comes back."""

import pytest
import torch
from transformers import DynamicCache

from distill import convert
from distill.ablation import ablated, mean_outputs
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.student import mixers_of
from tests.conftest import tiny
from tests.distill.families.models import tiny as of_family


@pytest.fixture
def hybrid():
    return convert(tiny("llama"), keep_attention=[1])


def prompt(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


def outputs(model, index, ids) -> torch.Tensor:
    caught = []
    hook = attention_of(layers_of(model)[index]).register_forward_hook(lambda _m, _a, output: caught.append(output[0]))
    model(ids, use_cache=False)
    hook.remove()
    return caught[0]


def batch(ids: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids), "valid": valid}


@pytest.mark.parametrize("case", ["Llama", "GPT-2", "Falcon, new", "Gemma 2"])
def test_zero_is_a_projection_of_zeros(case):
    student, ids = convert(of_family(case), keep_attention=[1]), prompt(2, 20)
    intact = student(ids).logits
    with ablated(student, [2]):
        got = student(ids).logits
    assert not torch.equal(got, intact)
    assert torch.equal(student(ids).logits, intact)
    with torch.no_grad():
        for parameter in mixers_of(student)[2].out_proj.parameters():
            parameter.zero_()
    assert torch.equal(got, student(ids).logits)


def test_attention_is_ablated_as_mixers_are(hybrid):
    ids = prompt(2, 20)
    with ablated(hybrid, [1]):
        got = hybrid(ids).logits
    torch.nn.init.zeros_(attention_of(layers_of(hybrid)[1]).o_proj.weight)
    assert torch.equal(got, hybrid(ids).logits)


def test_a_mean_is_over_a_text_s_tokens_and_stands_at_every_position(hybrid):
    ids, more = prompt(2, 20), prompt(3, 15)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 12:] = False
    means = mean_outputs(hybrid, [0, 1], [batch(ids, valid), batch(more, torch.ones_like(more, dtype=torch.bool))])
    every = torch.cat([outputs(hybrid, 0, ids)[valid], outputs(hybrid, 0, more).flatten(0, 1)])
    torch.testing.assert_close(means[0], every.mean(dim=0), atol=1e-6, rtol=1e-5)
    assert set(means) == {0, 1}
    with ablated(hybrid, [0], means):
        whole, cache = hybrid(ids, use_cache=False).logits, DynamicCache()
        pieces = [hybrid(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 12], dim=1)]
        assert torch.equal(outputs(hybrid, 0, ids), means[0].expand(2, 20, -1))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_all_comes_back_after_an_error_too(hybrid):
    ids = prompt(1, 9)
    intact = hybrid(ids).logits
    with pytest.raises(RuntimeError, match="on the way"), ablated(hybrid, [0, 2]):
        raise RuntimeError("on the way")
    assert torch.equal(hybrid(ids).logits, intact)
    with ablated(hybrid, []):
        assert torch.equal(hybrid(ids).logits, intact)


def test_a_layer_that_is_not_there_or_has_no_mean(hybrid):
    with pytest.raises(UserError, match="layer 3 cannot be ablated"), ablated(hybrid, [3]):
        pass
    with pytest.raises(UserError, match="none is given"), ablated(hybrid, [0, 2], {0: torch.zeros(32)}):
        pass
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match="no valid token"):
        mean_outputs(hybrid, [0], [batch(prompt(1, 4), nothing)])
