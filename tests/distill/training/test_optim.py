"""Which parameters train, which are decayed, and the shape of the schedules."""

import math

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.training.optim import SCHEDULES, parameter_groups, schedule


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4, 8)
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8)
        self.conv_weight = nn.Parameter(torch.ones(8, 4))
        self.A_log = nn.Parameter(torch.ones(2, 2))
        self.D = nn.Parameter(torch.ones(2))
        self.dt_bias = nn.Parameter(torch.ones(2))
        self.norm = nn.RMSNorm(8)


class Student(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mixer = Mixer()
        self.mlp = nn.Linear(4, 4)
        self.experts = nn.Parameter(torch.ones(3, 4, 4))
        self.experts_bias = nn.Parameter(torch.ones(3, 4))
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def role_of(name: str) -> str:
    roles = {"embed": "embeddings", "mixer": "mixer", "head": "head"}
    return roles.get(name.split(".")[0], "mlp")


def names(student: nn.Module, groups: list[dict]) -> dict[str, set[str]]:
    by_id = {id(parameter): name for name, parameter in student.named_parameters()}
    return {group["name"]: {by_id[id(parameter)] for parameter in group["params"]} for group in groups}


def test_only_matrices_are_decayed():
    student = Student()
    groups = parameter_groups(student, role_of, None, lr=1.0, mixer_lr=2.0, weight_decay=0.3)
    found = names(student, groups)
    assert found["mixer"] == {"mixer.in_proj.weight"}
    assert found["rest"] == {"mlp.weight", "experts", "head.weight"}
    assert sum(map(len, found.values())) == len(list(student.parameters()))
    by_name = {group["name"]: group for group in groups}
    assert {name: group["lr"] for name, group in by_name.items()} == {
        "mixer": 2.0, "mixer, no decay": 2.0, "rest": 1.0, "rest, no decay": 1.0,
    }  # fmt: skip
    assert {name: group["weight_decay"] for name, group in by_name.items()} == {
        "mixer": 0.3, "mixer, no decay": 0.0, "rest": 0.3, "rest, no decay": 0.0,
    }  # fmt: skip
    torch.optim.AdamW(groups)


def test_what_is_not_named_is_frozen_and_thaws_again():
    student = Student()
    groups = parameter_groups(student, role_of, ["mixer"], lr=1.0)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == set().union(*names(student, groups).values())
    assert {name.split(".")[0] for name in trained} == {"mixer"}
    parameter_groups(student, role_of, None, lr=1.0)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_tied_embeddings_appear_once_and_are_not_decayed():
    student = Student(tied=True)
    groups = parameter_groups(student, role_of, None, lr=1.0)
    found = [parameter for group in groups for parameter in group["params"]]
    assert sum(parameter is student.embed.weight for parameter in found) == 1
    assert "embed.weight" in names(student, groups)["rest, no decay"]
    torch.optim.AdamW(groups)


def test_a_role_without_parameters_is_named_when_asked_for():
    with pytest.raises(UserError, match=r"names attention,.*it has: embeddings, head, mixer, mlp"):
        parameter_groups(Student(), role_of, ["mixer", "attention"], lr=1.0)
    with pytest.raises(UserError, match="a head tied to the embeddings counts as embeddings"):
        parameter_groups(Student(tied=True), role_of, ["head"], lr=1.0)


def test_a_role_without_parameters_is_skipped_when_it_is_a_default():
    groups = parameter_groups(Student(), role_of, ["mixer", "attention"], lr=1.0, asked=False)
    assert [group["name"] for group in groups] == ["mixer", "mixer, no decay"]
    with pytest.raises(UserError, match="nothing would train"):
        parameter_groups(Student(), role_of, ["attention"], lr=1.0, asked=False)


def test_wsd_rises_stays_and_falls():
    got = [schedule(step, 10, "wsd", 0.3, 0.2) for step in range(10)]
    assert got == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    floored = [schedule(step, 10, "wsd", 0.0, 0.5, 0.1) for step in range(10)]
    assert floored[:5] == [1] * 5
    steps_down = [before - after for before, after in zip(floored[4:], [*floored[5:], 0.1], strict=True)]
    assert steps_down == pytest.approx([0.15] * 6)


def test_cosine_falls_by_half_a_cosine():
    got = [schedule(step, 9, "cosine", 0.0, min_ratio=0.2) for step in range(9)]
    assert got == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * (step + 1) / 10)) / 2 for step in range(9)])
    warm = [schedule(step, 100, "cosine", 0.1) for step in range(100)]
    assert max(warm) == warm[10] > 0.999
    assert warm[:10] == sorted(warm[:10])
    assert warm[10:] == sorted(warm[10:], reverse=True)


def test_constant_only_warms_up():
    assert [schedule(step, 4, "constant", 0.5) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("fractions", [(0, 0), (0.1, 0.1), (0.5, 0.5), (1, 0), (0, 1)])
def test_no_step_is_wasted_and_none_exceeds_the_peak(name, steps, fractions):
    factors = [schedule(step, steps, name, *fractions) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "linear"}, "'linear' is unknown; allowed: wsd, cosine, constant"),
        ({"warmup": 1.5}, "between 0 and 1"),
        ({"min_ratio": -0.1}, "between 0 and 1"),
        ({"warmup": 0.6, "decay": 0.6}, "together at most 1"),
    ],
)
def test_wrong_schedules_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        schedule(0, 10, **arguments)
