"""Which heads are found: against a teacher whose weights were changed by hand, and leaving it as it was."""

import pytest
import torch
from transformers import DynamicCache

from distill.attention import views
from distill.capture import layer_traces
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.objectives import attention_matrix
from distill.selection.heads import (
    Found,
    Head,
    asking_repeated,
    most_missed,
    near_sighted,
    rank_heads,
    silenced,
)
from tests.conftest import tiny

IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_silenced_head_is_a_head_whose_columns_are_zero(family):
    teacher, by_hand = tiny(family), tiny(family)
    seen = views(teacher, [1])[1]
    views(by_hand, [1])[1].o.weight.unflatten(1, (4, -1))[:, 2] = 0
    before = teacher(IDS).logits
    with silenced(seen, [2]):
        torch.testing.assert_close(teacher(IDS).logits, by_hand(IDS).logits)
    assert torch.equal(teacher(IDS).logits, before)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_a_near_sighted_head_is_one_with_a_window_and_the_others_are_as_they_were(how):
    teacher, reach = tiny("llama"), 3
    teacher.set_attn_implementation(how)
    module, seen = attention_of(layers_of(teacher)[0]), views(teacher, [0])[0]
    batch = {"input_ids": IDS, "position_ids": torch.arange(20).expand(2, -1)}
    with near_sighted(module, seen, 0, [1, 3], reach):
        trace = layer_traces(teacher, batch, [0])[0]
    q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
    wide, narrow = (attention_matrix(q, k, scaling=seen.scaling, window=window) for window in (None, reach))
    wide[:, [1, 3]] = narrow[:, [1, 3]]
    expected = torch.einsum("bhts,bshp->bthp", wide, seen.values(trace.attention_input)).flatten(2)
    torch.testing.assert_close(trace.head_outputs, expected)
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_near_sighted_in_a_cache_and_beside_padding_as_without(how):
    teacher = tiny("mistral")
    teacher.set_attn_implementation(how)
    module, seen = attention_of(layers_of(teacher)[1]), views(teacher, [1])[1]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with near_sighted(module, seen, 1, [0, 2], 4):
        whole = teacher(IDS, attention_mask=mask, use_cache=False).logits
        cache, got = DynamicCache(config=teacher.config), []
        for start, end in ((0, 12), (12, 13), (13, 20)):
            out = teacher(IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)
    assert (teacher(IDS, attention_mask=mask).logits - whole)[mask.bool()].abs().max() > 1e-3


def test_the_head_that_does_all_the_work_is_ranked_first():
    """All others have columns of zeros, and what is asked is what they cannot change."""
    teacher = tiny("llama")
    for layer, seen in views(teacher, range(3)).items():
        columns = seen.o.weight.unflatten(1, (4, -1))
        columns[:, [head for head in range(4) if (layer, head) != (2, 1)]] = 0
    logits = teacher(IDS, use_cache=False).logits

    def ask(model):
        return Found(-float((model(IDS, use_cache=False).logits - logits).abs().mean()))

    for reach in (0, 4):
        intact, ranking = rank_heads(teacher, ask, reach=reach)
        assert intact.log_probability == 0
        assert (ranking[0].layer, ranking[0].head) == (2, 1)
        assert ranking[0].lost > 0
        assert all(one.lost == pytest.approx(0, abs=1e-6) for one in ranking[1:])
        assert len(ranking) == 12


def test_repeated_tokens_ask_for_what_was_read():
    found = asking_repeated(range(3, 97), rows=3, length=33, bos=1)(tiny("llama"))
    assert found.log_probability < 0
    assert found.written is None
    with pytest.raises(UserError, match="repeat too little"):
        asking_repeated(range(3, 97), rows=3, length=12, bos=None)
    with pytest.raises(UserError, match="different tokens"):
        asking_repeated([5, 6], rows=3, length=33, bos=None)


def test_the_most_missed_are_named_by_layer():
    ranking = [Head(layer, head, Found(0.0), lost) for layer, head, lost in ((2, 3, 3.0), (0, 1, 2.0), (2, 0, 1.0))]
    assert most_missed(ranking, 3) == {0: [1], 2: [0, 3]}
    assert most_missed(ranking, 1) == {2: [3]}
    with pytest.raises(UserError, match="4 heads are to be kept; 1 to 3 were ranked"):
        most_missed(ranking, 4)
