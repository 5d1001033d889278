"""The table of what each engine holds and sends, by numbers worked out by hand, and beside what a real step holds."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import activations
from distill.conversion import convert_with_report
from distill.costs import kept_for_backward, sizes_of
from distill.engines import zero
from distill.engines.plain import PlainEngine
from distill.memory import MODES, Memory, Numbers, bytes_sent, memory, modes_for, numbers, sharing
from distill.reach import reached
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Recipe, Stage
from distill.roles import roles
from distill.training import parameter_groups
from distill.training.gradients import Gradients
from stages.logits import LogitObjective
from tests.distill.live_bytes import LiveBytes

# Four processes; a student of 100 numbers, 60 trained, and a teacher of 80 in two bytes each.
SMALL = Numbers(
    R=4,
    n=100,
    t=60,
    m=80,
    b=2,
    u=90,
    u_t=70,
    l=10,
    l_t=8,
    c=12,
    c_t=9,
    e=20,
    e_t=16,
    f=15,
    w=5,
    g=1000,
    q=200,
    K=6,
    a=3,
)


@pytest.mark.parametrize(
    ("mode", "teacher", "student", "gradients", "optimizer", "working"),
    [
        ("one", 160, 400, 240, 480, 5),
        ("ddp", 160, 400, 240, 480, 5),
        ("zero1", 160, 400, 240, 180, 5 + 48),
        ("zero2", 160, 400, 60, 180, 5 + 48),
        ("fsdp2", 40, 100, 60, 120, 80 + 5 + 160 + 60),
        ("zero3", 40, 100, 60, 180, 5 + 96 + 36 + 48),
        ("zero3_offload", 0, 0, 0, 0, 5 + 96 + 36 + 48),
        ("layers", 160, 400, 80, 160, 5),  # two of six layers, a third of what is trained
    ],
)
def test_what_each_process_holds(
    mode: str, teacher: int, student: int, gradients: int, optimizer: int, working: int
) -> None:
    found = memory(mode, SMALL)
    activations = 1000 + (34 if mode in ("one", "layers") else 200)  # traces of one layer of six, or of all
    assert found == Memory(teacher, student, gradients, optimizer, activations, working)
    assert found.total == teacher + student + gradients + optimizer + activations + working


@pytest.mark.parametrize(
    ("mode", "sent"),
    [
        ("one", 0),
        ("ddp", 8 * 60 * 3 / 4),
        ("zero1", 8 * 60 * 3 / 4),
        ("zero2", (3 * 240 + 240) * 3 / 4),
        ("fsdp2", 3 * (720 + 140 + 240) * 3 / 4),
        ("zero3", 3 * (720 + 140 + 240) * 3 / 4),
        ("zero3_offload", 3 * (720 + 140 + 240) * 3 / 4),
        ("layers", 0),
    ],
)
def test_what_each_process_sends(mode: str, sent: float) -> None:
    assert bytes_sent(mode, SMALL) == sent
    assert bytes_sent(mode, dataclasses.replace(SMALL, R=1)) == 0


def test_offload_moves_all_shards_to_the_host() -> None:
    assert MODES["zero3_offload"].on_host(SMALL) == (160 + 400 + 16 * 60) / 4
    assert all(row.on_host(SMALL) == 0 for mode, row in MODES.items() if mode != "zero3_offload")


def test_activations_and_gradients_of_a_single_pass_share_their_place_under_fsdp2() -> None:
    few, many = dataclasses.replace(SMALL, a=1, g=100, q=0), dataclasses.replace(SMALL, a=1, g=1, q=0)
    gradients = memory("fsdp2", few).gradients
    assert 1 < gradients < 100
    assert memory("fsdp2", few).activations == 100 - gradients
    assert memory("fsdp2", many).activations == 0
    assert memory("fsdp2", dataclasses.replace(few, a=2)).activations == memory("ddp", few).activations == 100


def test_a_large_teacher_outweighs_the_students_layers_under_fsdp2() -> None:
    wide = dataclasses.replace(SMALL, l_t=1000)
    assert memory("fsdp2", wide).working == 4 * 20 + 2 * (2 * 1000 + 16)


def test_deepspeed_gathers_and_reduces_no_more_than_there_is() -> None:
    little = dataclasses.replace(SMALL, t=3, u=4, u_t=5)
    assert memory("zero2", little).working == 5 + 4 * 3
    assert memory("zero3", little).working == 5 + 4 * 4 + 2 * 5 + 4 * 3


def test_deepspeed_is_told_the_sizes_that_are_planned() -> None:
    for shape in ({}, {"vocab_size": 4096}):
        k, teacher, student = real_numbers(MixingStage(tokens=1), **shape)
        for model, planned in ((student, k.c), (teacher, k.c_t)):
            told = zero._config({"zero_optimization": {}}, model)["zero_optimization"]
            assert told["reduce_bucket_size"] == pytest.approx(planned, rel=0.02)  # the plan leaves norms out
            assert told["stage3_max_live_parameters"] == 2 * told["reduce_bucket_size"]


@pytest.mark.parametrize(("layers", "processes", "share"), [(6, 4, 1 / 3), (6, 6, 1 / 6), (6, 7, 1 / 6), (5, 2, 3 / 5)])
def test_the_busiest_process_takes_whole_layers(layers: int, processes: int, share: float) -> None:
    assert dataclasses.replace(SMALL, K=layers, R=processes).s == pytest.approx(share)


def test_modes_by_communication() -> None:
    logits, hidden = LogitsStage(tokens=1), HiddenStage(tokens=1)
    assert modes_for(logits, 1) == modes_for(hidden, 1) == ["one"]
    assert modes_for(logits, 2) == ["ddp", "zero1", "zero2", "fsdp2", "zero3"]
    assert modes_for(hidden, 2) == [*modes_for(logits, 2), "layers"]
    by_layers = HiddenStage(tokens=1, parallel="layers")
    assert (modes_for(by_layers, 1), modes_for(by_layers, 2)) == (["one"], ["layers"])


def test_by_layers_no_sequences_are_shared() -> None:
    assert (sharing("layers", 8), sharing("ddp", 8), sharing("one", 1)) == (1, 8, 1)


def real_numbers(
    stage: Stage, processes: int = 1, *, dtype: str = "float32", block: int = 32, **config: int
) -> tuple[Numbers, LlamaForCausalLM, LlamaForCausalLM]:
    """What a stage needs to know of a student with weights, for micro-batches of two; and both models."""
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, **config}
    made_by = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    teacher = LlamaForCausalLM(made_by).bfloat16().requires_grad_(False)
    student, made = convert_with_report(LlamaForCausalLM(made_by), keep_attention=[1])
    sizes = sizes_of(student, block, made.parameters_before, made.parameters_after)
    name = {MixingStage: "mixing", HiddenStage: "hidden", LogitsStage: "logits"}[type(stage)]
    recipe = Recipe(
        name="x",
        dtype=dtype,
        teacher={"path": "t", "dtype": "bfloat16"},
        data={"source": "s", "block": block},
        stages={name: stage.model_dump(exclude_unset=True)},
    )
    kept = kept_for_backward(recipe, stage, sizes, student, 2)
    return numbers(recipe, stage, sizes, student, kept, passes=4, processes=processes), teacher, student


@pytest.mark.parametrize(
    "stage",
    [
        LogitsStage(tokens=1),
        LogitsStage(tokens=1, train=("mixer", "norms")),
        HiddenStage(tokens=1, target="block", train=("mixer", "mlp")),
        HiddenStage(tokens=1, target="heads"),
        MixingStage(tokens=1),
    ],
    ids=["logits", "some roles", "hidden", "heads", "mixing"],
)
def test_one_process_holds_what_a_step_of_adamw_leaves_behind(stage: Stage) -> None:
    k, teacher, student = real_numbers(stage)
    role_of, within = roles(student).__getitem__, reached(student, stage)
    groups = parameter_groups(student, role_of, stage.train, lr=1e-3, reached=within)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    sum(parameter.sum() for parameter in trained).backward()
    optimizer = torch.optim.AdamW(groups)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    planned = memory("one", k)
    assert planned.teacher == sum(parameter.nbytes for parameter in teacher.parameters())
    assert planned.student == sum(parameter.nbytes for parameter in student.parameters())
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    assert planned.optimizer == sum(tensor.nbytes for tensor in moments)


@pytest.mark.parametrize("vocabulary", [64, 4096])  # the worst moment is in the layers, or at the logits
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_worst_moment_of_a_real_step(checkpointing: bool, dtype: str, vocabulary: int) -> None:
    require_planned(LogitsStage(tokens=1, gradient_checkpointing=checkpointing), dtype, vocabulary)


@pytest.mark.parametrize("loss", [{"divergence": "jsd", "ce_weight": 0.5}, {"ce_weight": 1}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_worst_moment_of_other_losses(checkpointing: bool, loss: dict) -> None:
    require_planned(LogitsStage(tokens=1, gradient_checkpointing=checkpointing, **loss), "float32", 4096)


def test_one_process_is_done_with_the_logits_before_the_layers_beside_them() -> None:
    require_planned(LogitsStage(tokens=1, hidden_weight=0.1), "float32", 64)


def test_layers_beside_the_logits_stay_where_all_has_one_backward() -> None:
    """The layers with a mixer, and the states before and behind each."""
    without, _, student = real_numbers(LogitsStage(tokens=1))
    k, _, _ = real_numbers(LogitsStage(tokens=1, hidden_weight=0.1))
    layer = activations.of_layer(student.get_decoder().layers[0], 64, 32, torch.float32).a_sequence
    beside = 2 * (2 * layer + 4 * 32 * 64 * 2)  # two sequences, two layers, four states in bfloat16
    assert memory("ddp", k).activations - memory("ddp", without).activations == beside
    assert memory("one", k) == memory("one", without)
    again, _, _ = real_numbers(LogitsStage(tokens=1, hidden_weight=0.1, gradient_checkpointing=True))
    assert again.h == 2 * 4 * 32 * 64 * 2
    assert k.u > without.u
    assert k.u_t > without.u_t


def require_planned(stage: LogitsStage, dtype: str, vocabulary: int) -> None:
    """What lives at the worst moment of a real step is what was planned."""
    shape = {"vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    k, teacher, student = real_numbers(stage, dtype=dtype, block=128, **shape)
    student.requires_grad_(True).train()
    if stage.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(2, 128, dtype=torch.long)
    valid = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(128).expand(2, -1), "valid": valid}
    engine = PlainEngine(student, [{"params": list(student.parameters())}])
    gradients = Gradients(LogitObjective(teacher, student, stage), engine, torch.device("cpu"), getattr(torch, dtype))
    gradients.backward([batch], lambda: False)  # from now on gradients are there
    there = [*teacher.parameters(), *student.parameters(), *(p.grad for p in student.parameters())]
    with LiveBytes(there) as live:
        gradients.backward([batch], lambda: False)
    planned = memory("one", k)
    assert planned.activations + planned.working == pytest.approx(live.most, rel=0.12)


def test_numbers_of_the_last_stage_are_those_of_the_whole_models() -> None:
    k, teacher, student = real_numbers(LogitsStage(tokens=1), processes=4)
    layers, norms = student.get_decoder().layers, sum(p.numel() for p in student.parameters() if p.ndim == 1)
    assert (k.R, k.K, k.a, k.b) == (4, 2, 4, 2)
    assert k.n == k.u == k.t == sum(parameter.numel() for parameter in student.parameters())
    assert k.m == k.u_t == sum(parameter.numel() for parameter in teacher.parameters())
    assert k.e == k.e_t == 2 * 96 * 64
    assert k.f == 96 * 64  # the head's gradient is part of g
    assert k.l == pytest.approx(sum(parameter.numel() for parameter in layers[0].parameters()), abs=norms)
    assert k.l_t == pytest.approx(
        sum(parameter.numel() for parameter in teacher.get_decoder().layers[0].parameters()), abs=128
    )


def test_numbers_of_the_first_stages_are_those_of_the_mixers() -> None:
    mixing, _, student = real_numbers(MixingStage(tokens=1))
    mixer = sum(parameter.numel() for parameter in student.get_decoder().layers[0].self_attn.parameters())
    of_the_output = 64 * 64 + 64  # its projection and the norm in front, which no matrix depends on
    assert (mixing.t, mixing.u, mixing.l, mixing.f) == (2 * (mixer - of_the_output), 2 * mixer, mixer, 0)
    assert mixing.m - mixing.u_t == 96 * 64  # the head does not run
    trace = 2 * 32 * 64 * 2  # two sequences, in bfloat16
    assert mixing.q == 2 * trace  # what attention reads in two layers
    hidden, _, _ = real_numbers(HiddenStage(tokens=1))
    assert hidden.q == 4 * trace  # and what it adds
    block, _, _ = real_numbers(HiddenStage(tokens=1, target="block"))
    assert block.q == 4 * trace  # layers 0 and 2: what enters and leaves each
    assert block.l == mixer + 3 * 64 * 160
    assert block.t == 2 * mixer


def test_a_teacher_on_disk_takes_no_memory() -> None:
    k, _, _ = real_numbers(LogitsStage(tokens=1, offline_teacher={"top_k": 8}))
    beside, _, _ = real_numbers(LogitsStage(tokens=1))
    assert (k.m, k.u_t, k.l_t, k.e_t) == (0, 0, 0, 0)
    # A chunk more in fp32 (its logits, or the probabilities in their place), and its hidden states in bfloat16.
    assert beside.g - k.g == 2 * 32 * (96 * 4 + 64 * 2)
    assert memory("ddp", k).teacher == 0
