"""Single attention heads beside a mixer: their teacher where all are kept, exact in every kind of call, few bytes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from distill import convert, load_student
from distill.adapters import default_lora_targets
from distill.attention import view, views
from distill.cache import HeadsCacheLayer, adopt, cache_nbytes
from distill.capture import layer_traces
from distill.conversion import empty_model, plan, report
from distill.decoder import attention_of, layers_of
from distill.errors import UserError
from distill.export.footprint import footprint_of
from distill.mixers import MIXERS, Mixer, Slot, bare, is_mixer
from distill.objectives import attention_matrix, mixing_distance
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.roles import roles
from distill.student import mixers_of, reads_any_length
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective
from tests.conftest import disturbed, tiny
from tests.distill.agreement import close, layers_alone_agree, pieces_agree, prompt, two_documents
from tests.distill.families.models import EVERY
from tests.distill.families.models import tiny as tiny_case

HEADS = {0: [3], 2: [1, 2]}  # heads that share keys, heads that do not, and a layer without any
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
IN_FP32 = {"Gemma", "Gemma 2", "Gemma 3", "Mixtral", "Qwen3-MoE"}
"""Whose norms, softmax or experts are never in fp64."""
OVER_ALL_HEADS = {"OLMo 2", "Cohere *"}
"""Whose norms of queries are not over single heads."""


@pytest.fixture(params=sorted(MIXERS))
def student(request) -> PreTrainedModel:
    return disturbed(convert(tiny("llama"), mixer=request.param, keep_heads=HEADS))


@pytest.fixture
def hybrid() -> PreTrainedModel:
    return disturbed(convert(tiny("qwen2"), keep_heads=HEADS, keep_attention=[1]))


@pytest.mark.parametrize("case", sorted(EVERY))
def test_with_all_heads_kept_and_nothing_from_the_mixers_it_is_the_teacher(case):
    teacher = tiny_case(case).to(torch.float32 if case in IN_FP32 else torch.float64)
    every = {index: range(4) for index in range(3)}
    if case in OVER_ALL_HEADS:
        with pytest.raises(UserError, match="normed over all heads together"):
            convert(teacher, keep_heads=every)
        return
    student, ids = convert(teacher, keep_heads=every), prompt(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    allowed = 1e-5 if case in IN_FP32 else 1e-9
    for more in ({}, {"position_ids": positions}, {"attention_mask": (torch.arange(30) > 4).long().expand(2, -1)}):
        got, expected = (model(ids, use_cache=False, **more).logits for model in (student, teacher))
        real = more.get("attention_mask", torch.ones(2, 30)).bool()
        assert (got - expected)[real].abs().max() <= allowed * expected.abs().max()


def test_a_kept_head_starts_as_it_was_and_the_mixer_says_nothing_in_its_place():
    teacher = tiny("llama").double()
    student = convert(teacher, mixer="mamba2", keep_heads={1: [0, 3]})
    trace = layer_traces(teacher, {"input_ids": prompt(2, 20), "position_ids": torch.arange(20)[None]}, [1])[1]
    seen, hybrid = views(teacher, [1])[1], mixers_of(student)[1]
    q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
    matrix = attention_matrix(q, k, scaling=seen.scaling)
    heads = torch.einsum("bhts,bshp->bthp", matrix, seen.values(trace.attention_input))
    heads[:, :, [1, 2]] = 0
    expected = seen.o(heads.flatten(2))
    torch.testing.assert_close(
        hybrid.kept(trace.attention_input, position_embeddings=trace.position_embeddings), expected
    )
    columns = hybrid.out_proj.weight.unflatten(1, (4, -1))
    assert not columns[:, [0, 3]].any()
    assert torch.equal(columns[:, [1, 2]], seen.o.weight.unflatten(1, (4, -1))[:, [1, 2]])


def test_prefill_chunked_prefill_and_steps_agree(student):
    pieces_agree(student)


@pytest.mark.parametrize("case", ["Gemma 2", "Gemma 3", "Falcon, new", "GPT-2", "Mistral", "Phi", "Qwen2"])
def test_windows_caps_norms_and_learned_positions_in_a_cache(case):
    student, ids = disturbed(convert(tiny_case(case), keep_heads=HEADS)), prompt(2, 20)
    expected = student(ids, use_cache=False).logits
    cache = DynamicCache(config=student.config)
    pieces = ids.split([9, 1, 1, 6, 1, 1, 1], dim=1)
    got = torch.cat([student(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate_with_a_cache_is_generate_without(hybrid, mode):
    ids = prompt(3, 11)
    uncached = {key: value for key, value in mode.items() if key == "num_beams"}
    expected = hybrid.generate(ids, use_cache=False, **GREEDY, **uncached)
    assert torch.equal(hybrid.generate(ids, **GREEDY, **mode), expected)


def test_left_padded_prompts_generate_what_each_does_alone(student):
    prompts = [prompt(1, length)[0] for length in (1, 3, 8, 21)]
    alone = [student.generate(ids[None], **GREEDY)[0, len(ids) :] for ids in prompts]
    ids = torch.stack([torch.cat([torch.zeros(21 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(21) >= 21 - len(p) for p in prompts]).long()
    for how in ("sdpa", "eager"):
        student.set_attn_implementation(how)
        together = student.generate(ids, attention_mask=mask, **GREEDY)[:, 21:]
        assert torch.equal(together, torch.stack(alone)), how


def test_packed_documents_give_the_logits_of_the_documents_alone(student):
    ids, positions = prompt(2, 30), torch.cat([torch.arange(n) for n in (12, 1, 17)]).expand(2, -1)
    for how in ("sdpa", "eager"):
        student.set_attn_implementation(how)
        together = student(ids, position_ids=positions, use_cache=False).logits
        for start, end in [(0, 12), (12, 13), (13, 30)]:
            close(together[:, start:end], student(ids[:, start:end], use_cache=False).logits)


def test_the_cache_holds_the_kept_heads_and_the_state_and_both_are_reported(student):
    teacher = tiny("llama")
    counted = report(teacher, student)
    assert counted.kv_bytes_per_token == 2 * 8 * (1 + 2) * 4  # key/value head 1; heads 0 and 1; of 8 channels, fp32
    assert counted.heads == HEADS
    for tokens in (5, 23):
        cache = student(prompt(1, tokens), use_cache=True).past_key_values
        assert cache_nbytes(cache) == counted.cache_bytes(tokens)[0]
    assert [isinstance(layer, HeadsCacheLayer) for layer in cache.layers] == [True, False, True]
    planned = report(empty_model(teacher.config), empty_model(student.config))
    assert planned.kv_bytes_per_token == counted.kv_bytes_per_token
    assert planned.parameters_after == counted.parameters_after
    with pytest.raises(ValueError, match="cannot remove 2 tokens"):
        cache.crop(-2)
    assert not reads_any_length(student)


def test_beams_and_batches_reorder_all_that_is_remembered(hybrid):
    cache = hybrid(prompt(2, 9), use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    step = prompt(1, 1).expand(2, -1)
    got = hybrid(step, past_key_values=cache).logits
    close(got, hybrid(step, past_key_values=hybrid(prompt(2, 9).flip(0), use_cache=True).past_key_values).logits)
    cache.reset()
    close(hybrid(prompt(2, 9), past_key_values=cache).logits, hybrid(prompt(2, 9), use_cache=False).logits)


def test_a_cache_filled_by_another_model_is_refused(hybrid):
    cache = tiny("qwen2")(prompt(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="another model"):
        hybrid(prompt(1, 1), past_key_values=cache)


def test_saving_and_loading_change_nothing(student, tmp_path):
    student.save_pretrained(tmp_path)
    ids = prompt(2, 30)
    for load in (load_student, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(tmp_path)(ids).logits, student(ids).logits)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert "distill_mixers_kept_heads.py" in code
    assert not {"distill_attention.py", "distill_families.py", "distill_heads.py"} & code
    convert(tiny("llama")).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "distill_mixers_kept_heads.py").exists()


@pytest.mark.parametrize("case", ["Llama", "Gemma 2", "Mistral"])
def test_a_layer_fed_alone_is_the_layer_in_its_model(case):
    """Called without the decoder: documents, padding and the window are the layer's own to hide."""
    layers_alone_agree(disturbed(convert(tiny_case(case), keep_heads=HEADS)), two_documents())


@pytest.mark.parametrize("case", ["Llama", "Mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_mask_of_four_dimensions_the_cache_says_what_is_seen(case, padded):
    """As under flash attention, whose masks are of padding alone."""
    student = disturbed(convert(tiny_case(case), keep_heads=HEADS))
    mixer, length = mixers_of(student)[0], 20
    torch.manual_seed(9)
    u, valid = torch.randn(2, length, 32), torch.ones(2, length, dtype=torch.bool)
    valid[1, :3] = not padded
    rotation = student.get_decoder().rotary_emb(u, torch.arange(length)[None])
    whole, _ = mixer(u, valid_BT=valid if padded else None, position_embeddings=rotation)
    cache, got = adopt(DynamicCache(config=student.config), [0, 1, 2], 3, [0, 2]), []
    for start, end in ((0, 9), (9, 10), (10, 13), (13, 20)):
        piece = {"position_embeddings": [part[:, start:end] for part in rotation]}
        if padded:
            piece |= {"attention_mask": valid[:, :end].long(), "valid_BT": valid[:, start:end]}
        got.append(mixer(u[:, start:end], cache=cache, **piece)[0])
    close(torch.cat(got, dim=1)[valid], whole[valid])


def test_stage_1_matches_the_other_heads_alone():
    teacher = tiny("llama")
    student = disturbed(convert(teacher, keep_heads={1: [0, 3]}))
    rows = two_documents() | {
        "valid": torch.ones(2, 30, dtype=torch.bool),
        "position_ids": torch.arange(30).expand(2, -1),
    }
    parts = {part.name: part for part in MixingObjective(teacher, student, MixingStage(tokens=1000)).parts(rows)}
    trace = layer_traces(teacher, rows, [1], ["attention_input"])[1]
    seen, mixer = views(teacher, [1])[1], mixers_of(student)[1]
    q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
    theirs = attention_matrix(q, k, scaling=seen.scaling)
    ours = mixer.mixing_matrix(trace.attention_input)
    expected = mixing_distance(ours[:, [1, 2]], theirs[:, [1, 2]], reduction="sum")
    torch.testing.assert_close(parts["layers.1"].loss_sum(), expected, rtol=1e-4, atol=1e-5)
    assert (ours[:, [1, 2]] - theirs[:, [1, 2]]).abs().max() > 1e-2


def test_kept_heads_are_attention_by_role_and_have_their_teachers_matrix_and_outputs():
    teacher = tiny("llama")
    student = convert(teacher, keep_heads={1: [0, 3]})
    trace = layer_traces(teacher, two_documents(), [1])[1]
    seen, mixer = views(teacher, [1])[1], mixers_of(student)[1]
    resets = torch.zeros(2, 30, dtype=torch.bool)
    resets[:, 12] = True
    more = {"resets_BT": resets, "position_embeddings": trace.position_embeddings}
    q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
    theirs = attention_matrix(q, k, scaling=seen.scaling, document_BT=resets.cumsum(1))
    close(mixer.mixing_matrix(trace.attention_input, **more)[:, [0, 3]], theirs[:, [0, 3]])
    outputs, expected = (
        heads.unflatten(-1, (4, -1))
        for heads in (mixer.head_outputs(trace.attention_input, **more), trace.head_outputs)
    )
    close(outputs[:, :, [0, 3]], expected[:, :, [0, 3]])
    by_role = roles(student)
    kept = {role for name, role in by_role.items() if ".kept." in name}
    mixed = {role for name, role in by_role.items() if ".mixer." in name}
    assert (kept, mixed) == ({"attention"}, {"mixer"})


def test_beside_kept_heads_a_mixer_answers_for_both_or_not_at_all(student):
    beside, alone = (mixers_of(student)[index] for index in (0, 1))
    window = mixers_of(convert(tiny("llama"), mixer="sliding_window"))[0]
    assert (beside.kept_heads, alone.kept_heads, window.kept_heads) == ([3], (), ())
    assert [is_mixer(slot) for slot in (beside, alone, window)] == [True, True, False]
    assert bare(beside) is beside.mixer
    assert bare(alone) is alone
    with pytest.raises(AssertionError, match="SlidingWindowMixer has no mixer"):
        bare(window)
    faces = {name for face in (Slot, Mixer) for name in (*vars(face), *face.__annotations__) if name[0] != "_"}
    assert {"of_attention", "kept_heads", "matrix_factors", "in_proj", "state_bytes"} <= faces
    faces -= set() if beside.without_factors is None else {"matrix_factors", "matrix_parameters"}
    assert all(hasattr(slot, name) for slot in (beside, alone) for name in faces)
    assert not any(hasattr(beside, name) for name in ("conv1d", "_terms", "gated", "in_rows"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_matrix_has_zeros_at_padding(side):
    mixer = mixers_of(disturbed(convert(tiny("qwen2"), keep_heads={1: [0, 3]})))[1]
    torch.manual_seed(9)
    u, valid = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool)
    valid[1, 14:] = False
    valid = valid.flip(1) if side == "left" else valid
    matrix = mixer.mixing_matrix(u, valid_BT=valid)
    said = (valid[:, :, None] & valid[:, None]).tril()
    assert torch.equal(matrix.ne(0), said[:, None].expand_as(matrix))


@pytest.mark.parametrize("target", ["mixer", "block", "heads"])
def test_stage_2_trains_the_mixer_beside_heads_that_stay(student, target):
    teacher, settings = tiny("llama"), HiddenStage(tokens=1000, target=target)
    objective = HiddenObjective(teacher, student.requires_grad_(True), settings)
    objective.begin(0.0)
    sum(part.loss_sum() for part in objective.parts(two_documents())).backward()
    for mixer in mixers_of(student).values():
        read = [parameter for name, parameter in mixer.named_parameters() if "kept." not in name]
        without = [one for one in read if one.grad is None or not one.grad.any()]
        assert all(one is mixer.out_proj.weight for one in without)
        assert len(without) == (target == "heads")


def test_gradients_of_the_last_stage_reach_heads_and_mixer_from_the_start():
    student = convert(tiny("llama"), keep_heads=HEADS).requires_grad_(True)
    objective = LogitObjective(tiny("llama"), student, LogitsStage(tokens=1000))
    sum(part.loss_sum() for part in objective.parts(two_documents())).backward()
    for index in HEADS:
        mixer = mixers_of(student)[index]
        assert all(bool(parameter.grad.any()) for parameter in mixer.kept.parameters())
        assert all(bool(columns.any()) for columns in mixer.out_proj.weight.grad.unflatten(1, (4, -1)).unbind(1))


def test_projections_are_frozen_through_to_the_mixer(student):
    mixer = mixers_of(student)[0]
    mixer.projections_frozen = True
    assert mixer.mixer.projections_frozen
    assert mixer.projections_frozen


def test_gradient_checkpointing_changes_no_gradient(hybrid):
    ids, gradients = prompt(2, 30), []
    hybrid.train().requires_grad_(True)
    for on in (False, True):
        hybrid.gradient_checkpointing_enable() if on else None
        hybrid.zero_grad()
        hybrid(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in hybrid.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_adapters_reach_kept_heads_and_merge(hybrid):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ids = prompt(2, 20)
    targets = default_lora_targets(hybrid)
    model = peft.get_peft_model(hybrid, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model(ids, labels=ids).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert sum(".kept." in name for name in adapters) == 2 * 4 * 2
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.values())
    adapted = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-4)


def test_the_footprint_counts_kept_heads(student):
    found, counted = footprint_of(student.config), report(tiny("llama"), student)
    for tokens in (7, 1000):
        assert found.student_bytes(tokens) == counted.cache_bytes(tokens)[0]
    assert found.student_operations(10) - found.student_operations(0) == 10 * 4 * 8 * 3  # three heads of 8 channels


def test_heads_stay_the_teachers_where_mixers_start_at_random():
    teacher = tiny("llama")
    student = convert(teacher, keep_heads={1: range(4)}, keep_attention=[0, 2], seed_from_attention=False)
    close(student(prompt(1, 20)).logits, teacher(prompt(1, 20)).logits)
    scratch = convert(teacher, keep_heads={1: [0]}, from_scratch=True)
    ours = attention_of(layers_of(scratch)[1]).kept.q_proj.weight
    assert not torch.equal(ours, view(attention_of(layers_of(teacher)[1]), None).q.weight[:8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_heads": {3: [0]}}, "names layer 3; the teacher has 3, numbered 0 to 2"),
        ({"keep_heads": {1: [4]}}, r"\[4\] in layer 1; give at least one of the heads 0 to 3"),
        ({"keep_heads": {1: []}}, r"\[\] in layer 1"),
        ({"keep_heads": {1: [2, 2]}}, "none of them twice"),
        ({"keep_heads": {1: [2]}, "keep_attention": [1]}, "names layer 1, which keeps attention"),
        ({"keep_heads": {1: [2]}, "mixer": "sliding_window"}, "not for sliding_window, which keeps all heads"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        plan(tiny("llama").config, **settings)


def test_the_layout_is_plain_data():
    made = plan(tiny("qwen2").config, keep_heads={2: [1, 0]})
    assert json.loads(json.dumps(made.distill)) == made.distill
    assert made.distill["heads"]["2"]["heads"] == [0, 1]
    assert made.distill["heads"]["2"]["biased"] == ["q", "k", "v"]
    assert "heads" not in plan(tiny("qwen2").config).distill
