"""Vision-language students of every family: exact where attention is kept, cached as uncached, padding, positions."""

import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from distill import UserError, convert, load_student
from distill.checks import check_weights
from distill.conversion import convert_with_report, empty_model, plan, report, unset_model
from distill.engines import placement
from distill.head import final_states, head_of
from distill.roles import roles
from distill.stored_weights import StoredWeights
from distill.vision import model_arguments, packed_positions, places, read_both_ways
from distill.weight_files import stored_tensors
from distill.weight_names import names_in
from tests.conftest import disturbed
from tests.vision_models import CAUSAL, IMAGE, MODELS, image_batch, row_of, tiny_vision

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
EVERY = sorted(MODELS)
M_ROPE = ("qwen2_vl", "qwen2_5_vl")


def student_of(name: str, keep=(), rope: str = "drop"):
    """A converted model with mixers as if they were trained."""
    return disturbed(convert(tiny_vision(name), keep_attention=keep, rope=rope, bidirectional="causal"))


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", EVERY)
def test_with_all_attention_kept_the_student_is_the_teacher_bit_for_bit(name):
    teacher = tiny_vision(name)
    student = convert(teacher, keep_attention=range(3))
    text = {"input_ids": image_batch(name)["input_ids"].clamp(min=10)}
    for batch in (image_batch(name), image_batch(name, left=True), text):
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
        assert torch.equal(student(**batch, use_cache=False).logits, teacher(**batch, use_cache=False).logits)
    prompts = image_batch(name, left=True)
    assert torch.equal(student.generate(**prompts, **GREEDY), teacher.generate(**prompts, **GREEDY))


def test_nothing_is_dropped_in_training_in_no_part():
    teacher = tiny_vision("llava")
    teacher.config.text_config.attention_dropout = teacher.config.vision_config.attention_dropout = 0.1
    student = convert(teacher, keep_attention=[1]).train()
    batch = image_batch("llava")
    assert torch.equal(student(**batch).logits, student(**batch).logits)
    assert teacher.config.text_config.attention_dropout == 0.1, "the teacher's config is its own"


@pytest.mark.parametrize(("keep", "rope"), [((), "drop"), ((1,), "drop"), ((), "keep")], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_a_student_generates_cached_as_uncached_and_as_each_row_alone(name, keep, rope):
    student = student_of(name, keep, rope)
    lengths = (17, 12, 14)
    batch = image_batch(name, lengths, left=True)
    cached = student.generate(**batch, **GREEDY)
    assert torch.equal(cached, student.generate(**batch, **GREEDY, use_cache=False))
    if name.startswith("paligemma"):
        return  # left padding is part of the prefix there, in the teacher too
    for row, length in enumerate(lengths):
        alone = row_of(name, batch, row, slice(-length, None))
        assert torch.equal(student.generate(**alone, **GREEDY)[0, length:], cached[row, max(lengths) :])


@pytest.mark.parametrize("name", EVERY)
def test_saving_and_loading_change_nothing(name, tmp_path):
    student = student_of(name, (1,))
    student.save_pretrained(tmp_path)
    batch = image_batch(name)
    for loaded in (load_student(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert type(loaded) is type(student)
        assert torch.equal(loaded(**batch).logits, student(**batch).logits)
    assert "distill" not in student.config.get_text_config().to_dict()


def test_a_stock_checkpoint_is_loaded_as_it_was_saved_and_then_converted(tmp_path):
    """Loaded with a subclass, Qwen's renamed keys would be missing without a word."""
    teacher = tiny_vision("qwen2_5_vl")
    teacher.save_pretrained(tmp_path)
    batch = image_batch("qwen2_5_vl")
    assert torch.equal(convert(tmp_path, keep_attention=range(3))(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("name", EVERY)
def test_what_stands_behind_padding_or_in_it_has_no_say(name):
    student = student_of(name, (1,))
    batch = image_batch(name, (17, 12, 12))
    noisy = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 77)}
    valid = batch["attention_mask"].bool()
    close(student(**noisy).logits[valid], student(**batch).logits[valid])
    shifted = image_batch(name, (17, 12, 12), left=True)
    if not name.startswith("paligemma"):
        behind = shifted["attention_mask"].bool()
        got, expected = (student(**b, use_cache=False).logits for b in (shifted, batch))
        close(got[behind], expected[valid])


@pytest.mark.parametrize("name", M_ROPE)
def test_positions_inside_an_image_are_no_document_borders(name):
    student = student_of(name)
    batch = image_batch(name)
    expected = student(**batch).logits
    given = {"mm_token_type_ids": batch["mm_token_type_ids"], "image_grid_thw": batch["image_grid_thw"]}
    positions, _ = student.model.get_rope_index(batch["input_ids"], attention_mask=batch["attention_mask"], **given)
    assert (positions.diff(dim=-1) != 1).any()  # they stand still and jump
    text = torch.arange(17).expand(1, 3, -1)
    assert places(positions) is None
    assert torch.equal(places(torch.cat([text, positions])), text[0])
    close(student(**batch, position_ids=positions).logits, expected)
    # All mixers, so that what positions there are cannot matter: only as borders would they.
    close(student(**batch, position_ids=torch.cat([text, positions])).logits, expected)


@pytest.mark.parametrize("name", sorted({"llava", "qwen2_vl", "gemma3"}))
@pytest.mark.parametrize("keep", [(), (0, 1, 2)], ids=str)
def test_packed_text_gives_what_its_documents_give_alone_in_teacher_and_student(name, keep):
    torch.manual_seed(4)
    ids, lengths = torch.randint(10, 97, (2, 30)), (13, 1, 16)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = {"input_ids": ids, "position_ids": positions, "valid": torch.ones_like(ids).bool()}
    student = student_of(name, keep)
    for model in (tiny_vision(name), student):
        together, start = final_states(model, packed), 0
        for length in lengths:
            piece = slice(start, start + length)
            one = {"input_ids": ids[:, piece], "position_ids": positions[:, piece], "valid": packed["valid"][:, piece]}
            close(together[:, piece], final_states(model, one))
            start += length
    close(student(ids, position_ids=positions, use_cache=False).logits[:, 14:], student(ids[:, 14:]).logits)


def test_only_positions_in_three_directions_are_told_twice():
    positions = torch.arange(5)[None]
    assert packed_positions(tiny_vision("llava").config, positions) is positions
    assert packed_positions(tiny_vision("qwen2_vl").config, positions).shape == (4, 1, 5)


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_a_role_and_the_tower_is_no_attention(name):
    teacher = tiny_vision(name)
    student = convert(teacher, keep_attention=[1], bidirectional="causal")
    by_name = roles(student)
    decoder = next(n for n, module in student.named_modules() if module is student.get_decoder())
    for parameter, role in by_name.items():
        inside = parameter.startswith(decoder) or parameter == "lm_head.weight"
        assert (role in ("connector", "vision")) != inside, (parameter, role)
    assert {"mixer", "attention", "connector", "vision"} <= set(by_name.values())
    theirs = teacher.state_dict()
    for key, tensor in student.state_dict().items():
        if by_name.get(key) != "mixer":
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", EVERY)
def test_what_is_read_in_both_directions_is_what_a_probe_shows(name):
    """A disturbance of the decoder's input at a late image or prompt token, seen from the tokens before it."""
    model, batch = tiny_vision(name), image_batch(name, (17,))
    last_image = 2 + 4 - 1  # of the first image
    before = final_states_disturbed(model, batch, None)
    sees = {
        place: bool((final_states_disturbed(model, batch, place) - before)[:, :place].abs().max() > 0)
        for place in (last_image, 13, 16)  # in the image; in the prompt; in the answer
    }
    reads = read_both_ways(model.config)
    assert (reads is not None) == any(sees.values())
    assert sees[16] is False
    if name == "gemma3":
        assert sees[last_image]
        assert not sees[13]


def final_states_disturbed(model, batch, place):
    def disturb(_decoder, args, kwargs):
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()
        kwargs["inputs_embeds"][:, place] += 1.0
        return args, kwargs

    handle = model.get_decoder().register_forward_pre_hook(disturb, with_kwargs=True) if place is not None else None
    out = model.base_model(**batch, use_cache=False).last_hidden_state
    if handle is not None:
        handle.remove()
    return out


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(CAUSAL)))
def test_what_reads_both_ways_is_refused_unless_it_is_asked_for(name):
    teacher = tiny_vision(name)
    with pytest.raises(UserError, match=r"in both directions.*student\.bidirectional: causal"):
        plan(teacher.config, keep_attention=[1])
    plan(teacher.config, keep_attention=range(3))
    plan(teacher.config, keep_attention=[1], bidirectional="causal")


def test_another_vision_language_family_is_refused_by_name():
    from transformers import LlavaNextConfig

    with pytest.raises(UserError, match=r"type 'llava_next'; supported are gemma3, idefics3, llava"):
        plan(LlavaNextConfig())


@pytest.mark.parametrize("name", EVERY)
def test_the_head_is_found_and_a_report_counts(name):
    teacher = tiny_vision(name)
    student, made = convert_with_report(teacher, keep_attention=[1], bidirectional="causal")
    assert head_of(student) is not None
    assert made.parameters_before["vision"] == made.parameters_after["vision"] > 0
    assert sum(made.parameters_after.values()) == sum(parameter.numel() for parameter in student.parameters())
    empty = report(empty_model(teacher.config), empty_model(student.config))
    assert empty.parameters_after == made.parameters_after


def test_a_failed_call_leaves_nothing_behind():
    student = student_of("llava")
    batch = image_batch("llava")
    with pytest.raises(ValueError, match="do not match"):
        student(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    ids = torch.randint(10, 97, (1, 9))
    close(student.get_decoder()(ids).last_hidden_state, student.base_model(ids).last_hidden_state)


def test_a_student_pickles_and_trains_with_checkpointing():
    student = student_of("qwen2_vl", (1,)).train()
    batch = image_batch("qwen2_vl")
    again = pickle.loads(pickle.dumps(student))
    gradients = []
    for model in (student, again):
        if model is again:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.get_decoder().layers.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_all_that_a_processor_returns_reaches_the_model():
    batch = {"input_ids": 1, "valid": torch.ones(1, 2).bool(), "labels": 2, "token_type_ids": 3, "image_sizes": 4}
    given = model_arguments(tiny_vision("llava").config, batch)
    assert set(given) == {"input_ids", "attention_mask", "token_type_ids", "image_sizes"}


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"llava-mistral", "paligemma2"}))
def test_checkpoints_under_older_names_are_read_tensor_by_tensor(name, tmp_path):
    """As transformers stores these families to this day; the sharding engines and the check before a run read files."""
    teacher = tiny_vision(name)
    teacher.save_pretrained(tmp_path)
    check_weights(stored_tensors(tmp_path), teacher.config, tmp_path)
    filled = unset_model(teacher.config, torch.float32)
    placement._fill(filled, StoredWeights(tmp_path, filled.base_model_prefix, names_in(filled)))
    for key, tensor in teacher.named_parameters():
        assert torch.equal(dict(filled.named_parameters())[key], tensor), key


WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["distill"] = None
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
batch, arguments = torch.load(sys.argv[2])
torch.save([model(**batch).logits, model.generate(**batch, **arguments)], sys.argv[3])
"""


@pytest.mark.slow
def test_a_folder_loads_where_this_package_is_not(tmp_path):
    """In a fresh interpreter; one family, the one with positions of its own: the code in the folder is the same."""
    student, batch = student_of("qwen2_5_vl", (1,)), image_batch("qwen2_5_vl", left=True)
    student.save_pretrained(tmp_path / "student")
    torch.save([batch, GREEDY], tmp_path / "batch.pt")
    places = [tmp_path / name for name in ("student", "batch.pt", "out.pt")]
    environment = {"HF_HOME": str(tmp_path / "hub"), "PATH": "", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, *places]
    subprocess.run(program, check=True, cwd=tmp_path, env=environment, capture_output=True)
    logits, generated = torch.load(tmp_path / "out.pt")
    close(logits, student(**batch).logits)
    assert torch.equal(generated, student.generate(**batch, **GREEDY))
