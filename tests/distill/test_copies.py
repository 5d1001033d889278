"""Copies of a head: together they are the head, they differ in their memories, and some mixers have none."""

from unittest.mock import Mock

import pytest
import torch

from distill import convert, memories, seeding
from distill.attention import views
from distill.calibration import calibrate
from distill.capture import layer_traces, sequence_arguments
from distill.copies import mean_of_copies, shared_out, spread
from distill.errors import UserError
from distill.fitting import memories as fitting
from distill.fitting.memories import fit_memories_
from distill.memories import SET_MEMORY, memories_of
from distill.mixers import MIXERS
from distill.objectives import attention_matrix
from distill.student import mixers_of
from distill.teacher_fed import outputs_by_layer
from tests.conftest import tiny

NAMES = [name for name, kind in MIXERS.items() if kind in SET_MEMORY]


@pytest.fixture(params=NAMES)
def mixer(request) -> str:
    return request.param


def test_they_are_spread_as_far_as_can_be():
    assert spread(torch.arange(6), 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert spread(torch.arange(6), 3).tolist() == [0, 2, 4, 1, 3, 5]
    assert spread(torch.arange(6), 1).tolist() == list(range(6))


def test_a_projection_shared_out_reads_the_mean():
    weight, heads = torch.randn(5, 6).double(), torch.randn(4, 3 * 2, 2).double()  # 3 heads of 2, 2 copies
    together = heads.flatten(1) @ shared_out(weight, 2, copies=2).T
    torch.testing.assert_close(together, mean_of_copies(heads, 3, dim=1).flatten(1) @ weight.T)


@pytest.mark.parametrize("copies", [2, 3])
def test_with_equal_memories_they_are_the_head_alone(family, mixer, copies, monkeypatch):
    monkeypatch.setattr(seeding, "mirror_values_", lambda *_: False)  # else every second is −v where a SiLU is
    teacher = tiny(family).double()
    alone = convert(teacher, mixer=mixer, seed=3)
    monkeypatch.setattr(memories, "spread", lambda grid_H, n: memories_of(mixers_of(alone)[0]).repeat_interleave(n))
    copied = convert(teacher, mixer=mixer, seed=3, expand=copies)
    assert mixers_of(copied)[0].n_heads == copies * mixers_of(alone)[0].n_heads
    ids = torch.randint(3, 97, (2, 40))
    torch.testing.assert_close(
        copied(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-5
    )  # sizes are measured in fp32


@pytest.mark.parametrize("choices", [{}, {"seed_from_attention": False}, {"from_scratch": True}], ids=str)
def test_at_the_start_no_two_of_a_head_have_one_memory(mixer, choices):
    student = convert(tiny("llama"), mixer=mixer, expand=2, **choices)
    each = memories_of(mixers_of(student)[0]).unflatten(0, (-1, 2))
    assert (each[:, 1] / each[:, 0] > 7).all()
    assert len(set(each.flatten().tolist())) == each.numel()


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])  # the others' have a size of their own
def test_their_mean_has_the_size_of_attentions_matrix(family, mixer):
    teacher = tiny(family)
    student = convert(teacher, mixer=mixer, seed=3, expand=2)
    for index, trace in calibrate(teacher, [0, 1, 2], seed=3):
        attention = views(teacher, [index])[index]
        q, k = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
        theirs = attention_matrix(q, k, scaling=attention.scaling)
        ours = mean_of_copies(mixers_of(student)[index].mixing_matrix(trace.attention_input), attention.n_heads, dim=1)
        torch.testing.assert_close(ours.square().sum((0, 2, 3)), theirs.square().sum((0, 2, 3)), rtol=1e-3, atol=0)


@torch.no_grad()
def test_fitted_on_text_each_has_the_memory_that_is_best_beside_those_before(mixer):
    teacher = tiny("qwen2").double()
    ids = torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids, "position_ids": torch.arange(48).expand(2, -1), "valid": ids > 0}
    trace = layer_traces(teacher, batch, [0], ["attention_input"])[0]
    attention = views(teacher, [0])[0]
    q, k = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
    wanted = attention_matrix(q, k, scaling=attention.scaling)

    def error(fitted, chosen_HE: torch.Tensor) -> torch.Tensor:
        SET_MEMORY[type(fitted)](fitted, chosen_HE.flatten())
        made = fitted.mixing_matrix(trace.attention_input, position_embeddings=trace.position_embeddings)
        made = mean_of_copies(made, attention.n_heads, dim=1)
        along, size = (made * wanted).sum((0, 2, 3)), made.square().sum((0, 2, 3))
        return wanted.square().sum((0, 2, 3)) - along.clamp_min(0).square() / size

    fitted = {}
    for copies in (1, 2):
        fitted[copies] = mixers_of(convert(teacher, mixer=mixer, rope="keep", expand=copies))[0]
        fit_memories_(fitted[copies], attention, [(trace, sequence_arguments(batch))])
    first, both = (memories_of(fitted[copies]).unflatten(0, (-1, copies)) for copies in (1, 2))
    torch.testing.assert_close(both[:, :1], first)
    least = error(fitted[2], both)
    for memory in (1.0, 2.0, 8.0, 64.0, 1024.0):
        other = torch.cat([first, torch.full_like(first, memory)], dim=1)
        assert (error(fitted[2], other) >= least * (1 - 1e-9)).all()
    assert (least < error(fitted[2], first.expand(-1, 2))).any()


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_attention_is_computed_once_and_no_copys_matrix_for_nothing(copies, monkeypatch):
    teacher = tiny("llama")
    fitted, attention = mixers_of(convert(teacher, expand=copies))[0], views(teacher, [0])[0]
    batch = {"input_ids": torch.randint(3, 97, (1, 12)), "position_ids": torch.arange(12)[None]}
    trace = layer_traces(teacher, batch, [0], ["attention_input"])[0]
    theirs, ours = Mock(wraps=fitting._attention), Mock(wraps=fitted.mixing_matrix)
    monkeypatch.setattr(fitting, "_attention", theirs)
    monkeypatch.setattr(fitted, "mixing_matrix", ours)
    fit_memories_(fitted, attention, [(trace, {"valid_BT": None, "resets_BT": None})])
    assert theirs.call_count == 1
    each = -(-len(fitting.MEMORIES) // copies)  # copies try different memories at once
    assert ours.call_count == copies * each + copies - 1  # and those that have theirs are added up


def test_as_heads_they_are_compared_by_their_mean(mixer):
    teacher = tiny("llama")
    student = convert(teacher, mixer=mixer, expand=2)
    ids = torch.randint(3, 97, (2, 20))
    batch = {"input_ids": ids, "position_ids": torch.arange(20).expand(2, -1), "valid": ids > 0}
    _, outputs = next(iter(outputs_by_layer(teacher, student, batch, "heads")))
    ours, theirs = outputs()
    assert ours.shape == theirs.shape
    # Attention's own output projection, which each copy has half of, makes the same of the mean as the mixer does.
    _, whole = next(iter(outputs_by_layer(teacher, student, batch, "mixer")))
    torch.testing.assert_close(ours @ views(teacher, [0])[0].o.weight.T, whole().student, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"mixer": "based", "expand": 2}, "forgets nothing, so copies of a head would stay alike"),
        ({"mixer": "sliding_window", "expand": 2}, "is attention itself"),
        ({"mixer": "mamba2", "expand": 2, "keep_heads": {0: [1]}}, "heads that are kept have no copies"),
        ({"mixer": "mamba2", "expand": 0}, "must be at least 1"),
    ],
)
def test_where_there_can_be_none_they_are_refused(wanted, says):
    with pytest.raises(UserError, match=says):
        convert(tiny("llama"), **wanted)
