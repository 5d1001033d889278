"""Layers put back into an aligned student are exactly the teacher's, as long as was asked, and nothing else changes."""

import pytest
import torch

from distill import convert, load_student
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.selection import hybrid, restored
from distill.student import mixers_of
from tests.conftest import tiny
from tests.distill.families.models import tiny as of_family
from tests.stages.alignment import packed_batch


def aligned(teacher):
    """A student without attention whose every weight, norms and MLPs included, is away from the teacher's."""
    student = convert(teacher)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def seen(model, batch=None):
    batch = batch or packed_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def at_layer(model, index, batch):
    """(what enters attention or mixer, what it adds) of one layer."""
    found = {}

    def keep(_module, args, kwargs, output):
        found["in"], found["out"] = (args[0] if args else kwargs["hidden_states"]), output[0]

    hook = attention_of(layers_of(model)[index]).register_forward_hook(keep, with_kwargs=True)
    seen(model, batch)
    hook.remove()
    return found["in"], found["out"]


@pytest.mark.parametrize("case", ["Llama", "GPT-2", "Falcon, new", "Gemma 2"])
def test_with_all_layers_back_a_seeded_student_is_its_teacher_bit_for_bit(case):
    teacher = of_family(case)
    student = convert(teacher)
    everything = range(len(layers_of(teacher)))
    assert not torch.equal(seen(student), seen(teacher))
    with restored(student, teacher, everything) as model:
        assert torch.equal(seen(model), seen(teacher))
    assert torch.equal(seen(hybrid(student, teacher, everything)), seen(teacher))


def test_what_was_put_back_does_to_its_input_what_the_teacher_s_layer_does(family):
    teacher, batch = tiny(family), packed_batch()
    student = aligned(teacher)
    with restored(student, teacher, [1]) as model:
        u_BTD, y_BTD = at_layer(model, 1, batch)
    positions = teacher.model.rotary_emb(u_BTD, batch["position_ids"])
    document_BT = (batch["position_ids"] == 0).cumsum(1)
    length = u_BTD.shape[1]
    sees_BTS = (document_BT[:, :, None] == document_BT[:, None, :]) & torch.ones(length, length).tril().bool()
    with torch.no_grad():
        expected, _ = layers_of(teacher)[1].self_attn(
            hidden_states=u_BTD, position_embeddings=positions, attention_mask=sees_BTS[:, None]
        )
    torch.testing.assert_close(y_BTD, expected)


def test_a_student_made_of_it_says_the_same_and_is_an_ordinary_student(family, tmp_path):
    teacher = tiny(family)
    student = aligned(teacher)
    made = hybrid(student, teacher, [0, 2])
    with restored(student, teacher, [0, 2]) as model:
        assert torch.equal(seen(made), seen(model))
    assert made.config.distill["layers"] == ["attention", "mamba2", "attention"]
    assert list(mixers_of(made)) == [1]
    made.save_pretrained(tmp_path)
    assert torch.equal(seen(load_student(tmp_path)), seen(made))
    prompt = packed_batch()["input_ids"][:1, :5]
    with torch.no_grad():
        written = made.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert written[0, 5] == made(prompt).logits[0, -1].argmax()


def test_neither_the_student_nor_the_teacher_is_changed_by_either():
    teacher = tiny("llama")
    student = aligned(teacher)
    before, theirs = seen(student), seen(teacher)
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(RuntimeError, match="on the way"), restored(student, teacher, [1]):
        raise RuntimeError("on the way")
    made = hybrid(student, teacher, [1])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(seen(student), before)
    assert torch.equal(seen(teacher), theirs)
    assert student.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert student.config.distill["layers"] == ["mamba2"] * 3


def test_a_teacher_in_16_bits_lends_layers_in_the_student_s_precision():
    teacher = tiny("llama").to(torch.bfloat16)
    student = convert(tiny("llama"))
    with restored(student, teacher, [1]) as model:
        logits = seen(model)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, seen(hybrid(student, teacher, [1])))
    assert teacher.dtype == torch.bfloat16


def test_what_does_not_go_together_is_refused():
    teacher = tiny("llama")
    student = convert(teacher)
    for layers in ([3], [-1]):
        with pytest.raises(UserError, match=f"layer {layers[0]} cannot be put back: the teacher has 3, numbered"):
            hybrid(student, teacher, layers)
    with (
        pytest.raises(UserError, match="from the Transformer that it was converted from"),
        restored(teacher, teacher, [0]),
    ):
        pass
    with pytest.raises(UserError, match="from the Transformer that it was converted from"):
        hybrid(student, student, [0])
