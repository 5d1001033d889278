"""What is planned for layers behind a window beside other mixers: operations as torch counts them, and memory."""

import pytest
import torch

from distill.costs import flops_per_token, kept_for_backward, sizes_of
from distill.memory import numbers
from distill.mixers import MIXERS
from distill.reach import trained
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Recipe
from distill.student import mixers_of
from tests.distill.test_costs import BATCH, BLOCK, counted, models

LAYOUT = {"window_layers": [1], "window": 16}


def recipe(**stages: object) -> Recipe:
    plain = {"teacher": {"path": "none"}, "data": {"source": "none", "block": BLOCK}, "stages": stages, "name": "none"}
    return Recipe.model_validate(plain)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_operations_of_the_logits_stage(mixer: str) -> None:
    teacher, student, sizes = models(mixer, (), **LAYOUT)
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    real = counted(
        lambda: teacher(ids, use_cache=False),
        lambda: student(ids, use_cache=False).logits.sum().backward(),
    )
    assert flops_per_token(sizes, LogitsStage(tokens=1)) == pytest.approx(real, rel=0.05)


def test_mixing_costs_what_it_does_where_such_a_layer_keeps_attention() -> None:
    """The stage passes over both."""
    stage = MixingStage(tokens=1)
    planned = []
    for layout in (LAYOUT, {}):
        _, student, sizes = models("based", () if layout else (1,), **layout)
        made = recipe(mixing={"tokens": "1K"})
        kept = kept_for_backward(made, stage, sizes, student, BATCH)
        known = numbers(made, stage, sizes, student, kept, passes=1, processes=2)
        planned.append((flops_per_token(sizes, stage), kept, known.K, known.l, known.u, known.t))
    assert planned[0] == planned[1]
    assert planned[0][2] == 2


def test_hidden_counts_the_largest_of_its_layers_and_the_sum_of_all() -> None:
    stage = HiddenStage(tokens=1)
    made = recipe(hidden={"tokens": "1K"})
    alone = {}
    for mixer, kept in (("based", (1,)), ("sliding_window", (0, 2))):
        _, student, sizes = models(mixer, kept)
        alone[mixer] = kept_for_backward(made, stage, sizes, student, BATCH)
    _, student, sizes = models("based", (), **LAYOUT)
    both = kept_for_backward(made, stage, sizes, student, BATCH)
    assert both.graph == max(one.graph for one in alone.values())
    assert both.traces == sum(one.traces for one in alone.values())
    assert both.in_all == sum(one.in_all for one in alone.values())
    in_windows = sum(parameter.numel() for parameter in mixers_of(student)[1].parameters())
    assert sizes.window_weights == in_windows
    assert sum(one.numel() for one in trained(student, stage).values()) == sizes.student["mixer"]
    assert sizes_of(student, BLOCK, sizes.teacher, sizes.student) == sizes
