"""Objectives of mmMamba and MaTVLM: heads before the output projection, frozen projections, layers beside logits."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.engines.plain import PlainEngine
from distill.reach import reached
from distill.recipe import HiddenStage
from distill.roles import roles
from distill.student import mixers_of
from distill.training import parameter_groups
from distill.training.gradients import Gradients
from stages.hidden import HiddenObjective
from tests.stages.alignment import (
    OBJECTIVES,
    SETTINGS,
    JointEngine,
    close,
    documents,
    head_outputs,
    losses,
    packed_batch,
    random_student,
    random_teacher,
    rest_of_block,
    rotation,
    showing,
)


@pytest.fixture(params=["qwen2", "mistral with a window"])
def teacher(request) -> PreTrainedModel:
    return random_teacher(request.param)


@pytest.fixture
def eager(teacher) -> PreTrainedModel:
    return showing(copy.deepcopy(teacher))


@pytest.fixture(params=[("mamba2", "keep"), ("discrete_mamba2", "drop")], ids="-".join)
def student(request, teacher) -> PreTrainedModel:
    mixer, rope = request.param
    return random_student(teacher, mixer=mixer, rope=rope)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return packed_batch()


def test_hidden_of_heads_is_the_error_of_what_enters_the_output_projections(student, teacher, eager, batch):
    mixers = mixers_of(student)
    expected = dict.fromkeys(mixers, torch.zeros(()))
    for _, ids in documents(batch):
        seen = eager(ids, output_attentions=True, output_hidden_states=True)
        for index, mixer in mixers.items():
            layer, entered = eager.model.layers[index], []
            u = layer.input_layernorm(seen.hidden_states[index])
            hook = mixer.out_proj.register_forward_pre_hook(lambda _, args, entered=entered: entered.append(args[0]))
            mixer(u, position_embeddings=rotation(eager, torch.arange(ids.shape[1])[None]))
            hook.remove()
            wanted = head_outputs(layer.self_attn, u, seen.attentions[index][0])
            expected[index] = expected[index] + (entered[0] - wanted).square().mean(dim=-1).sum()
    close(losses(OBJECTIVES["hidden heads"](teacher, student), batch), expected)


def test_logits_add_the_weighted_distances_of_blocks_at_scored_tokens(student, teacher, eager, batch):
    """Beside the student's own layers on the teacher's states, one document after the other."""
    expected = dict.fromkeys(mixers_of(student), torch.zeros(()))
    for _, ids in documents(batch):
        states = list[Tensor]()  # before the first layer and behind each
        hooks = [
            layer.register_forward_hook(lambda _, args, out, states=states: states.extend([*args, out][bool(states) :]))
            for layer in eager.model.layers
        ]
        eager(ids)
        for hook in hooks:
            hook.remove()
        for index, mixer in mixers_of(student).items():
            ours, h = student.model.layers[index], states[index]
            turn = rotation(eager, torch.arange(ids.shape[1])[None])
            got = rest_of_block(ours, h + mixer(ours.input_layernorm(h), position_embeddings=turn)[0])
            apart = (got - states[index + 1]).norm(dim=-1)[0, :-1]  # the last token of a document predicts nothing
            expected[index] = expected[index] + 0.3 * apart.sum()
    both, plain = (losses(OBJECTIVES[name](teacher, student), batch) for name in ("logits and hidden", "logits"))
    assert both.pop("logits") == plain["logits"]
    close(both, expected)


@pytest.mark.parametrize("stage", ["hidden", "hidden heads", "hidden block"])
def test_frozen_projections_have_no_gradient_and_all_else_has_its_own(student, teacher, batch, stage):
    settings = OBJECTIVES[stage](teacher, student).settings
    settings = settings.model_copy(update={"projections_frozen": 0.5, "weight_decay": 0.0})
    found = {}
    for done in (0.0, 0.49, 0.5, 0.9):
        objective = HiddenObjective(teacher, student, settings)
        objective.begin(done)
        engine = JointEngine(student, [{"params": list(student.parameters())}], layerwise=True)
        loss, _ = Gradients(objective, engine, torch.device("cpu"), torch.float32).backward([batch], lambda: False)
        found[done] = loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        engine.forget()
    assert found[0.0][0] == found[0.49][0] == found[0.5][0]
    frozen, trained = found[0.49][1], found[0.5][1]
    assert frozen.keys() == trained.keys()
    for name in frozen:
        assert torch.equal(frozen[name], found[0.0][1][name])
        assert torch.equal(trained[name], found[0.9][1][name])
        gradient, whole = frozen[name].clone(), trained[name].clone()
        if name.endswith("in_proj.weight"):
            rows = mixers_of(student)[int(name.split("layers.")[1][0])].in_rows()
            for part in ("x", "B", "C"):
                assert not gradient[rows[part]].any()
                assert whole[rows[part]].any()
                whole[rows[part]] = 0
        if "input_layernorm" not in name:  # which the recipe does not let train beside frozen projections
            assert torch.equal(gradient, whole), name


def test_frozen_projections_stay_to_the_last_bit_under_adamw(student, teacher, batch):
    """Three steps of six: the rows that make x, B and C are what they were, then they move."""
    settings = HiddenStage(**SETTINGS, target="heads", projections_frozen=0.5, weight_decay=0.0)
    objective = HiddenObjective(teacher, student, settings)
    groups = parameter_groups(
        student, roles(student).__getitem__, ["mixer"], lr=1e-2, weight_decay=0.0, reached=reached(student, settings)
    )
    engine = PlainEngine(student, groups)
    mixer = mixers_of(student)[0]
    before = {part: mixer.in_proj.weight[rows].clone() for part, rows in mixer.in_rows().items()}
    for step in range(6):
        objective.begin(step / 6)
        Gradients(objective, engine, torch.device("cpu"), torch.float32).backward([batch], lambda: False)
        engine.step(None)
        for part, rows in mixer.in_rows().items():
            is_same = torch.equal(mixer.in_proj.weight[rows], before[part])
            assert is_same == (part in ("x", "B", "C") and step < 3), (part, step)
