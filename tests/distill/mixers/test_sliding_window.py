"""Attention behind a window as a mixer: its teacher where the window is wide, a bounded cache, and its own masks."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

from distill import convert, load_student
from distill.capture import Batch, layer_traces
from distill.conversion import plan, report
from distill.errors import UserError
from distill.recipe import HiddenStage
from distill.student import mixers_of
from distill.teacher_fed import outputs_by_layer
from distill.windowed import windowed
from stages.hidden import HiddenObjective
from tests.conftest import SHAPE, disturbed, tiny
from tests.distill.agreement import close, layers_alone_agree, two_documents

WINDOW, SINKS, OWN_WINDOW = 5, 2, 6
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=[(), (1,)], ids=["all", "hybrid"])
def student(request, family) -> PreTrainedModel:
    return disturbed(
        convert(tiny(family), mixer="sliding_window", keep_attention=request.param, window=WINDOW, sinks=SINKS)
    )


def prompt(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_it_starts_as_the_teacher_with_that_window(family, how):
    teacher, ids = tiny(family), prompt(2, 40)
    teacher.set_attn_implementation(how)
    student = convert(teacher, mixer="sliding_window", keep_attention=[1], window=WINDOW, sinks=SINKS)
    narrow = windowed(teacher, [0, 2], window=WINDOW, sinks=SINKS)
    assert torch.equal(student(ids).logits, narrow(ids).logits)
    wide = convert(teacher, mixer="sliding_window", window=40)
    assert torch.equal(wide(ids).logits, teacher(ids).logits)


def test_without_seeding_it_starts_at_random():
    teacher = tiny("llama")
    made = convert(teacher, mixer="sliding_window", seed_from_attention=False)
    ours, theirs = mixers_of(made)[0].attention.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)


def test_prefill_chunks_and_steps_agree_and_hold_no_more_than_the_window(student):
    ids = prompt(2, 40)
    expected = student(ids, use_cache=False).logits
    for pieces in ([40], [17, 3, 20], [1] * 40):
        cache = DynamicCache(config=student.config)
        close(
            torch.cat([student(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], 1), expected
        )
        assert cache.get_seq_length() == 40
    for index, mixer in mixers_of(student).items():
        layer = cache.layers[index]
        assert layer.keys.nbytes + layer.values.nbytes == 2 * mixer.state_bytes(student.dtype)  # a batch of two


def test_left_padded_prompts_generate_what_each_does_alone(student):
    prompts = [prompt(1, length)[0] for length in (1, 3, 8, 21)]
    alone = [student.generate(ids[None], **GREEDY)[0, len(ids) :] for ids in prompts]
    ids = torch.stack([torch.cat([torch.zeros(21 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(21) >= 21 - len(p) for p in prompts]).long()
    assert torch.equal(student.generate(ids, attention_mask=mask, **GREEDY)[:, 21:], torch.stack(alone))
    assert torch.equal(
        student.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)[:, 21:], torch.stack(alone)
    )


def test_packed_documents_give_the_logits_of_the_documents_alone(student):
    ids, positions = prompt(2, 30), torch.cat([torch.arange(n) for n in (12, 1, 17)]).expand(2, -1)
    together = student(ids, position_ids=positions, use_cache=False).logits
    for start, end in [(0, 12), (12, 13), (13, 30)]:
        close(together[:, start:end], student(ids[:, start:end], use_cache=False).logits)


def test_saving_and_loading_change_nothing(student, tmp_path):
    student.save_pretrained(tmp_path)
    assert torch.equal(load_student(tmp_path)(prompt(1, 30)).logits, student(prompt(1, 30)).logits)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert "distill_window.py" in code
    assert "distill_attention.py" not in code


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_fed_the_teachers_states_a_wide_window_has_nothing_to_learn(how):
    """Called without the decoder: the masks for documents and padding are the mixer's own."""
    teacher = tiny("llama")
    teacher.set_attn_implementation(how)
    wide, narrow = (convert(teacher, mixer="sliding_window", window=size) for size in (30, 3))
    for student, least in ((wide, False), (narrow, True)):
        parts = HiddenObjective(teacher, student.requires_grad_(True), HiddenStage(tokens=1000)).parts(two_documents())
        losses = [part.loss_sum() for part in parts]
        assert len(losses) == 3
        assert all(bool(loss > 1e-3) is least for loss in losses)
    sum(losses).backward()
    for mixer in mixers_of(narrow).values():
        assert all(bool(parameter.grad.any()) for parameter in mixer.parameters())


def test_a_layer_fed_alone_is_the_layer_in_its_model(student):
    layers_alone_agree(student, two_documents())


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [3, OWN_WINDOW + 4])
def test_a_layer_with_a_window_of_its_own_never_sees_past_that(window, how):
    """In its model, fed alone, and fed in one piece without padding, where sdpa would be causal and no more."""
    teacher = teacher_with_a_window(how)
    student = convert(teacher, mixer="sliding_window", window=window, sinks=SINKS)
    layers_alone_agree(student, two_documents())
    ids = prompt(2, 20)
    seen = layer_traces(student, batch_of(ids), mixers_of(student), ["attention_input", "attention_output"])
    for index, mixer in mixers_of(student).items():
        trace = seen[index]
        alone, _ = mixer(trace.attention_input, position_embeddings=trace.position_embeddings)
        close(alone, trace.attention_output)
    for _, outputs in outputs_by_layer(teacher, student, batch_of(ids), "mixer"):
        made, wanted = outputs()
        assert torch.allclose(made, wanted, atol=1e-5) is (window > OWN_WINDOW)


def teacher_with_a_window(how: str) -> PreTrainedModel:
    """All of its layers see ``OWN_WINDOW`` tokens."""
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, head_dim=12, sliding_window=OWN_WINDOW, attn_implementation=how)
    return MistralForCausalLM(config).eval().requires_grad_(False)


def batch_of(ids: torch.Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return {"input_ids": ids, "position_ids": positions, "valid": torch.ones_like(ids, dtype=torch.bool)}


def test_what_it_remembers_is_counted():
    made = plan(tiny("llama").config, mixer="sliding_window", keep_attention=[1], window=WINDOW, sinks=SINKS)
    assert made.distill["mixer"]["window"] == WINDOW
    student = convert(tiny("llama"), mixer="sliding_window", keep_attention=[1], window=WINDOW, sinks=SINKS)
    counted = report(tiny("llama"), student)
    assert counted.state_bytes == 2 * (2 * 2 * 8) * (WINDOW + SINKS) * 4  # two layers, two heads of 8, keys and values


def test_what_is_not_for_it_is_refused():
    with pytest.raises(UserError, match="window and sinks are for sliding_window, not for mamba2"):
        convert(tiny("llama"), window=8)
    with pytest.raises(UserError, match="window is 0 and sinks 4; they are at least 1 and 0"):
        convert(tiny("llama"), mixer="sliding_window", window=0)
