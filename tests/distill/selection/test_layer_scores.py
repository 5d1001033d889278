"""Scores of layers against loops written out, and orders and sets of layers by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from distill import convert
from distill.selection.probe import probe, repetitions
from distill.selection.ranking import BASELINES, Ranking, by_place, by_score, choices
from distill.selection.restoring import hybrid
from distill.selection.scores import distances, divergence, greedy, restore_one
from tests.conftest import tiny
from tests.stages.alignment import OBJECTIVES, losses, packed_batch


def text():
    """Two batches of different sizes, so that a mean of means is not the mean."""
    whole = packed_batch()
    return [{name: rows[:2] for name, rows in whole.items()}, {name: rows[2:] for name, rows in whole.items()}]


def naive_kl(student, teacher, layers) -> float:
    """Position by position, in fp64, of a student that was made anew."""
    made, total, count = hybrid(student, teacher, layers), 0.0, 0
    for batch in text():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            ours, theirs = (model(**inputs, use_cache=False).logits.double() for model in (made, teacher))
        for row, labels in enumerate(batch["labels"].tolist()):
            for place in range(len(labels) - 1):
                if labels[place + 1] != -100:
                    p, q = theirs[row, place].softmax(-1), ours[row, place].softmax(-1)
                    total += float((p * (p / q).log()).sum())
                    count += 1
    return total / count


@pytest.mark.parametrize("mixer", ["mamba2", "sliding_window"])
def test_restoring_one_layer_is_worth_what_a_loop_says(mixer):
    teacher = tiny("llama")
    options = {"window": 3, "sinks": 0} if mixer == "sliding_window" else {}
    student = convert(teacher, mixer=mixer, **options)
    ranking = restore_one([0, 1, 2], lambda layers: divergence(student, teacher, layers, text()))
    start = naive_kl(student, teacher, [])
    expected = {layer: start - naive_kl(student, teacher, [layer]) for layer in range(3)}
    assert ranking.scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert list(ranking.order) == sorted(expected, key=lambda layer: -expected[layer])
    assert divergence(student, teacher, [0, 1, 2], text()) == 0


# Layers 0 and 1 do the same work: either of them gives back 5, both 6. Layer 3 does another.
KL = {
    (): 10.0,
    (0,): 5.0,
    (1,): 5.5,
    (2,): 9.0,
    (3,): 7.0,
    (0, 1): 4.0,
    (0, 2): 4.5,
    (0, 3): 2.0,
    (0, 1, 3): 1.9,
    (0, 2, 3): 1.0,
}


def test_greedily_a_layer_that_repeats_a_chosen_one_comes_later():
    calls = []

    def kl(layers):
        calls.append(layers)
        return KL[layers]

    assert restore_one([0, 1, 2, 3], kl).first(2) == (0, 1)
    calls.clear()
    ranking = greedy([0, 1, 2, 3], kl, 3)
    assert ranking.order == (0, 3, 2, 1)
    assert ranking.first(2) == (0, 3)
    assert [dict(scores) for scores in ranking.rounds] == [
        {0: 5.0, 1: 4.5, 2: 1.0, 3: 3.0},
        {1: 1.0, 2: 0.5, 3: 3.0},
        {1: pytest.approx(0.1), 2: 1.0},
    ]
    assert ranking.scores == {0: 5.0, 3: 3.0, 2: 1.0, 1: pytest.approx(0.1)}
    assert len(calls) == 1 + 4 + 3 + 2


@pytest.mark.parametrize("stage", ["mixing", "hidden", "hidden block"])
def test_a_distance_is_the_stage_s_own_loss_layer_by_layer(stage):
    teacher = tiny("llama")
    student = convert(teacher, keep_attention=[1])
    objective = OBJECTIVES[stage](teacher, student)
    found = distances(objective, [student, teacher], text())
    with torch.no_grad():
        summed = [losses(objective, batch) for batch in text()]
    weight = sum(objective.weight(batch) for batch in text())
    assert set(found) == {0, 2}
    for layer in found:
        expected = sum(float(of_batch[f"layers.{layer}"]) for of_batch in summed) / weight
        assert found[layer] == pytest.approx(expected, rel=1e-6)


def test_a_probe_is_what_a_loop_finds():
    teacher, batches = tiny("llama"), text()
    ranking = probe(teacher, [0, 2], batches, length=21, batch_size=2, bos=1, seed=3)

    ids = torch.cat([batch["input_ids"][batch["valid"]] for batch in batches]).unique()
    rows = [row for batch in repetitions(ids, 3 * 24 // 21, 21, 2, 1, 3) for row in batch["input_ids"]]
    outputs = {0: [], 2: []}

    def loss(instead) -> float:
        """Of the last 9 of 1 + 10 + 10 tokens, with a vector (D,) in the place of what these layers' attention adds."""
        for layer, vector in instead.items():
            put = vector.expand
            attention(layer).o_proj.register_forward_hook(lambda _m, _a, y_BTD, put=put: put(y_BTD.shape))
        with torch.no_grad():
            logs = [F.cross_entropy(teacher(row[None]).logits[0, 11:20], row[12:]).item() for row in rows]
        for layer in instead:
            attention(layer).o_proj._forward_hooks.clear()
        return sum(logs) / len(logs)

    def attention(layer):
        return teacher.model.layers[layer].self_attn

    for layer, caught in outputs.items():
        attention(layer).o_proj.register_forward_hook(lambda _m, _a, y_BTD, caught=caught: caught.append(y_BTD))
    with torch.no_grad():
        for batch in batches:
            teacher(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for layer in outputs:
        attention(layer).o_proj._forward_hooks.clear()
    valid = torch.cat([batch["valid"] for batch in batches])
    assert len(rows) == 3
    expected = {layer: loss({layer: torch.cat(caught)[valid].mean(0)}) - loss({}) for layer, caught in outputs.items()}
    assert ranking.scores == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("bos", "length"), [(None, 20), (1, 21), (1, 22)])
def test_rows_say_the_same_twice_and_only_the_second_time_is_scored(bos, length):
    ids = torch.arange(1, 40)
    (batch,) = repetitions(ids, 3, length, 8, bos, seed=0)
    head = [] if bos is None else [bos]
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        first, second = row[len(head) : len(head) + 10], row[len(head) + 10 :]
        assert row[: len(head)] == head
        assert first == second
        assert bos not in first
        assert set(first) <= set(ids.tolist())
        assert labels == [-100] * (len(head) + 11) + second[1:]
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 3
    (again,) = repetitions(ids, 3, length, 8, bos, seed=0)
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_equal_scores_are_in_the_order_of_depth():
    assert by_score({2: 1.0, 0: 1.0, 1: 3.0}, "").order == (1, 0, 2)


@pytest.mark.parametrize(
    ("name", "keep", "expected"),
    [
        ("uniform", 2, (3, 7)),
        ("uniform", 1, (7,)),
        ("last", 3, (5, 6, 7)),
        ("first_last", 1, (0,)),
        ("first_last", 3, (0, 1, 7)),
    ],
)
def test_baselines_go_by_place(name, keep, expected):
    assert BASELINES[name](range(8), keep) == expected
    assert by_place(range(8), expected).first(keep) == expected


def test_the_uniform_choice_is_among_candidates():
    assert BASELINES["uniform"]([1, 4, 6, 9], 2) == (4, 9)


SCORES = {0: 1.0, 1: 9.0, 2: 4.8, 3: 5.0, 4: 4.0, 5: 0.5}


def test_borderline_layers_are_those_nearest_to_the_line():
    ranking = by_score(SCORES, "")
    # The line is between 3 (5.0) and 2 (4.8): at 4.9.
    assert choices(ranking, 2, 2) == [(1, 3), (1, 2)]
    assert choices(ranking, 2, 3) == [(1, 3), (1, 2), (1, 4)]
    everything = choices(ranking, 2, 6)
    assert len(everything) == math.comb(6, 2)
    assert everything[0] == (1, 3)


def test_the_line_always_has_a_layer_on_each_side():
    ranking = by_score({0: 10.0, 1: 1.2, 2: 1.1, 3: 1.0}, "")  # those behind are nearer to each other than to the first
    assert choices(ranking, 1, 2) == [(0,), (1,)]


def test_of_a_greedy_ranking_only_the_last_choice_is_doubtful():
    ranking = greedy([0, 1, 2, 3], KL.__getitem__, 2)
    assert choices(ranking, 2, 2) == [(0, 3), (0, 1)]
    assert choices(ranking, 2, 9) == [(0, 3), (0, 1), (0, 2)]


def test_where_all_candidates_are_kept_there_is_one_choice():
    assert choices(Ranking((1, 0), {0: 1.0, 1: 2.0}, ""), 2, 4) == [(0, 1)]
