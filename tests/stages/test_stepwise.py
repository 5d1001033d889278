"""Layers that give way to their mixers in turn: what runs in their place, when, and that a run goes on exactly."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill import convert
from distill.convert_stage import convert_stage
from distill.recipe import LogitsStage, Stepwise
from distill.run import at_work_on
from distill.stepwise import Replacement, turns
from distill.student import mixers_of
from stages import logits
from stages.logits import LogitObjective
from tests.conftest import tiny
from tests.distill.families import models
from tests.stages.alignment import documents, packed_batch, random_teacher
from tests.stages.run_folder import metrics

ALONE = (
    "device=cpu",
    "stages.mixing=null",
    "stages.hidden=null",
    "student.keep_attention=[]",
    "stages.logits.tokens=1536",
)


def seen(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits of packed documents as a stage computes them."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def test_parts_are_spread_over_the_depth():
    assert turns(range(8), 4) == {0: 0, 1: 2, 2: 1, 3: 3, 4: 0, 5: 2, 6: 1, 7: 3}
    assert turns([1, 2, 5], 2) == {1: 0, 2: 1, 5: 0}  # by their place among the layers that change
    assert turns(range(3), 1) == dict.fromkeys(range(3), 0)
    # MambaInLlama's hybrids of 32 layers: half of them even, and what keeps attention last.
    parts = turns(range(32), 8)
    assert [layer for layer, part in parts.items() if part < 4] == list(range(0, 32, 2))
    assert [layer for layer, part in parts.items() if part == 7] == [7, 15, 23, 31]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (0.0, {0.0: (1, 0), 0.49: (1, 0), 0.5: (1, 1), 0.99: (1, 1)}),
        (0.25, {0.0: (0, 0), 0.125: (0.5, 0), 0.25: (1, 0), 0.5: (1, 0), 0.625: (1, 0.5), 0.75: (1, 1)}),
    ],
)
def test_a_layers_share_follows_from_how_much_is_done(ramp, expected):
    teacher = tiny("llama")
    replacement = Replacement(teacher, convert(teacher), Stepwise(at=(0.0, 0.5), ramp=ramp))
    for done, (first, second) in expected.items():
        replacement.begin(done)
        assert replacement.shares == {0: first, 1: second, 2: first}


@pytest.mark.parametrize("family", ["qwen2", "mistral with a window", "Falcon, new", "GPT-2", "Gemma 3", "Phi"])
def test_before_any_turn_the_student_is_the_teacher_bit_for_bit_while_it_trains(family):
    teacher = models.tiny(family) if family in models.CASES else random_teacher(family)
    batch = packed_batch()
    student = convert(teacher).train()
    alone = seen(student, batch)
    objective = LogitObjective(teacher, student, LogitsStage(tokens=1000, stepwise=Stepwise(at=(0.5,))))
    objective.begin(0.0)
    assert torch.equal(seen(student, batch), seen(teacher, batch))
    [part] = objective.parts(batch)
    assert part.loss_sum().item() == 0
    assert torch.equal(seen(student.eval(), batch), alone)  # what is measured and saved is the student
    student.train()
    objective.begin(0.5)
    assert torch.equal(seen(student, batch), alone)


def test_in_its_turn_a_layer_adds_both_in_their_shares_gradients_included():
    """Beside a copy whose mixers are told to by hooks, one document after the other."""
    teacher, batch = tiny("qwen2"), packed_batch()
    student = convert(teacher, keep_attention=[1]).train()
    expected, shares = copy.deepcopy(student), {0: 0.25, 2: 0.75}

    def mixed(index: int):
        def hook(_mixer, _args, kwargs, output):
            attention = teacher.model.layers[index].self_attn
            own, turn = kwargs["hidden_states"], kwargs["position_embeddings"]
            attended, _ = attention(hidden_states=own, position_embeddings=turn, attention_mask=None)
            return shares[index] * output[0] + (1 - shares[index]) * attended, None

        return hook

    for index, mixer in mixers_of(expected).items():
        mixer.register_forward_hook(mixed(index), with_kwargs=True)
    Replacement(teacher, student, Stepwise(at=(0.0,))).shares.update(shares)

    def loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        return logits_BTV.log_softmax(-1).gather(-1, ids_BT[..., None]).sum()

    total = sum(loss(expected(ids, use_cache=False).logits, ids) for _, ids in documents(batch))
    total.backward()
    got_BTV, valid_BT = seen(student, batch), batch["valid"]
    got = loss(got_BTV[valid_BT], batch["input_ids"][valid_BT])
    got.backward()
    torch.testing.assert_close(got, total)
    for (name, ours), theirs in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_turn_has_not_come_does_not_train(recipe):
    settings = LogitsStage(tokens=1000, stepwise=Stepwise(at=(0.0, 0.5)))
    teacher = tiny("llama")
    student = convert(teacher).train()
    objective = LogitObjective(teacher, student, settings)
    objective.begin(0.0)
    [part] = objective.parts(packed_batch())
    part.loss_sum().backward()
    trained = [index for index, mixer in mixers_of(student).items() if mixer.in_proj.weight.grad is not None]
    assert trained == [0, 2]


def test_a_run_goes_on_where_it_stopped_between_two_turns(recipe, monkeypatch):
    """A part that has not trained yet has nothing in the optimizer; after the restart it starts as it would have."""
    settings = ("stages.logits.stepwise={at: [0.0, 0.5], ramp: 0.25}", "stages.logits.checkpoint_every=2")
    whole, cut = (recipe.with_name(name) for name in ("whole", "cut"))
    with at_work_on(recipe, [*ALONE, *settings, f"run_dir={whole}"]) as run:
        convert_stage(run)
        logits.main(run)

    begin, stops = Replacement.begin, [0.4, 0.7]

    def killed(self: Replacement, done: float) -> None:
        if stops and done > stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        begin(self, done)

    monkeypatch.setattr(Replacement, "begin", killed)
    with at_work_on(recipe, [*ALONE, *settings, f"run_dir={cut}"]) as run:
        convert_stage(run)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                logits.main(run)
        logits.main(run)
    assert not stops
    assert metrics(cut / "logits") == metrics(whole / "logits")
    assert (cut / "logits" / "model.safetensors").read_bytes() == (whole / "logits" / "model.safetensors").read_bytes()
