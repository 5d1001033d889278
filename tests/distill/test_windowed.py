"""A teacher with windows against softmax written out in fp64, against itself without a cache, and against its equal."""

import math

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from distill import convert
from distill.attention import views
from distill.cache import cache_nbytes
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.window import WindowedLayer, seen
from distill.windowed import window_of, windowed
from tests.conftest import tiny
from tests.distill.families.models import EVERY
from tests.distill.families.models import tiny as of_family
from tests.vision_models import CAUSAL, IMAGE, MODELS, image_batch, tiny_vision

WINDOW, SINKS, LAYERS = 5, 2, [0, 2]


def prompt(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


def seen_by(document: list[int], window: int, sinks: int) -> torch.Tensor:
    """Which tokens see which, (T, T), written out: ``document`` numbers each token's, −1 for padding."""
    sees = torch.zeros(len(document), len(document), dtype=torch.bool)
    for t, own in enumerate(document):
        earlier = [s for s in range(t + 1) if document[s] == own and own >= 0]
        for s in {*earlier[:sinks], *earlier[-window:]}:
            sees[t, s] = True
    return sees


def written_out(model, index: int, hidden_BTD, positions, seen_BTT) -> torch.Tensor:
    """The layer's attention output in fp64, head by head."""
    view = views(model, [index])[index]
    q_BHTP, k_BHTP = view.queries_and_keys(hidden_BTD, positions)
    v_BTHP = view.values(hidden_BTD)
    heads = []
    for head in range(view.n_heads):
        scores = view.scaling * q_BHTP[:, head] @ k_BHTP[:, head].mT
        weights = scores.masked_fill(~seen_BTT, -math.inf).softmax(dim=-1).nan_to_num(0.0)
        heads.append(weights @ v_BTHP[:, :, head])
    return view.o(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["plain", "padded", "packed"])
def test_a_layer_is_the_softmax_over_what_it_sees(how, form):
    # Transformers' eager attention takes its softmax in fp32 whatever it is given.
    dtype, tolerance = {"eager": (torch.float32, 1e-6), "sdpa": (torch.float64, 1e-12)}[how]
    teacher = tiny("llama").to(dtype)
    teacher.set_attn_implementation(how)
    model, ids, caught = windowed(teacher, [1], window=WINDOW, sinks=SINKS), prompt(2, 24), {}
    documents = {
        "plain": [[0] * 24] * 2,
        "padded": [[-1] * 9 + [0] * 15, [0] * 24],
        "packed": [[0] * 10 + [1] * 14, [0] * 3 + [1] * 20 + [2]],
    }[form]
    places = torch.tensor([[max(row[:t].count(row[t]), 0) for t in range(24)] for row in documents])
    arguments = {"padded": {"attention_mask": torch.tensor(documents) + 1}, "packed": {"position_ids": places}}

    def catch(_module, _args, kwargs, output):
        caught.update(hidden=kwargs["hidden_states"], positions=kwargs["position_embeddings"], output=output[0])

    attention_of(layers_of(model)[1]).register_forward_hook(catch, with_kwargs=True)
    model(ids, use_cache=False, **arguments.get(form, {}))
    seen_BTT = torch.stack([seen_by(row, WINDOW, SINKS) for row in documents])
    hidden_BTD, positions = caught["hidden"].double(), tuple(part.double() for part in caught["positions"])
    expected = written_out(teacher.double(), 1, hidden_BTD, positions, seen_BTT)
    tokens = torch.tensor(documents) >= 0
    assert (caught["output"] - expected)[tokens].abs().max() < tolerance


@pytest.mark.parametrize("case", EVERY)
def test_every_family_reads_a_prompt_at_once_in_chunks_and_step_by_step_alike(case):
    teacher, ids = of_family(case), prompt(2, 26)
    model = windowed(teacher, LAYERS, window=WINDOW, sinks=SINKS)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    full = teacher(ids, attention_mask=mask, use_cache=False).logits
    assert (expected - full)[1, -1].abs().max() > 1e-4 * full.abs().max()
    for pieces in ([26], [3, 14, 1, 8], [1] * 26):
        cache, got, end = DynamicCache(config=teacher.config), [], 0
        for piece in ids.split(pieces, dim=1):
            end += piece.shape[1]
            # Positions as the call without a cache has them: families differ in what they make of padding.
            places = torch.arange(end - piece.shape[1], end)[None]
            got.append(model(piece, attention_mask=mask[:, :end], past_key_values=cache, position_ids=places).logits)
        difference = (torch.cat(got, dim=1) - expected)[mask.bool()].abs().max()
        assert difference < 2e-5 * expected.abs().max(), pieces
        assert [cache.layers[index].keys.shape[2] for index in LAYERS] == [WINDOW + SINKS] * 2
        assert cache.get_seq_length() == 26


def test_a_layer_with_a_window_of_its_own_sees_nothing_new():
    """Of its own last seven tokens it sees the last four; the first one as long as there are fewer than seven."""
    own = torch.ones(12, 12, dtype=torch.bool).tril().triu(-6)
    got = seen(own, window=4, sinks=1, own=7)
    for t in range(12):
        expected = {*range(max(t - 3, 0), t + 1)} | ({0} if t + 1 < 7 else set())
        assert set(got[t].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("window", [6, 8])
def test_a_window_no_shorter_than_the_layer_s_own_changes_nothing(window):
    teacher, ids = of_family("Mistral"), prompt(2, 26)  # its own window is 6
    model, expected = windowed(teacher, LAYERS, window=window, sinks=SINKS), teacher(ids, use_cache=False).logits
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    cache = DynamicCache(config=teacher.config)
    got = [model(piece, past_key_values=cache).logits for piece in ids.split([14, 1, 1, 7, 3], dim=1)]
    assert (torch.cat(got, dim=1) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_padding_and_packing_change_nothing_for_a_document():
    model, ids = windowed(tiny("llama"), [0, 1, 2], window=WINDOW, sinks=SINKS), prompt(1, 20)
    alone = model(ids, use_cache=False).logits
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)], dim=1)
    behind = torch.cat([prompt(1, 7), ids], dim=1)
    for side in (1, -1):
        padded, valid = (behind, mask) if side == 1 else (torch.cat([ids, prompt(1, 7)], dim=1), mask.flip(1))
        places = (valid.cumsum(dim=1) - 1).clamp(min=0)
        got = model(padded, attention_mask=valid, position_ids=places, use_cache=False).logits[valid.bool()]
        torch.testing.assert_close(got, alone[0], atol=1e-5, rtol=1e-4)
    places = torch.cat([torch.arange(7), torch.arange(20)])[None]
    got = model(behind, position_ids=places, use_cache=False).logits[:, 7:]
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-4)


def test_tokens_behind_padding_on_the_right_see_the_right_ones():
    model, ids = windowed(tiny("llama"), [0, 1, 2], window=WINDOW, sinks=SINKS), prompt(1, 20)
    mask = torch.tensor([[1] * 14 + [0] * 9 + [1] * 6])
    filled = torch.cat([ids[:, :14], prompt(1, 9), ids[:, 14:]], dim=1)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache()
    for start, end in ((0, 23), (23, 25), (25, 29)):
        part = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache}
        last = model(filled[:, start:end], **part).logits[:, -1]
    torch.testing.assert_close(last, model(ids, use_cache=False).logits[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_a_window_as_long_as_the_text_is_the_teacher_bit_for_bit(how):
    teacher, ids = tiny("llama"), prompt(2, 20)
    teacher.set_attn_implementation(how)
    model = windowed(teacher, [0, 1, 2], window=18, sinks=2)
    assert type(model) is type(teacher)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for arguments in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(20)[None] % 9}):
        assert torch.equal(
            model(ids, use_cache=False, **arguments).logits, teacher(ids, use_cache=False, **arguments).logits
        )
    assert not torch.equal(windowed(teacher, [0], window=17, sinks=2)(ids).logits, teacher(ids).logits)
    for one in (model, teacher):
        one.generation_config.update(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(ids[:, :16]), teacher.generate(ids[:, :16]))


def test_the_teacher_stays_as_it_was_and_shares_its_weights():
    teacher, ids = tiny("llama"), prompt(1, 20)
    before = teacher(ids).logits
    model = windowed(teacher, [0], window=3)
    assert not torch.equal(model(ids).logits, before)
    assert torch.equal(teacher(ids).logits, before)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), teacher.parameters(), strict=True))
    assert window_of(teacher) is None
    assert str(window_of(model)) == "window 3 + 4 sinks"


def test_generation_samples_beams_and_forgets_what_left_the_window():
    model, ids = windowed(tiny("llama"), [0, 1, 2], window=WINDOW, sinks=SINKS), prompt(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for mode in ({}, {"num_beams": 3}):
        cached = model.generate(ids, attention_mask=mask, **settings, **mode)
        assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **settings, **mode))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, of two rows, two heads of eight channels, four bytes
    assert cache_nbytes(cache) == 3 * (WINDOW + SINKS) * per_token
    cache.reset()
    assert cache.get_seq_length() == 0
    model(ids[:, :3], past_key_values=cache)
    assert cache_nbytes(cache) == 3 * 3 * per_token
    again = model(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 3:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot remove"):
        cache.layers[0].crop(-1)


def test_rows_of_a_cache_keep_their_padding_when_they_are_repeated_and_exchanged():
    model, ids = windowed(tiny("llama"), [0, 1, 2], window=WINDOW, sinks=SINKS), prompt(2, 18)
    mask, cache = torch.ones_like(ids), DynamicCache()
    mask[1, :14] = 0
    order, places = torch.tensor([1, 0, 0, 1]), torch.arange(18)[None]
    expected = model(ids, attention_mask=mask, use_cache=False).logits[order, 16:]
    model(ids[:, :16], attention_mask=mask[:, :16], position_ids=places[:, :16], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1, 2]))
    rest = {"attention_mask": mask[order], "position_ids": places[:, 16:], "past_key_values": cache}
    torch.testing.assert_close(model(ids[order, 16:], **rest).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_vision_language_teachers_with_windows_generate_alike_with_and_without_a_cache(name):
    teacher = tiny_vision(name)
    if name not in CAUSAL:
        with pytest.raises(UserError, match="in both directions"):
            windowed(teacher, LAYERS, window=WINDOW)
        return
    model, batch = windowed(teacher, LAYERS, window=WINDOW, sinks=SINKS), image_batch(name, left=True)
    assert not torch.equal(model(**batch).logits, teacher(**batch).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))


def test_a_cache_of_another_kind_or_filled_elsewhere_is_refused():
    teacher, ids = tiny("llama"), prompt(1, 8)
    model = windowed(teacher, [1], window=3)
    with pytest.raises(ValueError, match="takes a DynamicCache or a StaticCache, not a Cache"):
        model(ids, past_key_values=Cache(layer_class_to_replicate=DynamicLayer))
    cache = DynamicCache()
    teacher(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="filled by another model"):
        model(ids, past_key_values=cache)
    assert not any(isinstance(layer, WindowedLayer) for layer in cache.layers)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_a_static_cache_holds_all_and_shows_what_the_window_does(how):
    teacher, ids = tiny("llama"), prompt(2, 20)
    teacher.set_attn_implementation(how)
    model = windowed(teacher, [0, 1], window=3, sinks=1)
    expected = model(ids, use_cache=False).logits
    for pieces in ([20], [9, 2, 9], [1] * 20):
        cache = StaticCache(config=teacher.config, max_cache_len=32)
        got = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    teacher = tiny("llama")
    for layers, sizes, message in (
        ([3], {"window": 4}, "numbered 0 to 2"),
        ([], {"window": 4}, "no layer"),
        ([0], {"window": 0}, "at least 1 and 0"),
        ([0], {"window": 4, "sinks": -1}, "at least 1 and 0"),
    ):
        with pytest.raises(UserError, match=message):
            windowed(teacher, layers, **sizes)
    for other in (convert(teacher, keep_attention=[1]), windowed(teacher, [0], window=4)):
        with pytest.raises(UserError, match="as it was"):
            windowed(other, [0], window=4)
    teacher.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="eager or sdpa"):
        windowed(teacher, [0], window=4)
