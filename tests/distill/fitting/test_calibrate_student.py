"""A student's layers are fitted on what they read: the teacher's states, or their own, and nothing else changes."""

import copy
import json

import pytest
import torch

from distill import UserError, convert
from distill.capture import as_decoder_calls, layer_traces, sequence_arguments
from distill.convert_stage import convert_stage
from distill.decoder import layers_of
from distill.fitting import calibrate_student, layers
from distill.fitting.memories import SET_MEMORY
from distill.mixers import MIXERS
from distill.run import at_work_on
from distill.student import mixers_of
from distill.teacher_fed import outputs_by_layer
from tests.conftest import CHECKOUT, tiny
from tests.distill.families.models import tiny as family_teacher
from tests.vision_models import image_batch, row_of, tiny_vision

NAMES = sorted(MIXERS)
ORDERS = ["parallel", "sequential"]


def batches(n: int = 3, rows: int = 4, length: int = 40) -> list[dict[str, torch.Tensor]]:
    """Rows of two documents each."""
    torch.manual_seed(4)
    positions = torch.cat([torch.arange(25), torch.arange(length - 25)]).expand(rows, -1)
    ids = torch.randint(3, 97, (n, rows, length))
    valid = torch.ones(rows, length, dtype=torch.bool)
    return [{"input_ids": part, "position_ids": positions, "valid": valid} for part in ids]


def pair(name: str, family: str = "llama", keep: tuple[int, ...] = ()):
    teacher = tiny(family).double()
    return teacher, convert(teacher, mixer=name, keep_attention=keep, rope="keep")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_changes_but_what_is_fitted(name, order):
    teacher, student = pair(name, keep=(1,))
    before, theirs = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    calibrate_student(student, teacher, batches(), layers=order, memories=False)
    after = student.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {f"model.layers.{i}.self_attn.out_proj.weight" for i in (0, 2)}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in teacher.state_dict().items())
    again = convert(teacher, mixer=name, keep_attention=(1,), rope="keep")
    calibrate_student(again, teacher, batches(), layers=order, memories=False)
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("name", "fitted"),
    [
        ("mamba2", {"A_log", "dt_bias"}),
        ("discrete_mamba2", {"A_log_bias", "in_proj.weight"}),
        ("gated_deltanet", {"A_log"}),
    ],
)
def test_memories_alone_change_the_decays_and_the_matrix_size(name, fitted):
    teacher, student = pair(name)
    before = copy.deepcopy(student.state_dict())
    told = calibrate_student(student, teacher, batches(), outputs=False)
    changed = {key for key, tensor in student.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key.partition("self_attn.")[2] for key in changed} == fitted
    if name == "discrete_mamba2":
        for mixer, old in zip(mixers_of(student).values(), mixers_of(pair(name)[1]).values(), strict=True):
            others = [place for row, place in mixer.in_rows().items() if row != "C"]
            assert all(torch.equal(mixer.in_proj.weight[place], old.in_proj.weight[place]) for place in others)
    assert all(len(layer.memories) == 4 and layer.error_after is None for layer in told.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parallel_errors_are_those_of_the_layers_on_the_teachers_states(name, family):
    teacher, student = pair(name, family)
    wanted = {"before": measured(teacher, student)}
    told = calibrate_student(student, teacher, batches(), memories=False)
    wanted["after"] = measured(teacher, student)
    for index, layer in told.items():
        assert layer.error_before == pytest.approx(wanted["before"][index], rel=1e-6)
        assert layer.error_after == pytest.approx(wanted["after"][index], rel=1e-6)
        assert layer.error_after < min(1, layer.error_before)


@pytest.mark.parametrize("order", ORDERS)
def test_kept_heads_count_as_done(order):
    """With all heads kept nothing is left to fit, and the projection, which starts at zero, stays there."""
    teacher = tiny("qwen2").double()
    student = convert(teacher, keep_heads={0: [0, 1, 2, 3], 1: [1]}, rope="keep")
    before = copy.deepcopy(student.state_dict())
    told = calibrate_student(student, teacher, batches(), layers=order)
    assert not before["model.layers.0.self_attn.mixer.out_proj.weight"].any()
    assert student.get_submodule("model.layers.0.self_attn.mixer.out_proj").weight.abs().max() < 1e-9
    assert told[1].error_after < told[1].error_before
    if order == "parallel":
        after = measured(teacher, student)
        ids = batches()[0]["input_ids"]
        assert after[0] < 1e-20
        assert after[1] < 0.9
        assert student(ids).logits.isfinite().all()


def measured(teacher, student) -> dict[int, float]:
    rest: dict[int, float] = dict.fromkeys(mixers_of(student), 0.0)
    size = dict(rest)
    with torch.no_grad():
        for batch in batches():
            for index, outputs in outputs_by_layer(teacher, student, batch, "mixer"):
                made, wanted = outputs()
                rest[index] += float((made - wanted).square().sum())
                size[index] += float(wanted.square().sum())
    return {index: rest[index] / size[index] for index in rest}


def test_what_kept_heads_leave_of_attention_is_fitted():
    teacher = tiny("qwen2").double()
    student = convert(teacher, keep_heads={0: [1], 2: [0, 3]}, rope="keep")
    before = copy.deepcopy(student.state_dict())
    told = calibrate_student(student, teacher, batches(), memories=False)
    changed = {key for key, tensor in student.state_dict().items() if not torch.equal(tensor, before[key])}
    projections = {0: "mixer.out_proj", 1: "out_proj", 2: "mixer.out_proj"}
    assert changed == {f"model.layers.{i}.self_attn.{name}.weight" for i, name in projections.items()}
    whole = measured(teacher, student)
    for index in (0, 2):
        size = left = 0.0
        for batch in batches():
            trace = layer_traces(teacher, batch, [index], ("attention_input", "attention_output"))[index]
            more = {**sequence_arguments(batch), "position_embeddings": trace.position_embeddings}
            with torch.no_grad():
                kept = mixers_of(student)[index].kept(trace.attention_input, **more)
            size += float(trace.attention_output.square().sum())
            left += float((trace.attention_output - kept).square().sum())
        assert told[index].error_after * left == pytest.approx(whole[index] * size, rel=1e-6)
        assert told[index].error_after < min(1, told[index].error_before)


def test_in_sequence_kept_heads_are_left_out_as_in_parallel():
    teacher = tiny("llama").double()
    students = [convert(teacher, keep_attention=[0, 1], keep_heads={2: [0, 3]}) for _ in ORDERS]
    for student, order in zip(students, ORDERS, strict=True):
        calibrate_student(student, teacher, batches(), layers=order)
    for first, second in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("keep", [(0, 2), (1, 2)])
def test_in_sequence_one_layer_is_fitted_as_in_parallel(keep):
    teacher, student = pair("mamba2", keep=keep)
    other = copy.deepcopy(student)
    told = [
        calibrate_student(model, teacher, batches(), layers=order)
        for model, order in ((student, "parallel"), (other, "sequential"))
    ]
    assert told[0].keys() == told[1].keys()
    for first, second in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_in_sequence_errors_are_those_of_the_stream_of_the_finished_student(name):
    teacher, student = pair(name, keep=(1,))
    told = calibrate_student(student, teacher, batches(), layers="sequential", memories=False)
    for index, layer in told.items():
        rest = size = 0.0
        for batch in batches():
            fields = ("layer_input", "attention_output")
            theirs = layer_traces(teacher, batch, [index], fields)[index]
            stream_BTD = state_before(student, batch, index)
            wanted_BTD = theirs.layer_input + theirs.attention_output
            made_BTD = attended(layers_of(student)[index], stream_BTD, theirs, batch)
            rest += float((stream_BTD + made_BTD - wanted_BTD).square().sum())
            size += float((wanted_BTD - stream_BTD).square().sum())
        assert layer.error_after == pytest.approx(rest / size, rel=1e-6)


@torch.no_grad()
def attended(layer, stream_BTD, trace, batch) -> torch.Tensor:
    """What a layer's mixer makes of the stream."""
    seen = []
    handle = layer.self_attn.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    try:
        as_decoder_calls(layer, stream_BTD, trace, sequence_arguments(batch))
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def state_before(student, batch, index: int) -> torch.Tensor:
    """The student's own state in front of a layer, from a whole forward pass."""
    seen = []
    handle = layers_of(student)[index].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("memories", [False, True])
@pytest.mark.parametrize("name", sorted(name for name, made in MIXERS.items() if made in SET_MEMORY))
def test_padding_has_no_say(name, memories):
    teacher, student = pair(name, "qwen2")  # whose biases speak where nothing is read
    other = copy.deepcopy(student)
    (whole,) = batches(1, length=40)
    padded = copy.deepcopy(whole)
    padded["input_ids"][:, 30:] = 5
    padded["valid"] = whole["valid"].clone()
    padded["valid"][:, 30:] = False
    cut = {key: tensor[:, :30] for key, tensor in whole.items()}
    told = [
        calibrate_student(model, teacher, [batch], memories=memories)
        for model, batch in ((student, padded), (other, cut))
    ]
    for index in told[0]:
        assert told[0][index].memories == (pytest.approx(told[1][index].memories) if memories else None)
        assert told[0][index].error_after == pytest.approx(told[1][index].error_after, rel=1e-6)
    for first, second in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_rows_with_images_are_fitted_too(name, order, monkeypatch):
    """Whose pixels are per image or per patch: a batch's first rows are not the first of its tensors."""
    monkeypatch.setattr(layers, "MATRIX_TOKENS", 1)
    teacher, batch = tiny_vision(name), with_images(image_batch(name, (17, 12, 17)))
    student, other = (convert(teacher, rope="keep") for _ in range(2))
    told = calibrate_student(student, teacher, [batch], layers=order)
    assert all(layer.error_after < layer.error_before for layer in told.values())
    alone = with_images(row_of(name, image_batch(name, (17, 12, 17)), 0, slice(None)))
    expected = calibrate_student(other, teacher, [alone], outputs=False)
    assert [layer.memories for layer in told.values()] == [layer.memories for layer in expected.values()]


def with_images(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As stages get them."""
    return {**batch, "valid": batch["attention_mask"].bool()}


def test_a_student_of_another_precision_is_fitted():
    """On what a teacher in bf16 made, as stages train one in fp32."""
    teacher = tiny("llama")
    student = convert(teacher)
    told = calibrate_student(student, teacher.bfloat16(), batches(1))
    assert all(layer.error_after < layer.error_before for layer in told.values())


PLAIN = ["Llama", "Qwen2", "GPT-2"]


@pytest.mark.parametrize("case", [*PLAIN, "Gemma 2", "OLMo 2", "Granite", "Phi"])
def test_sequence_is_for_layers_that_add_attention_as_it_is(case):
    teacher = family_teacher(case)
    student = convert(teacher)
    if case in PLAIN:
        assert calibrate_student(student, teacher, batches(1), layers="sequential").keys() == {0, 1, 2}
    else:
        with pytest.raises(UserError, match="do not add attention's output to the stream as it is"):
            calibrate_student(student, teacher, batches(1), layers="sequential")
    assert calibrate_student(convert(teacher), teacher, batches(1)).keys() == {0, 1, 2}


def test_what_has_nothing_to_fit_is_refused():
    teacher = tiny("llama")
    with pytest.raises(UserError, match=r"not for sliding_window: .* attention itself.*leave it out"):
        calibrate_student(convert(teacher, mixer="sliding_window"), teacher, batches(1))
    with pytest.raises(UserError, match=r"memories is not for based: .* forget nothing.*give memories: false"):
        calibrate_student(convert(teacher, mixer="based"), teacher, batches(1))
    assert set(MIXERS.values()) - set(SET_MEMORY) == {MIXERS["based"]}
    assert calibrate_student(convert(teacher, keep_attention=range(3)), teacher, batches(1)) == {}


def test_the_stage_of_a_recipe_calibrates_and_tells(tmp_path):
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text((CHECKOUT / "distill" / "recipe.py").read_text() * 2)
    recipe.write_text(f"""\
run_dir: {tmp_path}/run
device: cpu
teacher: {{path: {CHECKOUT / "teachers" / "stdlib-1m"}}}
student: {{calibrate: {{tokens: 300, layers: sequential}}}}
data: {{source: {text}, separator: "\\n\\n", block: 64, held_out: {{by: tail}}}}
stages: {{logits: {{tokens: 1024}}}}
evaluation: {{tokens: 256}}
""")
    losses = []
    for overrides in ([], ["student.calibrate=null", f"run_dir={tmp_path}/plain"]):
        with at_work_on(recipe, overrides) as run:
            losses.append(convert_stage(run).loss_end)
            told = json.loads((run.folder("convert") / "conversion.json").read_text())["calibrated"]
            assert told is None if overrides else all(layer["error_after"] < 1 for layer in told.values())
            assert run.is_done("convert")
    assert losses[0] < losses[1]
