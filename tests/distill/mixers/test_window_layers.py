"""Layers of attention behind a window beside layers of another mixer: each is what it would be by itself."""

import json

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from distill import convert, load_student
from distill.cache import cache_nbytes
from distill.conversion import convert_with_report, plan
from distill.conversion_view import layers as shown_layers
from distill.convert_stage import convert_stage
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.export.footprint import footprint_of
from distill.export.limits import LIMITS
from distill.export.refusals import check_exportable
from distill.fitting import calibrate_student
from distill.mixers import MIXERS
from distill.reach import reached
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.run import at_work_on
from distill.student import mixers_of
from distill.windowed import matching_window, windowed
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import CHECKOUT, disturbed, tiny
from tests.distill.agreement import close, layers_alone_agree, pieces_agree, prompt, two_documents
from tests.distill.families.models import CASES, config
from tests.distill.families.models import tiny as tiny_case

WINDOW, SINKS = 5, 2
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
LAYOUTS = {"between": ([1], []), "first": ([0], []), "with attention": ([2], [0])}
SETTINGS = {"window": WINDOW, "sinks": SINKS}


def mixed(mixer: str = "based", windows=(1,), kept=(), family: str = "llama", **settings) -> PreTrainedModel:
    sizes = SETTINGS | settings
    return convert(tiny(family), mixer=mixer, window_layers=windows, keep_attention=kept, **sizes)


@pytest.fixture(params=sorted(MIXERS))
def mixer(request) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS)
def student(request, mixer) -> PreTrainedModel:
    windows, kept = LAYOUTS[request.param]
    return disturbed(mixed(mixer, windows, kept)).double()  # so that the order of sums does not matter


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_such_a_layer_is_the_teachers_behind_the_window(family, mixer, how):
    """Bit for bit, as far up as no other mixer stands; of a window that hides nothing as the teacher is."""
    teacher, ids = tiny(family), prompt(2, 40)
    teacher.set_attn_implementation(how)
    narrow = windowed(teacher, [0], window=WINDOW, sinks=SINKS)
    for window, expected in ((WINDOW, narrow), (40, teacher)):
        layout = {"mixer": mixer, "window_layers": [0], "keep_attention": [1], "window": window, "sinks": SINKS}
        made = convert(teacher, **layout)
        assert made.config.distill["layers"] == ["sliding_window", "attention", mixer]
        ours, theirs = (model(ids, output_hidden_states=True).hidden_states for model in (made, expected))
        assert torch.equal(ours[2], theirs[2])
    assert not torch.equal(narrow(ids, output_hidden_states=True).hidden_states[2], theirs[2])


def test_the_other_layers_are_what_they_are_without(mixer):
    """Their sizes and their seeds do not depend on what stands beside them."""
    alone, beside = convert(tiny("qwen2"), mixer=mixer, keep_attention=[1]), mixed(mixer, family="qwen2")
    for index in (0, 2):
        ours, theirs = (mixers_of(model)[index] for model in (beside, alone))
        assert type(ours) is type(theirs)
        expected = theirs.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


def test_pieces_agree_in_a_growing_cache_that_holds_no_more_than_the_window(student):
    pieces_agree(student)
    cache = DynamicCache(config=student.config)
    student(prompt(2, 40), past_key_values=cache)
    for index, one in mixers_of(student).items():
        if one.of_attention:
            held = cache.layers[index]
            assert held.keys.nbytes + held.values.nbytes == 2 * one.state_bytes(student.dtype)  # a batch of two


def test_pieces_agree_in_a_static_cache(student):
    static_pieces_agree(student)


def static_pieces_agree(student: PreTrainedModel) -> None:
    ids = prompt(2, 40)
    expected = student(ids, use_cache=False).logits
    for pieces in ([40], [17, 3, 20], [1] * 40):
        cache = StaticCache(config=student.config, max_cache_len=48)
        got = [student(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        close(torch.cat(got, dim=1), expected)


def test_a_step_with_a_static_cache_is_compiled_once_and_whole():
    student, ids = disturbed(mixed("mamba2")), prompt(1, 20)
    expected = student(ids, use_cache=False).logits
    counted = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counted.clear()
    step = torch.compile(student.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        cache = StaticCache(config=student.config, max_cache_len=32)
        got = [student(ids[:, :10], past_key_values=cache).logits]
        got += [step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
    close(torch.cat(got, dim=1), expected)
    assert counted["unique_graphs"] == 1


def test_left_padded_prompts_generate_what_each_does_alone(student):
    prompts = [prompt(1, length)[0] for length in (1, 8, 21)]
    alone = torch.stack([student.generate(ids[None], **GREEDY)[0, len(ids) :] for ids in prompts])
    ids = torch.stack([torch.cat([torch.zeros(21 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(21) >= 21 - len(p) for p in prompts]).long()
    static = {"cache_implementation": "static", "disable_compile": True}
    for how in ({}, {"use_cache": False}, static):
        assert torch.equal(student.generate(ids, attention_mask=mask, **how, **GREEDY)[:, 21:], alone), how


def test_packed_documents_give_the_logits_of_the_documents_alone(student):
    ids, positions = prompt(2, 30), torch.cat([torch.arange(n) for n in (12, 1, 17)]).expand(2, -1)
    together = student(ids, position_ids=positions, use_cache=False).logits
    for start, end in [(0, 12), (12, 13), (13, 30)]:
        close(together[:, start:end], student(ids[:, start:end], use_cache=False).logits)


def test_a_layer_fed_alone_is_the_layer_in_its_model(student):
    layers_alone_agree(student, two_documents())


def test_saving_and_loading_change_nothing(student, tmp_path):
    student.float().save_pretrained(tmp_path)
    assert torch.equal(load_student(tmp_path)(prompt(1, 30)).logits, student(prompt(1, 30)).logits)


def test_the_start_of_each_layer_is_told():
    student, told = convert_with_report(tiny("llama"), mixer="based", window_layers=[1], **SETTINGS)
    assert list(told.seeded) == [0, 1, 2]
    assert [part.target for part in told.seeded[1]] == ["attention"]
    assert len(told.seeded[0]) > 1
    assert "2 of 3 become based (m); layer 1 attend" in shown_layers(told).plain
    assert shown_layers(told).plain.startswith("layers  m w m ")
    plain, _ = convert_with_report(tiny("llama"), mixer="based", keep_attention=[1])
    windows = 2 * (2 * 8) * (WINDOW + SINKS) * 4  # keys and values of two heads of 8
    assert (
        told.state_bytes
        == convert_with_report(tiny("llama"), mixer="based", keep_attention=[1])[1].state_bytes + windows
    )
    assert told.kv_bytes_per_token == 0
    assert reached(plain, LogitsStage(tokens=1)) != reached(student, LogitsStage(tokens=1))


def test_the_attention_starts_as_the_teacher_s_unless_seeds_are_not_wanted():
    teacher = tiny("llama")
    theirs = attention_of(layers_of(teacher)[1]).q_proj.weight
    for seeds in (True, False):
        student = convert(teacher, mixer="based", window_layers=[1], seed_from_attention=seeds, **SETTINGS)
        assert torch.equal(mixers_of(student)[1].attention.q_proj.weight, theirs) == seeds


def test_what_is_remembered_is_what_a_cache_holds(mixer):
    student = mixed(mixer)
    cache = student(torch.arange(3, 43)[None], use_cache=True).past_key_values
    assert footprint_of(student.config).student_bytes(40) == cache_nbytes(cache)
    assert matching_window(tiny("llama"), student).layers == (0, 1, 2)


def test_copies_are_of_the_mixers_heads_alone(mixer):
    if mixer == "based":
        with pytest.raises(UserError, match="copies of a head would stay alike"):
            mixed(mixer, expand=2)
        return
    once, twice = mixed(mixer), mixed(mixer, expand=2)
    assert mixers_of(twice)[0].n_heads == 2 * mixers_of(once)[0].n_heads
    ours, theirs = (mixers_of(model)[1].state_dict() for model in (twice, once))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    operations = [footprint_of(model.config).scan_operations for model in (once, twice)]
    of_window = 4 * 4 * 8 * (WINDOW + SINKS)
    assert operations[1] - of_window == 2 * (operations[0] - of_window)


def test_heads_are_kept_beside_the_other_mixers():
    student = mixed("mamba2", keep_heads={0: [1]})
    pieces_agree(disturbed(student).double())
    with pytest.raises(UserError, match="keep_heads names layer 1, which window_layers names too"):
        mixed("mamba2", keep_heads={1: [0]})


def test_rotations_are_asked_of_the_other_layers_alone():
    student = mixed("mamba2", rope="keep")
    assert mixers_of(student)[0].rope == "keep"
    pieces_agree(disturbed(student).double())


def names_of(student: PreTrainedModel, layer: int) -> set[str]:
    prefix = f"model.layers.{layer}.self_attn."
    return {name for name, _ in student.named_parameters() if name.startswith(prefix)}


def test_stage_1_leaves_them_alone_and_the_others_do_not():
    teacher = tiny("llama")
    student = disturbed(mixed()).requires_grad_(True)
    mixing = MixingObjective(teacher, student, MixingStage(tokens=1000))
    parts = list(mixing.parts(two_documents()))
    assert [part.name for part in parts] == ["layers.0", "layers.2"]
    sum(part.loss_sum() for part in parts).backward()
    moved = {name for name, one in student.named_parameters() if one.grad is not None and one.grad.any()}
    assert moved == reached(student, MixingStage(tokens=1000))
    assert not moved & names_of(student, 1)
    student.zero_grad()
    for objective, settings in ((HiddenObjective, HiddenStage), (LogitObjective, LogitsStage)):
        parts = list(objective(teacher, student, settings(tokens=1000)).parts(two_documents()))
        assert len(parts) == (3 if objective is HiddenObjective else 1)
        sum(part.loss_sum() for part in parts).backward()
        moved = {name for name, one in student.named_parameters() if one.grad is not None and one.grad.any()}
        assert moved == reached(student, settings(tokens=1000))
        assert names_of(student, 1) <= moved
        student.zero_grad()


@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_calibration_fits_the_others_alone(order):
    teacher = tiny("llama").double()
    student = convert(teacher, mixer="mamba2", window_layers=[1], **SETTINGS)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    ids = torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(4))
    text = {"input_ids": ids, "position_ids": torch.arange(40).expand(4, -1), "valid": ids > 0}
    told = calibrate_student(student, teacher, [text], layers=order)
    assert list(told) == [0, 2]
    assert all(layer.error_after < layer.error_before for layer in told.values())
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= names_of(student, 0) | names_of(student, 2)
    assert {f"model.layers.{index}.self_attn.out_proj.weight" for index in (0, 2)} <= changed


def test_a_recipe_is_converted_so(tmp_path):
    recipe = tmp_path / "own.yaml"
    (tmp_path / "text.txt").write_text((CHECKOUT / "distill" / "recipe.py").read_text())
    recipe.write_text(f"""\
run_dir: {tmp_path}/run
device: cpu
teacher: {{path: {CHECKOUT / "teachers" / "stdlib-1m"}}}
student: {{mixer: based, window_layers: [1, 3], window: 8, calibrate: {{tokens: 300, memories: false}}}}
data: {{source: {tmp_path}/text.txt, separator: "\\n\\n", block: 64, held_out: {{by: tail}}}}
stages: {{logits: {{tokens: 1024}}}}
evaluation: {{tokens: 256}}
""")
    with at_work_on(recipe, ()) as run:
        convert_stage(run)
    told = json.loads((tmp_path / "run" / "convert" / "conversion.json").read_text())
    assert told["layers"] == ["based", "sliding_window"] * 2
    assert list(told["calibrated"]) == ["0", "2"]


@pytest.mark.parametrize("to", sorted(LIMITS))
def test_no_native_class_has_such_layers(to):
    config = mixed("mamba2", [1], [0]).config
    with pytest.raises(UserError) as error:
        check_exportable(config, to)
    assert str(error.value).splitlines()[1].startswith("  layer 1: sliding_window mixers (attention that also sees")
    assert str(error.value).splitlines()[1].endswith("; set student.window_layers: []")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"window_layers": [3]}, "window_layers names layer 3; the teacher has 3 layers, numbered 0 to 2"),
        ({"window_layers": [-1]}, "window_layers names layer -1; the teacher has 3 layers"),
        ({"window_layers": [1, 1]}, "window_layers names layer 1 more than once"),
        ({"window_layers": [0, 1], "keep_attention": [1]}, "window_layers names layer 1, which keeps attention"),
        ({"window_layers": [0, 1], "keep_attention": [2]}, "window_layers leaves no layer to based; name fewer, or"),
        ({"window_layers": [0], "mixer": "sliding_window"}, "window_layers is for students of another mixer"),
        ({"window_layers": [0], "window": 0}, "window is 0 and sinks 4; they are at least 1 and 0"),
        ({"window": 8}, "window and sinks are for sliding_window, not for based; leave them out, or give window_lay"),
        ({"sinks": 0}, "window and sinks are for sliding_window, not for based"),
    ],
)
def test_what_cannot_be_is_refused(wanted, says):
    with pytest.raises(UserError, match=says):
        convert(tiny("llama"), **{"mixer": "based"} | wanted)


def test_layers_with_windows_of_their_own_are_named_with_what_would_do():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings = {**CASES["Qwen2"][1], "num_hidden_layers": 4, "layer_types": kinds}
    teacher = config("qwen2", settings)
    told = r"\(layers 0, 2: 6 tokens; layer 1: none\); put layer 1 in keep_attention"
    with pytest.raises(UserError, match=rf"different windows of their own {told}, or not in window_layers$"):
        plan(teacher, mixer="mamba2", window_layers=[0, 1, 2])
    with pytest.raises(UserError, match=rf"different windows of their own {told}$"):
        plan(teacher, mixer="sliding_window", keep_attention=[3])


def test_a_window_of_the_layers_own_stays():
    """Of such layers alone all must have the same; what the other mixers replace may have any."""
    teacher = tiny_case("Qwen2")  # of three layers the first and the last see six tokens back
    with pytest.raises(UserError, match="different windows of their own"):
        convert(teacher, mixer="mamba2", window_layers=[0, 1])
    for windows, own in (([0], 6), ([1], None)):
        student = convert(teacher, mixer="mamba2", window_layers=windows, **SETTINGS)
        assert student.config.distill["mixer"]["own_window"] == own
        pieces_agree(disturbed(student).double())
        static_pieces_agree(student)
