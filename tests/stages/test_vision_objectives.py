"""The three losses on image-text batches: what a plain forward gives, and padding in none of them."""

import pytest
import torch
from torch.nn import functional as F

from distill import convert
from distill.capture import layer_traces
from distill.decoder import attention_of, layers_of
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.roles import roles
from distill.student import mixers_of
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.vision_models import CAUSAL, IMAGE, MODELS, image_batch, row_of, tiny_vision

SETTINGS = {"tokens": 1000}
LENGTHS = (17, 12, 14)
TOWERS = ("vision_tower", "vision_model", "visual")
OBJECTIVES = {
    "mixing": lambda teacher, student: MixingObjective(teacher, student, MixingStage(**SETTINGS)),
    "hidden": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS)),
    "hidden block": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS, target="block")),
    "hidden heads": lambda teacher, student: HiddenObjective(teacher, student, HiddenStage(**SETTINGS, target="heads")),
    "logits": lambda teacher, student: LogitObjective(teacher, student, LogitsStage(**SETTINGS)),
    "both": lambda teacher, student: LogitObjective(teacher, student, LogitsStage(**SETTINGS, hidden_weight=0.5)),
}


def as_stages_get(batch: dict) -> dict:
    """With labels for all text and a boolean mask, as ``ImageTextRows`` gives them."""
    valid = batch["attention_mask"].bool()
    labels = torch.where(valid & (batch["input_ids"] != IMAGE), batch["input_ids"], -100)
    labels[:, 0] = -100
    return {**{k: v for k, v in batch.items() if k != "attention_mask"}, "labels": labels, "valid": valid}


def pair(name: str):
    teacher = tiny_vision(name)
    student = convert(teacher, keep_attention=[1], bidirectional="causal").train()
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in student.get_decoder().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher, student


def total(objective, batch) -> torch.Tensor:
    return torch.stack([part() for _, part in objective.parts(batch)]).sum()


@pytest.mark.parametrize("which", OBJECTIVES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_padded_batch_has_the_losses_of_its_rows_alone(name, which):
    teacher, student = pair(name)
    objective = OBJECTIVES[which](teacher, student)
    batch = image_batch(name, LENGTHS)
    together = total(objective, as_stages_get(batch))
    alone = [as_stages_get(row_of(name, batch, row, slice(0, length))) for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(together, torch.stack([total(objective, row) for row in alone]).sum())
    assert objective.weight(as_stages_get(batch)) == sum(objective.weight(row) for row in alone)
    together.backward()
    trained = [p for layer in mixers_of(student).values() for p in layer.parameters() if p.grad is not None]
    assert trained
    assert all(parameter.grad.isfinite().all() for parameter in trained)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_are_captured_as_they_run_in_a_plain_forward(name):
    teacher, batch = tiny_vision(name), image_batch(name, LENGTHS)
    seen: dict[int, tuple] = {}
    handles = [
        attention_of(layer).register_forward_hook(
            lambda _m, _a, kwargs, output, index=index: seen.update({index: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers_of(teacher))
    ]
    teacher(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    traces = layer_traces(teacher, as_stages_get(batch), range(3))
    for index, trace in traces.items():
        assert torch.equal(trace.attention_input, seen[index][0])
        assert torch.equal(trace.attention_output, seen[index][1])


@pytest.mark.parametrize("name", CAUSAL)
def test_mixing_is_the_distance_to_the_teachers_own_matrices(name):
    """Image tokens, padding, rotation in three directions: the matrices that eager attention says it used."""
    teacher, student = pair(name)
    eager = tiny_vision(name)
    eager.set_attn_implementation({"": "eager", "text_config": "eager"})
    batch = image_batch(name, LENGTHS)
    traces = layer_traces(teacher, as_stages_get(batch), range(3), ["attention_input"])
    attentions = eager(**batch, output_attentions=True, use_cache=False).attentions
    got = {part: distance() for part, distance in OBJECTIVES["mixing"](teacher, student).parts(as_stages_get(batch))}
    for index, mixer in mixers_of(student).items():
        expected = 0.0
        for row, length in enumerate(LENGTHS):
            ours = mixer.mixing_matrix(traces[index].attention_input[row : row + 1, :length])[0]
            theirs = attentions[index][row, :, :length, :length]
            expected += (ours - theirs).square().sum((1, 2)).sqrt().mean()
        torch.testing.assert_close(got[f"layers.{index}"], expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_compared_where_labels_say_and_nowhere_else(name):
    teacher, student = pair(name)
    batch = image_batch(name, LENGTHS)
    given = as_stages_get(batch)
    scored = given["labels"][:, 1:] != -100
    theirs, ours = (
        model(**batch, use_cache=False).logits[:, :-1][scored].log_softmax(-1) for model in (teacher, student)
    )
    expected = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    torch.testing.assert_close(total(OBJECTIVES["logits"](teacher, student), given), expected)


def test_a_batch_without_images_has_a_gradient_for_what_only_images_reach():
    """Of zeros: a process that has none would keep the others waiting for it."""
    teacher, student = pair("llava")
    ids = torch.randint(10, 97, (2, 9))
    batch = as_stages_get({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    connector, tower = student.model.multi_modal_projector, student.model.vision_tower.requires_grad_(False)
    total(OBJECTIVES["logits"](teacher, student), batch).backward()
    assert all((parameter.grad == 0).all() for parameter in connector.parameters())
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_frozen_tower_runs_once_for_teacher_and_student(name):
    teacher, student = pair(name)
    batch, seen = as_stages_get(image_batch(name, LENGTHS)), []
    tower = next(module for part, module in student.named_modules() if part.split(".")[-1] in TOWERS)
    tower.register_forward_hook(lambda *_: seen.append(1))
    losses = []
    for frozen in (False, True):
        for parameter, role in roles(student).items():
            if role in ("connector", "vision"):
                student.get_parameter(parameter).requires_grad_(not frozen)
        losses.append(total(OBJECTIVES["logits"](teacher, student), batch))
        assert len(seen) == 1  # no second time when frozen
    assert torch.equal(*losses)
