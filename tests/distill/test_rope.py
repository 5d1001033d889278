"""A student that keeps its teacher's rotary positions: seeding, generation, documents, and where it is refused."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as in_pairs

from distill import convert, load_student
from distill.attention import family_of, view
from distill.calibration import calibrate
from distill.errors import UserError
from distill.mixers import MIXERS
from distill.objectives import attention_matrix
from distill.rotation import require_rotation
from distill.student import mixers_of
from tests.conftest import disturbed, tiny

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=[(name, keep) for name in sorted(MIXERS) for keep in ((), (1,))], ids=str)
def student(request) -> PreTrainedModel:
    mixer, keep = request.param
    return disturbed(convert(tiny("llama"), mixer=mixer, keep_attention=keep, rope="keep"))


def tokens(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_positions_have_a_say(student):
    """Tokens further apart than they are: only a mixer that knows positions makes something else of them."""
    ids, far = tokens(1, 12), 3 * torch.arange(12)[None]
    rope = {mixer.rope for mixer in mixers_of(student).values()}
    assert rope == {"keep"} == {student.config.distill["mixer"]["rope"]}
    one = student(ids, position_ids=far, use_cache=False).logits
    assert not torch.allclose(one, student(ids, use_cache=False).logits, rtol=1e-3)


def test_prefill_chunks_and_steps_agree(student):
    ids = tokens(2, 30)
    expected = student(ids, use_cache=False).logits
    for pieces in ([17, 3, 10], [1] * 30):
        cache = DynamicCache(config=student.config)
        got = [student(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        close(torch.cat(got, dim=1), expected)


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_generate_with_a_cache_is_generate_without(student, mode):
    ids = tokens(3, 11)
    assert torch.equal(student.generate(ids, **GREEDY, **mode), student.generate(ids, **GREEDY, use_cache=False))


def test_left_padded_prompts_generate_what_each_does_alone(student):
    prompts = [tokens(1, length)[0] for length in (1, 3, 8, 21)]
    alone = [student.generate(ids[None], **GREEDY)[0, len(ids) :] for ids in prompts]
    ids = torch.stack([torch.cat([torch.zeros(21 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(21) >= 21 - len(p) for p in prompts]).long()
    assert torch.equal(student.generate(ids, attention_mask=mask, **GREEDY)[:, 21:], torch.stack(alone))


def test_packed_documents_give_the_logits_of_the_documents_alone(student):
    ids, positions = tokens(2, 30), torch.cat([torch.arange(n) for n in (12, 1, 17)]).expand(2, -1)
    together = student(ids, position_ids=positions, use_cache=False).logits
    for start, end in [(0, 12), (12, 13), (13, 30)]:
        close(together[:, start:end], student(ids[:, start:end], use_cache=False).logits)


def test_it_is_saved_and_loaded(student, tmp_path):
    student.save_pretrained(tmp_path)
    assert torch.equal(load_student(tmp_path)(tokens(1, 9)).logits, student(tokens(1, 9)).logits)


def test_seeded_scores_are_the_teachers_own(family):
    """C·B, before any decay, is q·k as attention scores it, rotation included, up to the head's factor."""
    teacher = tiny(family)
    student = convert(teacher, mixer="discrete_mamba2", rope="keep")  # no activation behind the convolution
    for index, trace in calibrate(teacher, [0, 1, 2], seed=3):
        theirs = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
        q, k = theirs.queries_and_keys(trace.attention_input, trace.position_embeddings)
        factors = mixers_of(student)[index].matrix_factors(
            trace.attention_input, position_embeddings=trace.position_embeddings
        )
        scores, ours = q @ k.mT, torch.einsum("bthn,bshn->bhts", factors.C_BTHN, factors.B_BTHN)
        factor_H = (ours * scores).sum((0, 2, 3)) / scores.square().sum((0, 2, 3))
        assert (factor_H > 0).all()
        torch.testing.assert_close(ours, factor_H[:, None, None] * scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])  # the others' have a size of their own
def test_every_head_starts_with_a_matrix_of_attentions_size(mixer):
    teacher = tiny("llama")
    student = convert(teacher, mixer=mixer, rope="keep", seed=3)
    for index, trace in calibrate(teacher, [0, 1, 2], seed=3):
        theirs = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
        q, k = theirs.queries_and_keys(trace.attention_input, trace.position_embeddings)
        wanted = attention_matrix(q, k, scaling=theirs.scaling)
        ours = mixers_of(student)[index].mixing_matrix(
            trace.attention_input, position_embeddings=trace.position_embeddings
        )
        torch.testing.assert_close(ours.square().sum((0, 2, 3)), wanted.square().sum((0, 2, 3)), rtol=1e-3, atol=0)


def test_dropped_is_what_a_student_without_the_key_does():
    """Folders that were saved before there was a choice."""
    dropped = convert(tiny("llama"), rope="drop")
    config = dropped.config.__class__(**dropped.config.to_dict())
    del config.distill["mixer"]["rope"]
    older = type(dropped)(config).eval()
    older.load_state_dict(dropped.state_dict())
    assert torch.equal(older(tokens(1, 9)).logits, dropped(tokens(1, 9)).logits)


def rotating(monkeypatch: pytest.MonkeyPatch, rotate) -> PreTrainedModel:
    """A Llama that turns its heads so."""
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", rotate)
    return tiny("llama")


def test_another_way_to_rotate_is_refused(monkeypatch):
    with pytest.raises(UserError, match="layer 0 of the teacher pairs the columns it turns in another way"):
        convert(rotating(monkeypatch, in_pairs), rope="keep")


def test_layers_without_positions_are_refused(monkeypatch):
    teacher = rotating(monkeypatch, lambda q, k, cos, sin: (q, k))
    with pytest.raises(UserError, match=r"layer 1 of the teacher does not turn its heads by position \(NoPE\)"):
        convert(teacher, rope="keep", keep_attention=[0])
    convert(teacher, rope="keep", keep_attention=[0, 1, 2])  # nothing is to be kept


def test_a_decoder_without_rotary_positions_is_refused():
    teacher = tiny("llama")
    del teacher.model.rotary_emb
    with pytest.raises(UserError, match="decoder has no rotary positions; use drop"):
        require_rotation(teacher, [0], state_dim=8)


def test_a_state_narrower_than_the_rotation_is_refused():
    with pytest.raises(UserError, match="turns 8 columns of every head; state_dim must be at least 8"):
        convert(tiny("llama"), rope="keep", state_dim=6)
    convert(tiny("llama"), rope="keep", state_dim=12)


def test_a_rope_of_another_name_is_refused():
    with pytest.raises(UserError, match="rope is 'yes'; allowed are drop, keep"):
        convert(tiny("llama"), rope="yes")
