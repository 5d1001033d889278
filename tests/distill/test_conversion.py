"""Conversion: exactness, seeding, counts, and that the teacher is left alone."""

import copy
import weakref
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import UserError, convert
from distill.attention import family_of, view
from distill.calibration import calibrate, steady_direction
from distill.choices import Choices, Chosen
from distill.conversion import convert_with_report, empty_model, plan, report
from distill.mixers import MIXERS
from distill.mixers.parts import in_convolution
from distill.objectives import attention_matrix
from distill.recipe import Student
from distill.roles import roles
from distill.student import mixers_of, state_bytes
from tests.conftest import SHAPE, tiny

MIXER_NAMES = sorted(MIXERS)


def tokens(vocabulary: int, *shape: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(3, vocabulary, shape)


def test_with_all_attention_kept_the_student_is_the_teacher_bit_for_bit(family):
    teacher = tiny(family)
    student = convert(teacher, keep_attention=range(3))
    ids = tokens(97, 2, 40)
    assert torch.equal(student(ids).logits, teacher(ids).logits)


def test_on_a_real_checkpoint_too(stories_teacher):
    teacher = AutoModelForCausalLM.from_pretrained(stories_teacher)
    student = convert(stories_teacher, keep_attention=range(5))
    ids = tokens(512, 2, 300)
    assert (student(ids).logits - teacher(ids).logits).abs().max() == 0.0


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_the_teacher_is_untouched_and_shares_no_memory(family, mixer):
    teacher = tiny(family)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = convert(teacher, mixer=mixer, keep_attention=[1])
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert teacher.config.to_dict() == config
    ours = {parameter.data_ptr() for parameter in student.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in teacher.parameters()}


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_from_scratch_nothing_is_the_teachers_but_its_shape(family, mixer):
    teacher = tiny(family)
    student, told = convert_with_report(teacher, mixer=mixer, keep_attention=[1], from_scratch=True, seed=3)
    seeded = convert(teacher, mixer=mixer, keep_attention=[1])
    assert {name: p.shape for name, p in student.named_parameters()} == {
        name: p.shape for name, p in seeded.named_parameters()
    }
    theirs = teacher.state_dict()
    shared = [name for name, p in student.state_dict().items() if name in theirs and torch.equal(p, theirs[name])]
    assert not shared
    assert not told.seeded
    again, other = (convert(teacher, mixer=mixer, keep_attention=[1], from_scratch=True, seed=s) for s in (3, 4))
    assert torch.equal(again.get_input_embeddings().weight, student.get_input_embeddings().weight)
    assert not torch.equal(other.get_input_embeddings().weight, student.get_input_embeddings().weight)


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_everything_but_the_changed_attention_is_the_teachers(family, mixer):
    teacher = tiny(family)
    student = convert(teacher, mixer=mixer, keep_attention=[1])
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if "self_attn" not in name or "layers.1." in name:
            assert torch.equal(tensor, theirs[name]), name


def test_the_same_seed_gives_the_same_student_and_disturbs_no_generator():
    teacher = tiny("llama")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = convert(teacher, seed=4, seed_from_attention=False)
    assert torch.equal(torch.rand(3), expected)
    again = convert(teacher, seed=4, seed_from_attention=False)
    other = convert(teacher, seed=5, seed_from_attention=False)
    weights = [student.get_decoder().layers[0].self_attn.in_proj.weight for student in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_teacher_in_training_is_looked_at_without_its_dropout():
    teacher = tiny("llama")
    expected = convert(teacher).state_dict()
    for layer in teacher.model.layers:
        layer.self_attn.attention_dropout = 0.5
    student = convert(teacher.train())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert not any(module.training for module in student.modules())


def test_projections_are_the_teachers_head_by_head_with_their_biases(family):
    """C·B before activation is q·k up to the head's factor, x is v, for the *unrotated* q and k of one query head."""
    teacher = tiny(family)
    student = convert(teacher, mixer="discrete_mamba2")  # no activation behind the convolution
    for index, mixer in mixers_of(student).items():
        attention = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
        u = torch.randn(2, 7, 32)
        terms, _ = mixer._terms(u, None, None, None)
        torch.testing.assert_close(terms.x_BTHP, attention.values(u))
        q, k = attention.queries_and_keys(u, None)
        scores = attention.scaling * q @ k.mT
        ours = torch.einsum("bthn,bshn->bhts", terms.C_BTHN, terms.B_BTHN)
        factor_H = (ours * scores).sum((0, 2, 3)) / scores.square().sum((0, 2, 3))
        assert (factor_H > 0).all()
        torch.testing.assert_close(ours, factor_H[:, None, None] * scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(mixer.out_proj.weight, attention.o.weight)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])  # the others' have a size of their own
def test_every_head_starts_with_a_matrix_of_attentions_size(family, mixer):
    teacher = tiny(family)
    student = convert(teacher, mixer=mixer, seed=3)
    for index, trace in calibrate(teacher, [0, 1, 2], seed=3):
        attention = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
        q, k = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
        theirs = attention_matrix(q, k, scaling=attention.scaling)
        ours = mixers_of(student)[index].mixing_matrix(trace.attention_input)
        torch.testing.assert_close(ours.square().sum((0, 2, 3)), theirs.square().sum((0, 2, 3)), rtol=1e-3, atol=0)


def test_shared_heads_are_neighbours_not_tiled():
    teacher = tiny("llama")
    mixer = mixers_of(convert(teacher))[0]
    v = teacher.get_decoder().layers[0].self_attn.v_proj.weight.unflatten(0, (2, 8))
    x = mixer.in_proj.weight[mixer.in_rows()["x"]].unflatten(0, (4, 8))
    for head, shared in enumerate([0, 0, 1, 1]):
        assert torch.equal(x[head], v[shared])


def test_a_wider_state_starts_as_the_narrow_one():
    teacher = tiny("llama")
    ids = tokens(97, 2, 30)
    narrow = convert(teacher, mixer="discrete_mamba2")
    wide = convert(teacher, mixer="discrete_mamba2", state_dim=20)
    torch.testing.assert_close(wide(ids).logits, narrow(ids).logits, rtol=1e-4, atol=1e-5)
    wide(ids, labels=ids).loss.backward()
    mixer = mixers_of(wide)[0]
    new_reads = mixer.in_proj.weight.grad[mixer.in_rows()["C"]].unflatten(0, (4, 20))[:, 8:]
    assert (new_reads.abs().amax(dim=-1) > 0).all()  # every new column can be learned


def test_new_columns_of_hedgehog_do_not_all_learn_the_same():
    """Zeros on both sides of a softmax would get one gradient for all."""
    ids = tokens(97, 2, 30)
    wide = convert(tiny("llama"), mixer="hedgehog", state_dim=20)
    wide(ids, labels=ids).loss.backward()
    mixer = mixers_of(wide)[0]
    for name in ("q", "k"):
        new = mixer.in_proj.weight.grad[mixer.in_rows()[name]].unflatten(0, (4, 20))[:, 8:]
        assert (torch.pdist(new[0]) > 1e-3 * new[0].norm()).all()


@pytest.mark.parametrize("d", [3, 8, 12])
def test_based_starts_with_the_nearest_scores_of_its_rank(family, d):
    """Rank d or less of a head's W_qᵀ W_k, biases included, by its singular values; all of it from d = P on."""
    teacher = tiny(family)
    for index, mixer in mixers_of(convert(teacher, mixer="based", state_dim=d)).items():
        torch.testing.assert_close(
            scores(mixer, "qk", d), nearest_scores(teacher, family, index, d), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "named"), [("mamba2", "CB"), ("discrete_mamba2", "CB"), ("gated_deltanet", "qk"), ("gated_deltanet", "kq")]
)
def test_a_narrower_state_starts_with_the_nearest_scores_of_its_rank(kind, named):
    """But for the size of each head, which a mixer has elsewhere; read the wrong way round they are not."""
    teacher = tiny("llama")
    for index, mixer in mixers_of(convert(teacher, mixer=kind, state_dim=3)).items():
        both = scores(mixer, named, 3), nearest_scores(teacher, "llama", index, 3)
        ours, theirs = (torch.nn.functional.normalize(found.flatten(1)) for found in both)
        torch.testing.assert_close((ours * theirs).sum(-1) > 0.999, torch.full((4,), named != "kq"))


def scores(mixer, named: str, d: int) -> torch.Tensor:
    """(H, D + 1, D + 1) of the rows called so; biases, which lie in the convolution, are of an input that is 1."""
    rows, bias = mixer.in_rows(), mixer.conv1d.bias
    biases = [None if bias is None else bias[in_convolution(rows, name)] for name in named]
    q, k = (with_bias(mixer.in_proj.weight[rows[name]], b, d) for name, b in zip(named, biases, strict=True))
    return q.mT @ k


def nearest_scores(teacher, family: str, index: int, d: int) -> torch.Tensor:
    """(H, D + 1, D + 1): attention's W_qᵀ W_k, head by head, cut to rank d."""
    attention = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
    q, k = (with_bias(part.weight, part.bias, attention.head_dim) for part in (attention.q, attention.k))
    left, size, right = torch.linalg.svd(attention.scaling * q.mT @ attention.per_query_head(k, dim=0))
    return left[..., :d] * size[:, None, :d] @ right[:, :d]


def with_bias(weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> torch.Tensor:
    """(heads, width, D + 1)."""
    column = torch.zeros(len(weight)) if bias is None else bias
    return torch.cat([weight, column[:, None]], dim=1).unflatten(0, (-1, width))


def test_the_open_gate_of_mamba2_does_nothing_on_real_input(stories_teacher, stories_text):
    """Seeded, the gate is one positive number a head and token, which the norm behind it takes out again."""
    from transformers import AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(stories_teacher)
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher)
    student = convert(teacher)
    ids = tokenizer(stories_text.read_text()[:2000], return_tensors="pt").input_ids[:, :256]
    inputs = {}
    for index, mixer in mixers_of(student).items():
        mixer.register_forward_pre_hook(
            lambda _m, _a, kwargs, index=index: inputs.update({index: kwargs["hidden_states"]}), with_kwargs=True
        )
    student(ids)
    for index, mixer in mixers_of(student).items():
        z = (inputs[index] @ mixer.in_proj.weight[mixer.in_rows()["z"]].mT).unflatten(-1, (8, 8))
        torch.testing.assert_close(z.std(-1), torch.zeros_like(z[..., 0]), atol=1e-4, rtol=0)
        assert (z > 0).float().mean() > 0.95


def test_the_steady_direction_is_fishers():
    torch.manual_seed(0)
    inputs = torch.randn(4000, 6) * torch.tensor([3.0, 1, 1, 1, 1, 0.1]) + torch.tensor([1.0, 1, 0, 0, 0, 1])
    direction = steady_direction(inputs[None])
    projected = inputs @ direction
    assert projected.mean() == pytest.approx(1, abs=1e-4)
    for _ in range(200):  # no other direction is steadier
        other = inputs @ (direction + 0.05 * torch.randn(6))
        assert projected.std() / projected.mean() <= 1.01 * other.std() / other.mean().abs()


def test_calibration_sees_what_attention_reads(family):
    traces = dict(calibrate(tiny(family), [0, 2], seed=1))
    assert set(traces) == {0, 2}
    assert traces[0].attention_input.shape == (8, 128, 32)


def test_calibration_keeps_one_layer_in_memory(family):
    seen: list[weakref.ref] = []

    for _, trace in calibrate(tiny(family), [0, 1, 2]):
        assert not [earlier for earlier in seen if earlier() is not None]
        assert vars(trace).keys() == {"layer_args", "layer_kwargs", "attention_input"}
        seen.append(weakref.ref(trace.attention_input))
    assert len(seen) == 3


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_the_report_counts_what_is_there(family, mixer):
    teacher = tiny(family)
    student, told = convert_with_report(teacher, mixer=mixer, keep_attention=[1])
    assert told.layers == [mixer, "attention", mixer]
    assert sum(told.parameters_before.values()) == sum(p.numel() for p in teacher.parameters())
    assert sum(told.parameters_after.values()) == sum(p.numel() for p in student.parameters())
    assert told.parameters_after["attention"] * 3 == told.parameters_before["attention"]
    assert set(told.seeded) == {0, 2}
    head = 12 if family == "mistral" else 8
    assert told.teacher_kv_bytes_per_token == 3 * told.kv_bytes_per_token == 3 * 2 * 2 * head * 4

    cache = student(tokens(97, 1, 20), use_cache=True).past_key_values
    mixers_hold = sum(cache.layers[index].nbytes() for index in (0, 2))
    assert told.state_bytes == mixers_hold == state_bytes(student)
    kept = cache.layers[1]
    assert told.cache_bytes(20)[0] == mixers_hold + kept.keys.nbytes + kept.values.nbytes


def test_an_empty_student_counts_like_a_real_one(family):
    teacher = tiny(family)
    real, told = convert_with_report(teacher, keep_attention=[0])
    empty = empty_model(plan(teacher.config, keep_attention=[0]))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert report(empty_model(teacher.config), empty).parameters_after == told.parameters_after
    assert roles(empty) == roles(real)


def test_roles_cover_every_parameter_once(family):
    student = convert(tiny(family), keep_attention=[1])
    by_name = roles(student)
    assert set(by_name) == {name for name, _ in student.named_parameters()}
    assert {by_name[name] for name in by_name if "layers.0.self_attn" in name} == {"mixer"}
    assert {by_name[name] for name in by_name if "layers.1.self_attn" in name} == {"attention"}
    assert {by_name[name] for name in by_name if ".mlp." in name} == {"mlp"}
    assert by_name["model.norm.weight"] == by_name["model.layers.2.input_layernorm.weight"] == "norms"
    assert by_name["model.embed_tokens.weight"] == "embeddings"
    assert by_name.get("lm_head.weight") == (None if student.config.tie_word_embeddings else "head")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            {"mixer": "mamba3"},
            "mixer is 'mamba3'; allowed are based, discrete_mamba2, gated_deltanet, hedgehog, mamba2, sliding_window",
        ),
        ({"keep_attention": [3]}, "numbered 0 to 2"),
        ({"state_dim": 0}, "^state_dim is 0; it must be at least 1$"),
        ({"conv_width": 0}, "^conv_width is 0; it must be at least 1$"),
    ],
)
def test_mistakes_are_refused(wanted, says):
    with pytest.raises(UserError, match=says):
        convert(tiny("llama"), **wanted)


def test_a_recipe_says_all_that_a_conversion_asks():
    given_apart = {"keep_attention", "seed", "seed_from_attention", "from_scratch"}
    assert set(Student().settings()) == {field.name for field in fields(Choices)} - given_apart


def test_a_recipe_and_a_call_choose_the_same_unless_told_otherwise():
    chosen = Choices()
    assert {name: value for name, value in Student().settings().items() if value != getattr(chosen, name)} == {
        "keep_heads": {}
    }


def test_type_checkers_are_told_all_choices():
    assert get_type_hints(Chosen) == get_type_hints(Choices)


def test_a_choice_that_there_is_none_of_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'mixr'"):
        convert(tiny("llama"), mixr="mamba2")
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        plan(tiny("llama").config, layers=[0])


def test_a_conversion_leaves_every_generator_as_it_was(monkeypatch):
    """Weights are drawn on the CPU: a seed for other devices would change their generators for nothing."""
    teacher, seeded = tiny("llama"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    convert(teacher, seed_from_attention=False, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_a_student_is_not_converted_again():
    with pytest.raises(UserError, match="already a student"):
        convert(convert(tiny("llama")))


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        convert(tmp_path / "nowhere")


def test_packed_positions_agree_with_transformers_own_rule():
    from transformers.masking_utils import find_packed_sequence_indices

    from distill.documents import document_starts, positions_from_index

    positions = torch.cat([torch.arange(n) for n in (5, 1, 1, 8)])[None]
    theirs = find_packed_sequence_indices(positions)
    assert torch.equal(document_starts(positions).cumsum(1), theirs)
    assert torch.equal(positions_from_index(theirs), positions)


@pytest.mark.parametrize("mixer", MIXER_NAMES)
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_a_head_of_zeros_gives_a_finite_student(mixer, projection):
    teacher = tiny("llama")
    with torch.no_grad():
        getattr(teacher.get_decoder().layers[1].self_attn, projection).weight[:8].zero_()
    student = convert(teacher, mixer=mixer)
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert torch.isfinite(student(tokens(97, 1, 20)).logits).all()


@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_an_output_bias_is_kept(mixer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)).eval()
    bias = teacher.get_decoder().layers[0].self_attn.o_proj.bias
    torch.nn.init.normal_(bias)
    student = convert(teacher, mixer=mixer)
    assert torch.equal(mixers_of(student)[0].out_proj.bias, bias)


def test_a_teacher_folder_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.v_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj"):
        convert(tmp_path)
