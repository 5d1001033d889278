"""What a disturbed token moves: against two forward passes by hand, within its document, and only behind itself."""

import pytest
import torch

from distill import convert
from distill.errors import UserError
from distill.perturbation import _disturbed, _seen, deviations
from tests.distill.test_stability import packed


@pytest.fixture
def student(tiny_model):
    return convert(tiny_model("llama"), keep_attention=[1]).double()


def states(model, batch):
    with torch.no_grad():
        return model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state


def test_only_the_disturbed_document_moves_and_only_behind(student):
    batch, place = packed(), torch.tensor([4, 6])
    before = states(student, batch)
    with _disturbed(student.model.layers[0], place, 1e-3, torch.Generator().manual_seed(0)):
        after = states(student, batch)
    moved = (after - before).norm(dim=-1) > 0
    assert moved[0].tolist() == [4 <= t < 10 for t in range(24)]
    assert not moved[1, :6].any()
    assert moved[1, 6:17].all()
    distance, seen = _seen((after - before).norm(dim=-1), batch, place)
    assert distance.tolist() == [*range(6), *range(11)]
    assert (seen > 0).all()


def test_the_disturbance_is_as_large_as_asked(student):
    batch, read = packed(), []
    layer = student.model.layers[2]
    with _disturbed(layer, torch.tensor([3, 5]), 0.02, torch.Generator().manual_seed(1)):
        handle = layer.register_forward_pre_hook(lambda _layer, args: read.append(args[0]))
        states(student, batch)
        handle.remove()
    handle = layer.register_forward_pre_hook(lambda _layer, args: read.append(args[0]))
    states(student, batch)
    handle.remove()
    apart = (read[0] - read[1]).norm(dim=-1)
    for row, place in enumerate((3, 5)):
        assert float(apart[row, place] / read[1][row, place].norm()) == pytest.approx(0.02, rel=1e-6)
    assert int((apart > 0).sum()) == 2


def test_small_disturbances_have_one_deviation(student):
    """d is a derivative: a fifth of the disturbance, the same d (Llama's norms are in fp32 whatever the model is)."""
    coarse, fine = (deviations(student, [packed(1)], [0, 2], epsilon=size) for size in (1e-3, 2e-4))
    assert [(span.first, span.last, span.samples) for span in coarse] == [
        (span.first, span.last, span.samples) for span in fine
    ]
    assert [span.mean for span in coarse] == pytest.approx([span.mean for span in fine], rel=0.03)
    assert [span.first for span in coarse][:5] == [0, 1, 2, 3, 5]
    assert [span.last for span in coarse][:5] == [0, 1, 2, 4, 8]
    assert all(span.largest >= span.mean > 0 for span in coarse)


def test_a_teacher_is_disturbed_at_the_same_places(student, tiny_model):
    ours, theirs = (deviations(model, [packed()], [0, 2]) for model in (student, tiny_model("llama").double()))
    assert [span.samples for span in ours] == [span.samples for span in theirs]
    assert ours[1].mean != theirs[1].mean


def test_mistakes(student):
    for layers in ([], [3], [-1]):
        with pytest.raises(UserError, match="has layers 0 to 2"):
            deviations(student, [packed()], layers)
