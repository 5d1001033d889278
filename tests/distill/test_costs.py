"""The plan's formulas beside what really runs: operations counted by torch, activations kept by autograd."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distill import activations
from distill.capture import layer_traces
from distill.conversion import convert_with_report, empty_model, plan, report
from distill.costs import Sizes, flops_per_token, kept_for_backward, sizes_of
from distill.layout import mixer_layers
from distill.machine import measure
from distill.memory import memory, numbers
from distill.mixers import KINDS, MIXERS
from distill.objectives import streamed_mixing_distance, strips
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Recipe
from distill.units import count, duration, read_count, read_size, size
from tests.distill.live_bytes import LiveBytes

BLOCK, BATCH = 128, 2


def tiny_config(**changes: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attn_implementation": "eager",  # the fused kernel hides its products from the counter
    }
    return LlamaConfig(**{**sizes, **changes})


def models(mixer: str, kept: tuple[int, ...], **settings: int) -> tuple[PreTrainedModel, PreTrainedModel, Sizes]:
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(tiny_config()).requires_grad_(False)
    student, made = convert_with_report(teacher, mixer=mixer, keep_attention=kept, **settings)
    student.requires_grad_(True)
    return teacher, student, sizes_of(student, BLOCK, made.parameters_before, made.parameters_after)


def triangle(matrix_shape: tuple[int, ...], columns_shape: tuple[int, ...], *_: object, **__: object) -> int:
    """Operations to solve a triangular system, which torch's counter passes over."""
    return math.prod(columns_shape) * matrix_shape[-1]


def counted(*calls: object) -> float:
    solving = {torch.ops.aten.linalg_solve_triangular: triangle}
    with FlopCounterMode(display=False, custom_mapping=solving) as counter:
        for call in calls:
            call()  # type: ignore[operator]
    return counter.get_total_flops() / (BATCH * BLOCK)


@pytest.mark.parametrize("mixer", sorted(KINDS))
@pytest.mark.parametrize("kept", [(), (1,)])
def test_operations_of_the_logits_stage(mixer: str, kept: tuple[int, ...]) -> None:
    teacher, student, sizes = models(mixer, kept)
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    real = counted(
        lambda: teacher(ids, use_cache=False),
        lambda: student(ids, use_cache=False).logits.sum().backward(),
    )
    assert flops_per_token(sizes, LogitsStage(tokens=1)) == pytest.approx(real, rel=0.05)


def test_copies_of_heads_are_the_mixers_alone() -> None:
    """Attention costs what it did, in the teacher and where it is kept, and so do the traces of its heads."""
    teacher, student, sizes = models("mamba2", (1,), expand=2)
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    real = counted(
        lambda: teacher(ids, use_cache=False),
        lambda: student(ids, use_cache=False).logits.sum().backward(),
    )
    assert flops_per_token(sizes, LogitsStage(tokens=1)) == pytest.approx(real, rel=0.03)
    stage = {"tokens": 1, "target": "heads"}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "teacher": {"path": "t", "dtype": "float32"},
            "data": {"source": "s"},
            "stages": {"hidden": stage},
        }
    )
    batch = {"input_ids": ids, "position_ids": torch.arange(BLOCK).expand(BATCH, -1), "valid": ids >= 0}
    traces = layer_traces(teacher, batch, mixer_layers(student.config), wants=["attention_input", "head_outputs"])
    held = sum(trace.attention_input.nbytes + trace.head_outputs.nbytes for trace in traces.values())
    assert kept_for_backward(recipe, HiddenStage(**stage), sizes, student, BATCH).traces == held


@pytest.mark.parametrize("stage", [LogitsStage(tokens=1), HiddenStage(tokens=1)], ids=["logits", "hidden"])
def test_operations_of_heads_beside_a_mixer(stage: LogitsStage | HiddenStage) -> None:
    """On top of those of the same student without; in stage 2 they do not train."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(tiny_config())
    planned, real = [], []
    for heads in ({}, {0: [1], 2: [0, 3]}):
        student, made = convert_with_report(teacher, keep_heads=heads)
        planned.append(flops_per_token(sizes_of(student, BLOCK, made.parameters_before, made.parameters_after), stage))
    hidden_BTD = torch.randn(BATCH, BLOCK, 64, requires_grad=isinstance(stage, LogitsStage))
    cos_BTP = torch.zeros(1, BLOCK, 16)
    for index in (0, 2):
        kept = student.get_decoder().layers[index].self_attn.kept.requires_grad_(isinstance(stage, LogitsStage))
        kept.softcap = 1e9  # the fused kernel hides its products from the counter

        def run(kept: torch.nn.Module = kept) -> None:
            output = kept(hidden_BTD, position_embeddings=(cos_BTP, cos_BTP))
            output.sum().backward() if output.requires_grad else None

        real.append(counted(run))
    assert planned[1] - planned[0] == pytest.approx(sum(real), rel=0.02)


@pytest.mark.parametrize("kept", [(), (1,)])
def test_checkpointing_costs_a_forward_of_the_layers_less_the_last_product_of_each(kept: tuple[int, ...]) -> None:
    teacher, student, sizes = models("mamba2", kept)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    real = counted(
        lambda: teacher(ids, use_cache=False),
        lambda: student(ids, use_cache=False).logits.sum().backward(),
    )
    last_products = 3 * 2 * 160 * 64
    planned = flops_per_token(sizes, LogitsStage(tokens=1, gradient_checkpointing=True))
    assert planned - last_products == pytest.approx(real, rel=0.03)
    assert planned == pytest.approx(real, rel=0.08)


def test_frozen_weights_cost_no_gradient() -> None:
    teacher, student, sizes = models("mamba2", (1,))
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    for layer in student.get_decoder().layers:
        layer.mlp.requires_grad_(False)
    real = counted(
        lambda: teacher(ids, use_cache=False),
        lambda: student(ids, use_cache=False).logits.sum().backward(),
    )
    roles = ("mixer", "attention", "norms", "embeddings", "head")
    assert flops_per_token(sizes, LogitsStage(tokens=1, train=roles)) == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("target", ["mixer", "block", "heads"])
def test_operations_of_the_hidden_stage(mixer: str, target: str) -> None:
    teacher, student, sizes = models(mixer, (1,))
    ids = torch.randint(0, 96, (BATCH, BLOCK))
    hidden_BTD = torch.randn(BATCH, BLOCK, 64, requires_grad=True)  # the formula counts the input's gradient too
    cos_BTP = torch.zeros(1, BLOCK, 16)
    layers = [student.get_decoder().layers[index] for index in mixer_layers(student.config)]

    def train(layer: torch.nn.Module) -> None:
        if target == "mixer":
            layer.self_attn(hidden_BTD)[0].sum().backward()
        elif target == "heads":
            layer.self_attn.head_outputs(hidden_BTD).sum().backward()
        else:
            layer.mlp.requires_grad_(False)
            layer(hidden_BTD, position_embeddings=(cos_BTP, cos_BTP), attention_mask=None).sum().backward()

    real = counted(
        lambda: teacher.get_decoder()(ids, use_cache=False), *[lambda layer=layer: train(layer) for layer in layers]
    )
    planned = flops_per_token(sizes, HiddenStage(tokens=1, target=target))
    assert planned == pytest.approx(real, rel=0.05)


def test_operations_of_layers_beside_the_logits() -> None:
    """On top of the logits: the teacher's layers, and forward and backward of the layers with a mixer, once more."""
    _, _, sizes = models("mamba2", (1,))
    for train in (("mixer", "mlp", "attention", "norms"), ("mixer",)):
        stages = (LogitsStage(tokens=1, train=train, hidden_weight=weight) for weight in (0.1, 0.0))
        more, plain = (flops_per_token(sizes, stage) for stage in stages)
        block = HiddenStage(tokens=1, target="block", train=("mixer", "mlp") if "mlp" in train else ("mixer",))
        assert more - plain == flops_per_token(sizes, block)


@pytest.mark.parametrize("block", [BLOCK, 512])
def test_operations_of_the_mixing_stage(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One strip, and four, of which the columns above the diagonal are skipped."""
    monkeypatch.setattr(strips, "ROWS", dict.fromkeys(strips.ROWS, strips.ROWS["cpu"]))
    teacher, student, sizes = models("mamba2", (1,))
    sizes = dataclasses.replace(sizes, block=block)
    ids = torch.randint(0, 96, (BATCH, block))
    hidden_BTD = torch.randn(BATCH, block, 64, requires_grad=True)  # the formula counts the input's gradient too
    mixers = [student.get_decoder().layers[index].self_attn for index in mixer_layers(student.config)]
    q_BHTP, k_BKTP = torch.randn(BATCH, 4, block, 16), torch.randn(BATCH, 2, block, 16)

    def train(mixer: torch.nn.Module) -> None:
        streamed_mixing_distance(mixer.matrix_factors(hidden_BTD), q_BHTP, k_BKTP, scaling=0.25).backward()

    real = (
        BLOCK
        / block
        * counted(  # `counted` divides by the tokens of shorter blocks
            lambda: teacher.get_decoder()(ids, use_cache=False),
            *[lambda mixer=mixer: train(mixer) for mixer in mixers],
        )
    )
    # The formula counts the output projection, which makes no matrix.
    unused = 3 * 2 * len(mixers) * 64 * 64
    assert flops_per_token(sizes, MixingStage(tokens=1)) - unused == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_worst_moment_of_the_mixing_stage(batch: int, mixer: str, dtype: torch.dtype) -> None:
    """What lives at once in a real layer's forward and backward, beside what is planned."""
    hidden, block = 256, 512
    config = plan(tiny_config(hidden_size=hidden, num_attention_heads=8, num_key_value_heads=8), mixer=mixer)
    layer = empty_model(config).get_decoder().layers[0].self_attn.to_empty(device="cpu")
    layer.reset_parameters()
    saved = activations.of_matrix(layer, hidden, block, dtype)
    planned = batch * saved.a_sequence + saved.once + strips.working_bytes(batch * 8, 32, 32, block, "cpu")
    u_BTD = torch.randn(batch, block, hidden)

    def step() -> None:
        q_BHTP, k_BHTP = (torch.randn(batch, 8, block, 32) for _ in range(2))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = streamed_mixing_distance(layer.matrix_factors(u_BTD), q_BHTP, k_BHTP, scaling=0.2)
        loss.backward()

    step()  # from now on gradients are there
    with LiveBytes([*layer.parameters(), *(p.grad for p in layer.parameters() if p.grad is not None), u_BTD]) as live:
        step()
    assert planned == pytest.approx(live.most, rel=0.1)


def test_what_the_mixing_stage_takes_grows_with_the_length_and_not_its_square() -> None:
    student, made = convert_with_report(LlamaForCausalLM(tiny_config()))
    stage = MixingStage(tokens=1)

    def needed(block: int) -> int:
        recipe = {"name": "x", "teacher": {"path": "t"}, "data": {"source": "s", "block": block}}
        recipe = Recipe.model_validate(recipe | {"stages": {"mixing": stage.model_dump(exclude_unset=True)}})
        sizes = sizes_of(student, block, made.parameters_before, made.parameters_after)
        return kept_for_backward(recipe, stage, sizes, student, 2).graph

    short, middle, long = map(needed, (2048, 4096, 8192))
    assert middle / short < 2.05
    assert long / middle < 2.05


def test_longer_blocks_cost_attention_more_and_the_scan_nothing() -> None:
    _, _, sizes = models("mamba2", ())
    longer = dataclasses.replace(sizes, block=2 * BLOCK)
    more = flops_per_token(longer, LogitsStage(tokens=1)) - flops_per_token(sizes, LogitsStage(tokens=1))
    assert more == 3 * 4 * BLOCK * 4 * 16  # the teacher's three layers alone


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_activations_are_those_of_a_real_layer(mixer: str) -> None:
    """What autograd keeps for one more layer of a student with weights, on a batch of two."""

    def kept(n_layers: int, kept_layers: tuple[int, ...]) -> int:
        teacher = LlamaForCausalLM(tiny_config(num_hidden_layers=n_layers, attn_implementation="sdpa"))
        student, _ = convert_with_report(teacher, mixer=mixer, keep_attention=kept_layers)
        student.requires_grad_(True).train()
        parameters = {parameter.data_ptr() for parameter in student.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        positions = torch.arange(BLOCK).expand(BATCH, -1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = student.get_decoder()(torch.zeros_like(positions), position_ids=positions, use_cache=False)
        assert out.last_hidden_state.requires_grad
        return sum(saved.values())

    config = plan(tiny_config(num_hidden_layers=2, attn_implementation="sdpa"), mixer=mixer, keep_attention=[1])
    mixing, attending = empty_model(config).get_decoder().layers
    for layer, real in ((mixing, kept(2, (1,)) - kept(1, (0,))), (attending, kept(2, (1,)) - kept(1, ()))):
        planned = BATCH * activations.of_layer(layer, 64, BLOCK, torch.float32).a_sequence
        assert planned == pytest.approx(real, rel=0.05)
    layer = activations.of_layer(mixing, 64, BLOCK, torch.float32)
    assert activations.of_mixer(mixing.self_attn, 64, BLOCK, torch.float32).a_sequence < layer.a_sequence
    assert activations.of_layer(mixing, 64, BLOCK, torch.bfloat16).a_sequence < layer.a_sequence


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_checkpointing_a_layer_more_keeps_its_input_more(dtype: str) -> None:
    """Counted in the forward of a real student: whatever autograd keeps, apart from its weights."""
    hidden, stage = 256, LogitsStage(tokens=1, gradient_checkpointing=True)

    def kept(n_layers: int) -> tuple[int, int]:
        config = tiny_config(hidden_size=hidden, intermediate_size=704, num_hidden_layers=n_layers)
        student, made = convert_with_report(LlamaForCausalLM(config), keep_attention=[1])
        recipe = Recipe(
            name="x",
            dtype=dtype,
            teacher={"path": "t"},
            data={"source": "s", "block": BLOCK},
            stages={"logits": stage.model_dump(exclude_unset=True)},
        )
        sizes = sizes_of(student, BLOCK, made.parameters_before, made.parameters_after)
        planned = kept_for_backward(recipe, stage, sizes, student, BATCH).graph
        student.requires_grad_(True).train().gradient_checkpointing_enable({"use_reentrant": False})
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        ids = torch.zeros(BATCH, BLOCK, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student(ids, use_cache=False)
        weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}
        return planned, sum(storage.nbytes() for key, storage in saved.items() if key not in weights)

    (planned_4, real_4), (planned_2, real_2) = kept(4), kept(2)
    assert planned_4 - planned_2 == real_4 - real_2 == 2 * 4 * BATCH * BLOCK * hidden


@pytest.mark.parametrize("index", [0, 1])
def test_autocast_keeps_a_copy_of_every_matrix(index: int) -> None:
    layer = empty_model(plan(tiny_config(), keep_attention=[1])).get_decoder().layers[index]
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    positions = BLOCK * 16 * 4
    in_bfloat16, in_float32 = (
        activations.of_layer(layer, 64, BLOCK, dtype).once for dtype in (torch.bfloat16, torch.float32)
    )
    assert 2 * matrices <= in_bfloat16 <= 2 * matrices + positions
    assert in_float32 <= positions


def test_activations_leave_the_model_as_it_is() -> None:
    student = empty_model(plan(tiny_config()))
    layer = student.get_decoder().layers[0]
    before = {name: id(parameter) for name, parameter in layer.named_parameters()}
    activations.of_layer(layer, 64, BLOCK, torch.float32)
    assert {name: id(parameter) for name, parameter in layer.named_parameters()} == before
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_memory_grows_with_what_a_stage_trains_and_reads() -> None:
    teacher = empty_model(tiny_config())
    student = empty_model(plan(tiny_config(), keep_attention=[1]))
    for model in (teacher, student):
        model.tie_weights()
    made = report(teacher, student)
    sizes = sizes_of(student, BLOCK, made.parameters_before, made.parameters_after)

    def needed(batch_size: int = 4, dtype: str = "float32", **stage: dict) -> int:
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "dtype": dtype,
                "teacher": {"path": "t"},
                "data": {"source": "s", "block": BLOCK},
                "stages": {name: {"tokens": 1000, "batch_size": batch_size, **own} for name, own in stage.items()},
            }
        )
        (only,) = recipe.stages.named().values()
        kept = kept_for_backward(recipe, only, sizes, student, batch_size)
        assert kept.in_all > 0
        return memory("one", numbers(recipe, only, sizes, student, kept, passes=1, processes=1)).total

    assert needed(hidden={}) < needed(hidden={"target": "block"}) < needed(logits={})
    assert needed(hidden={"target": "heads"}) < needed(hidden={})
    assert needed(hidden={"target": "block"}) < needed(hidden={"target": "block", "train": ["mixer", "mlp"]})
    assert needed(logits={}, dtype="bfloat16") < needed(logits={})
    assert needed(logits={"gradient_checkpointing": True}) < needed(logits={})
    once, twice, thrice = (needed(batch_size, logits={}) for batch_size in (2, 4, 6))  # all less than a chunk
    assert thrice - twice == twice - once > 0


def test_an_offline_teacher_costs_nothing() -> None:
    _, _, sizes = models("mamba2", ())
    beside, from_disk = LogitsStage(tokens=1), LogitsStage(tokens=1, offline_teacher={"top_k": 8})
    teacher = 2 * (sizes.teacher["attention"] + sizes.teacher["mlp"]) + 3 * 4 * BLOCK * 4 * 16 + 2 * 64 * 96
    assert flops_per_token(sizes, beside) - flops_per_token(sizes, from_disk) == teacher


def test_measured_rates_are_those_that_a_machine_can_have() -> None:
    rates = measure("cpu", torch.float32, 64, seconds=0.1)
    assert 1e7 < rates.flops < 1e14
    assert 1e7 < rates.bytes < 1e13


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(0), "0"),
        (count(999), "999"),
        (count(1000), "1K"),
        (count(1234567), "1.23M"),
        (count(999_600), "1M"),
        (count(2.5e22), "25Z"),
        (count(2.5e25), "2.5e+04Z"),
        (size(0), "0 B"),
        (size(1023), "1023 B"),
        (size(1536), "1.5 KiB"),
        (size(3 * 2**30), "3 GiB"),
        (size(200.4 * 2**20), "200 MiB"),
        (duration(0.2), "under 1 s"),
        (duration(59), "59 s"),
        (duration(600), "10 min"),
        (duration(2 * 3600), "2.0 h"),
        (duration(3 * 86400), "3.0 days"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_units_are_read_back() -> None:
    assert (read_count("400T"), read_count("1.5e2"), read_count("2.5B")) == (4e14, 150, 2.5e9)
    assert (read_size("80GB"), read_size("79.5 GiB"), read_size("512MiB")) == (8e10, 79.5 * 2**30, 2**29)
    for wrong in ("T", "0T", "-1T", "400TB", "4 0T", "nan"):
        with pytest.raises(ValueError, match=wrong):
            read_count(wrong)
    for wrong in ("80", "80G", "80gb", "0GB", "GB"):
        with pytest.raises(ValueError, match=wrong):
            read_size(wrong)
