"""A student as its users meet it: generate in every mode, saving and loading, documents, padding, training."""

import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel

from distill import convert, load_student
from distill.cache import MixerCacheLayer, cache_nbytes
from distill.mixers import MIXERS
from tests.conftest import disturbed, tiny
from tests.distill.agreement import close, pieces_agree, prompt

GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(params=[(name, keep) for name in sorted(MIXERS) for keep in ((), (1,))], ids=str)
def student(request, family):
    """All-mixer and hybrid students of every family, with trained-looking mixers."""
    mixer, keep = request.param
    return disturbed(convert(tiny(family), mixer=mixer, keep_attention=keep))


@pytest.fixture
def hybrid():
    return convert(tiny("llama"), keep_attention=[1])


def test_prefill_chunked_prefill_and_steps_agree(student):
    pieces_agree(student)


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate_with_a_cache_is_generate_without(student, mode):
    ids = prompt(3, 11)
    arguments = GREEDY | mode
    torch.manual_seed(0)
    got = student.generate(ids, **arguments)
    uncached = {key: value for key, value in arguments.items() if key in ("num_beams", "do_sample", "top_k")}
    torch.manual_seed(0)
    expected = student.generate(ids, use_cache=False, max_new_tokens=12, **({"do_sample": False} | uncached))
    assert torch.equal(got, expected)


def test_left_padded_batches_generate_what_each_prompt_does_alone(student):
    prompts = [prompt(1, length)[0] for length in (1, 2, 3, 5, 8, 13, 21, 34)]
    alone = [student.generate(ids[None], **GREEDY, eos_token_id=None)[0, len(ids) :] for ids in prompts]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    together = student.generate(ids, attention_mask=mask, **GREEDY, eos_token_id=None)[:, width:]
    assert torch.equal(together, torch.stack(alone))


def test_packed_documents_give_the_logits_of_the_documents_alone(student):
    ids = prompt(2, 50)
    positions = torch.cat([torch.arange(n) for n in (17, 1, 15, 17)]).expand(2, -1)
    together = student(ids, position_ids=positions, use_cache=False).logits
    for start, end in [(0, 17), (17, 18), (18, 33), (33, 50)]:
        close(together[:, start:end], student(ids[:, start:end], use_cache=False).logits)


def test_other_ways_to_say_packed_do_not_leak_either(student):
    ids = prompt(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    expected = student(ids, position_ids=positions, use_cache=False).logits
    number = torch.tensor([[0] * 8 + [1] * 12])
    assert torch.equal(student(ids, seq_idx=number).logits, expected)
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    assert torch.equal(student(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, expected)
    assert torch.equal(student(ids, cu_seq_lens_k=ends, position_ids=positions).logits, expected)
    assert torch.equal(student(ids, position_ids=positions).logits, expected)  # use_cache is on by default
    assert torch.equal(student(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits, expected)


def test_lengths_are_of_rows_laid_end_to_end(hybrid):
    ids = prompt(2, 20)
    together = hybrid(ids, cu_seq_lens_q=torch.tensor([0, 8, 20, 35, 40])).logits
    for row, start, end in [(0, 0, 8), (0, 8, 20), (1, 0, 15), (1, 15, 20)]:
        close(together[row : row + 1, start:end], hybrid(ids[row : row + 1, start:end]).logits)


def test_lengths_of_one_document_leave_the_positions_to_the_cache(hybrid):
    ids = prompt(1, 20)
    cache = hybrid(ids[:, :12], cu_seq_lens_q=torch.tensor([0, 12]), use_cache=True).past_key_values
    close(
        hybrid(ids[:, 12:], cu_seq_lens_q=torch.tensor([0, 8]), past_key_values=cache).logits,
        hybrid(ids).logits[:, 12:],
    )


def test_what_would_leak_raises(hybrid):
    ids, positions = prompt(1, 20), torch.cat([torch.arange(8), torch.arange(12)])[None]
    padded = torch.ones_like(ids)
    padded[:, :3] = 0
    with pytest.raises(ValueError, match="Leave attention_mask out"):
        hybrid(ids, position_ids=positions, attention_mask=padded)
    with pytest.raises(ValueError, match="Call without a cache"):
        hybrid(ids, position_ids=positions, past_key_values=DynamicCache())
    straight, ends = torch.arange(20)[None], torch.tensor([0, 8, 20])
    for said in ({"cu_seq_lens_q": ends}, {"seq_idx": (straight >= 8).long()}):
        with pytest.raises(ValueError, match="position_ids do not begin anew"):
            hybrid(ids, position_ids=straight, **said)
    with pytest.raises(ValueError, match="Call without a cache"):
        hybrid(ids, cu_seq_lens_q=ends, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="does not cover 1 × 20 tokens"):
        hybrid(ids, cu_seq_lens_q=ends[:2])
    with pytest.raises(ValueError, match="goes on in another row"):
        hybrid(prompt(2, 20), cu_seq_lens_q=torch.tensor([0, 8, 40]))
    with pytest.raises(ValueError, match="must be 2-D"):
        hybrid(ids, attention_mask=torch.zeros(1, 1, 20, 20))


def test_a_cache_filled_by_another_model_is_refused(hybrid):
    cache = tiny("llama")(prompt(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model"):
        hybrid(prompt(1, 1), past_key_values=cache)


def test_the_cache_does_not_grow_where_mixers_are():
    student = convert(tiny("llama"))
    cache = student(prompt(1, 5), use_cache=True).past_key_values
    size = cache_nbytes(cache)
    student(prompt(1, 100), past_key_values=cache)
    assert cache_nbytes(cache) == size
    assert all(isinstance(layer, MixerCacheLayer) for layer in cache.layers)
    with pytest.raises(ValueError, match="cannot remove 2 tokens"):
        cache.crop(-2)


def test_beams_and_batches_reorder_all_that_is_remembered(hybrid):
    cache = hybrid(prompt(2, 9), use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    step = prompt(1, 1).expand(2, -1)
    got = hybrid(step, past_key_values=cache).logits
    other = hybrid(prompt(2, 9).flip(0), use_cache=True).past_key_values
    close(got, hybrid(step, past_key_values=other).logits)


def test_assisted_decoding_is_refused_with_a_reason(hybrid):
    with pytest.raises(ValueError, match="stateful"):
        hybrid.generate(prompt(1, 5), assistant_model=tiny("llama"), **GREEDY)


def test_saving_and_loading_change_nothing(student, tmp_path):
    ids = prompt(2, 30)
    student.save_pretrained(tmp_path)
    for loaded in (load_student(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is type(student)
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).distill == student.config.distill


def test_tied_embeddings_are_stored_once_and_stay_tied(hybrid, tmp_path):
    from safetensors import safe_open

    hybrid.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert "lm_head.weight" not in stored.keys()  # noqa: SIM118
        assert "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118
    loaded = load_student(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_teachers_name_does_not_travel(stories_teacher, tmp_path):
    """A trainer that reloads ``_name_or_path`` as reference model would otherwise get the teacher."""
    student = convert(stories_teacher)
    assert student.config._name_or_path == ""
    student.save_pretrained(tmp_path)
    assert "stories260K" not in (tmp_path / "config.json").read_text()


def test_nothing_is_dropped_in_training():
    """GPT-2's own configs ask for it."""
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=1)
    teacher = GPT2LMHeadModel(config).eval()
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    student, ids = convert(teacher, keep_attention=[1]).train(), prompt(2, 30)
    assert torch.equal(student(ids).logits, student(ids).logits)


def test_a_student_pickles(hybrid):
    again = pickle.loads(pickle.dumps(hybrid))
    assert torch.equal(again(prompt(1, 9)).logits, hybrid(prompt(1, 9)).logits)


def test_gradient_checkpointing_changes_no_gradient(student):
    ids = prompt(2, 30)
    gradients = []
    student.train()
    for on in (False, True):
        student.gradient_checkpointing_enable() if on else None
        student.zero_grad()
        student(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(student.parameters()))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_bf16_students_run_and_generate(student):
    student.to(torch.bfloat16)
    assert student(prompt(1, 9)).logits.dtype == torch.bfloat16
    student.generate(prompt(1, 9), **GREEDY)


def test_real_prompts_of_eight_lengths_in_one_batch(stories_teacher):
    """Left padding on a real tokenizer and checkpoint: a batch says what each prompt says alone."""
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.unk_token, "left"
    student = convert(stories_teacher, keep_attention=[2])
    text = "Once upon a time, there was a little girl named Lily who liked to play in the big park every day."
    prompts = [" ".join(text.split()[:count]) for count in (1, 2, 3, 5, 8, 11, 15, 20)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = student.generate(**batch, **GREEDY)[:, batch.input_ids.shape[1] :]
    for words, row in zip(prompts, together, strict=True):
        ids = tokenizer(words, return_tensors="pt").input_ids
        assert torch.equal(student.generate(ids, **GREEDY)[0, ids.shape[1] :], row)


def test_missing_weights_are_an_error_not_noise(hybrid, tmp_path):
    """Transformers would fill them from uninitialised memory, with a warning."""
    from safetensors.torch import load_file, save_file

    hybrid.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.self_attn.A_log"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its model.*layers\.0\.self_attn\.A_log"):
        load_student(tmp_path)


def test_a_teacher_is_not_loaded_as_a_student(stories_teacher):
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM, not a student"):
        load_student(stories_teacher)


def test_padding_between_tokens_is_refused(hybrid):
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding between tokens"):
        hybrid(prompt(1, 6), attention_mask=mask)


def test_packed_documents_stay_apart_in_an_all_attention_student_too():
    student = convert(tiny("llama"), keep_attention=range(3))
    ids = prompt(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    together = student(ids, position_ids=positions).logits
    close(together[:, 8:], student(ids[:, 8:]).logits)


def test_weights_left_on_disk_are_fetched_where_they_are_used(hybrid, tmp_path):
    """Offloading fetches a module's weights when the module is called, so the convolution must be called."""
    ids = prompt(1, 12)
    expected = hybrid(ids).logits
    from accelerate import cpu_offload

    cpu_offload(hybrid, execution_device=torch.device("cpu"))
    assert torch.equal(hybrid(ids).logits, expected)
