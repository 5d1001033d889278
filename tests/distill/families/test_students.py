"""A half-converted student of every family: trains in every stage, saves, loads, generates, and is planned."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import activations, convert, load_student
from distill.attention import views
from distill.capture import layer_traces
from distill.conversion import empty_model, plan, report
from distill.costs import flops_per_token, sizes_of
from distill.decoder import layers_of, learns_positions
from distill.objectives import attention_matrix, mixing_distance
from distill.reach import trained
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.student import mixers_of
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import disturbed
from tests.distill.families.models import EVERY, config, tiny

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
SETTINGS = {"tokens": 1000}
STAGES = {
    "mixing": (MixingObjective, MixingStage(**SETTINGS)),
    "hidden": (HiddenObjective, HiddenStage(**SETTINGS)),
    "hidden block": (HiddenObjective, HiddenStage(**SETTINGS, target="block")),
    "logits": (LogitObjective, LogitsStage(**SETTINGS)),
}
teacher_of = functools.cache(tiny)


@functools.cache
def student_of(case):
    """Half converted, its mixers away from where they were seeded; tests leave it as it is."""
    return disturbed(convert(teacher_of(case), keep_attention=[1]), by=0.05)


def batch_of(*rows):
    """One row for each tuple of document lengths; all of one length."""
    torch.manual_seed(4)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    ids = torch.randint(3, 97, positions.shape)
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "valid": torch.ones_like(ids).bool()}


def loss_of(objective, batch):
    return sum(part.loss_sum() for part in objective.parts(batch)) / objective.weight(batch)


@pytest.mark.support("all stages")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", EVERY)
def test_a_step_lowers_the_loss_of_every_stage(case, stage):
    objective_class, settings = STAGES[stage]
    student = convert(teacher_of(case), keep_attention=[1], seed_from_attention=False)
    objective, batch = objective_class(teacher_of(case), student, settings), batch_of((24,), (9, 1, 14))
    parameters = trained(student, settings)
    before = loss_of(objective, batch)
    gradients = torch.autograd.grad(before, list(parameters.values()), allow_unused=True)
    without = [name for name, found in zip(parameters, gradients, strict=True) if found is None]
    # A router's or an expert's gradient depends on what is chosen; a bias of keys moves no softmax.
    assert not [name for name in without if "expert" not in name], without
    with torch.no_grad():
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            if gradient is not None:
                parameter.sub_(1e-4 * gradient.sign())
    assert loss_of(objective, batch) < before


@pytest.mark.parametrize("case", ["Gemma 2", "GPT-NeoX", "OLMo 2", "Phi-3"])
def test_stage_1_matches_the_matrix_that_the_view_describes(case):
    """Cap, window, norms and partial rotation all reach the loss."""
    student, batch = student_of(case), batch_of((24,))
    objective = MixingObjective(teacher_of(case), student, MixingStage(**SETTINGS))
    traces = layer_traces(teacher_of(case), batch, [0, 2], wants=["attention_input"])
    with torch.no_grad():
        for part, (index, mixer) in zip(objective.parts(batch), mixers_of(student).items(), strict=True):
            seen, u = views(teacher_of(case), [index])[index], traces[index].attention_input
            q, k = seen.queries_and_keys(u, traces[index].position_embeddings)
            look = {"window": seen.sliding_window, "softcap": seen.softcap}
            teacher_matrix = attention_matrix(q, k, scaling=seen.scaling, **look)
            expected = mixing_distance(mixer.mixing_matrix(u), teacher_matrix, form=MixingStage(**SETTINGS).form)
            torch.testing.assert_close(part.loss_sum(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.support("all stages")
@pytest.mark.parametrize("case", EVERY)
def test_documents_packed_into_a_row_cost_what_they_cost_alone(case):
    student = student_of(case)
    objective = HiddenObjective(teacher_of(case), student, HiddenStage(**SETTINGS, target="block"))
    packed = batch_of((9, 15))
    alone = [{name: rows[:, cut] for name, rows in packed.items()} for cut in (slice(0, 9), slice(9, 24))]

    def total(batch):
        return sum(part.loss_sum() for part in objective.parts(batch))

    with torch.no_grad():
        torch.testing.assert_close(total(packed), sum(map(total, alone)), rtol=1e-4, atol=1e-4)


@pytest.mark.support("saves, loads")
@pytest.mark.parametrize("case", EVERY)
def test_a_saved_student_is_the_same(case, tmp_path):
    student, ids = student_of(case), torch.arange(30).view(2, 15) + 5
    student.save_pretrained(tmp_path)
    expected = student(ids).logits
    for load in (load_student, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(tmp_path)(ids).logits, expected)


@pytest.mark.support("generates")
@pytest.mark.parametrize("case", EVERY)
def test_with_and_without_a_cache_padded_and_alone(case):
    student = student_of(case)
    torch.manual_seed(8)
    ids = torch.randint(3, 97, (3, 9))
    lengths = (9, 4, 7)
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    padded = ids * mask
    cached = student.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(student.generate(padded, attention_mask=mask, use_cache=False, **GREEDY), cached)
    for row, length in enumerate(lengths):
        alone = student.generate(ids[row : row + 1, 9 - length :], **GREEDY)[0, length:]
        # A row that ended is padded to the others' length.
        assert torch.equal(cached[row, 9 : 9 + len(alone)], alone)


@pytest.mark.support("plan")
@pytest.mark.parametrize("case", EVERY)
def test_planning_needs_a_config_and_no_weights(case):
    teacher = config(*EVERY[case])
    student = empty_model(plan(teacher, keep_attention=[1]))
    counts = report(empty_model(teacher), student)
    assert counts.parameters_before == report(teacher_of(case), student_of(case)).parameters_before
    sizes = sizes_of(student, 16, counts.parameters_before, counts.parameters_after)
    assert sizes.idle < sum(counts.parameters_before.values())
    for _, settings in STAGES.values():
        assert flops_per_token(sizes, settings) > 0
    for layer in layers_of(student)[:2]:
        assert activations.of_layer(layer, 32, 16, torch.float32).a_sequence > 0


@pytest.mark.parametrize("case", ["Falcon, new", "GPT-2", "Llama"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_computed_again_know_which_call_they_belong_to(case, reentrant):
    """Two differently padded batches, forward both, then backward both."""

    def gradients(checkpointing):
        student = convert(teacher_of(case), keep_attention=[1]).train().requires_grad_(True)
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.enable_input_require_grads()
        ids, positions = torch.arange(20).view(2, 10) + 3, torch.arange(10)[None]
        masks = (torch.ones(2, 10).long(), torch.tensor([[0] * 6 + [1] * 4, [0] * 2 + [1] * 8]))
        losses = [
            student(ids, attention_mask=mask, position_ids=positions, use_cache=False)
            .logits[mask.bool()]
            .square()
            .sum()
            for mask in masks
        ]
        for loss in losses:
            loss.backward()
        return {name: parameter.grad for name, parameter in student.named_parameters()}

    expected = gradients(checkpointing=False)
    for name, gradient in gradients(checkpointing=True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "end"), [("GPT-2", True), ("Llama", False)])
def test_a_student_of_mixers_alone_has_a_longest_text_where_positions_are_learned(case, end):
    assert learns_positions(teacher_of(case)) == learns_positions(convert(teacher_of(case))) == end
