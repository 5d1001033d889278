"""What each stage minimises, beside the same sums written out document by document with eager attention."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from distill import convert
from distill.attention import family_of, view
from distill.capture import layer_traces
from distill.convert_stage import convert_stage
from distill.engines.plain import PlainEngine
from distill.mixers import MIXERS
from distill.objectives import attention_matrix, chunked, mixing_distance
from distill.objectives.topk import top_k_and_tail
from distill.recipe import HiddenStage, LogitsStage, MixingStage
from distill.run import open_run
from distill.student import mixers_of
from distill.training.gradients import Gradients
from stages import mixing
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective, OfflineLogitObjective
from stages.mixing import MixingObjective
from tests.conftest import FAMILIES
from tests.stages.alignment import (
    OBJECTIVES,
    ROWS,
    SETTINGS,
    JointEngine,
    attention_output,
    close,
    documents,
    losses,
    packed_batch,
    random_student,
    random_teacher,
    rest_of_block,
    rotation,
    showing,
)


@pytest.fixture(params=[*FAMILIES, "mistral with a window"])
def family(request) -> str:
    return request.param


@pytest.fixture
def teacher(family) -> PreTrainedModel:
    return random_teacher(family)


@pytest.fixture
def eager(family) -> PreTrainedModel:
    """The same teacher, which shows its attention matrices."""
    return showing(random_teacher(family))


@pytest.fixture(params=[("mamba2", "drop"), ("discrete_mamba2", "keep")], ids="-".join)
def student(request, teacher) -> PreTrainedModel:
    """A hybrid whose every parameter is away from the teacher's; one mixer keeps rotary positions, one does not."""
    mixer, rope = request.param
    return random_student(teacher, mixer=mixer, rope=rope)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return packed_batch()


def test_mixing_is_the_distance_to_the_teachers_own_matrices(student, teacher, eager, batch):
    mixers = mixers_of(student)
    square_RH = {index: torch.zeros(len(ROWS), mixer.n_heads) for index, mixer in mixers.items()}
    for row, ids in documents(batch):
        seen = eager(ids, output_attentions=True, output_hidden_states=True)
        for index, mixer in mixers.items():
            u = eager.model.layers[index].input_layernorm(seen.hidden_states[index])
            turn = rotation(eager, torch.arange(ids.shape[1])[None])
            difference_HTS = mixer.mixing_matrix(u, position_embeddings=turn)[0] - seen.attentions[index][0]
            square_RH[index][row] += difference_HTS.square().sum(dim=(1, 2)).detach()
    expected = {index: square.sqrt().mean(dim=1).sum() for index, square in square_RH.items()}
    objective = OBJECTIVES["mixing"](teacher, student)
    close(losses(objective, batch), expected)
    assert objective.weight(batch) == len(ROWS)


@pytest.mark.parametrize(("form", "expand"), [("squared", 1), ("row_normalised", 1), ("unsquared", 2)])
def test_mixing_takes_the_form_of_the_recipe_and_each_copy_of_a_head(teacher, student, batch, form, expand):
    """One document, so that a row's matrices can be written out as they are."""
    if expand > 1:
        student = random_student(teacher, mixer="discrete_mamba2", rope="keep", expand=expand)
    batch = {name: rows[:1] for name, rows in batch.items()}
    traces = layer_traces(teacher, batch, mixers_of(student))
    expected = {}
    for index, mixer in mixers_of(student).items():
        attention = view(teacher.model.layers[index].self_attn, family_of(teacher.config))
        u = traces[index].attention_input
        with torch.no_grad():
            q, k = attention.queries_and_keys(u, traces[index].position_embeddings)
            theirs = attention_matrix(q, k, scaling=attention.scaling, window=attention.sliding_window)
        ours = mixer.mixing_matrix(u, position_embeddings=rotation(teacher, batch["position_ids"]))
        theirs = theirs.repeat_interleave(expand, dim=1)
        expected[index] = mixing_distance(ours, theirs, form=form, reduction="sum").detach()
    close(losses(MixingObjective(teacher, student, MixingStage(**SETTINGS, form=form)), batch), expected)


@pytest.mark.parametrize("target", ["mixer", "block"])
def test_hidden_is_the_distance_to_what_the_teachers_layer_makes(student, teacher, eager, batch, target):
    mixers = mixers_of(student)
    expected = dict.fromkeys(mixers, torch.zeros(()))
    for _, ids in documents(batch):
        seen = eager(ids, output_attentions=True, output_hidden_states=True)
        for index, mixer in mixers.items():
            theirs, ours, h = eager.model.layers[index], student.model.layers[index], seen.hidden_states[index]
            u = theirs.input_layernorm(h)
            wanted = attention_output(theirs.self_attn, u, seen.attentions[index][0])
            turn = rotation(eager, torch.arange(ids.shape[1])[None])
            if target == "mixer":
                got, _ = mixer(u, position_embeddings=turn)
            else:
                got = rest_of_block(ours, h + mixer(ours.input_layernorm(h), position_embeddings=turn)[0])
                wanted = rest_of_block(theirs, h + wanted)
            expected[index] = expected[index] + (got - wanted).norm(dim=-1).sum()
    objective = HiddenObjective(teacher, student, HiddenStage(**SETTINGS, target=target))
    close(losses(objective, batch), expected)
    assert objective.weight(batch) == sum(map(sum, ROWS))


def divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    if name == "jsd":
        return (divergence("forward_kl", p, (p + q) / 2) + divergence("forward_kl", q, (p + q) / 2)) / 2
    p, q = (q, p) if name == "reverse_kl" else (p, q)
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize(
    ("name", "tau", "w"),
    [
        ("forward_kl", 1.0, 0.0),
        ("forward_kl", 2.0, 0.3),
        ("forward_kl", 1.0, 1.0),
        ("reverse_kl", 1.0, 0.0),
        ("jsd", 3.0, 0.0),
    ],
)
def test_logits_is_the_divergence_at_every_scored_token(student, teacher, batch, name, tau, w):
    expected, scored = torch.zeros((), dtype=torch.float64), 0
    for _, ids in documents(batch):
        theirs, ours = (model(ids).logits[0].double() for model in (teacher, student))
        for t in range(ids.shape[1] - 1):
            p, q = (F.softmax(logits[t] / tau, dim=0) for logits in (theirs, ours))
            cross_entropy = -F.softmax(ours[t], dim=0)[ids[0, t + 1]].log()
            expected = expected + (1 - w) * tau**2 * divergence(name, p, q) + w * cross_entropy
            scored += 1
    settings = LogitsStage(**SETTINGS, divergence=name, temperature=tau, ce_weight=w)
    objective = LogitObjective(teacher, student, settings)
    torch.testing.assert_close(losses(objective, batch), {"logits": expected.float()})
    assert objective.weight(batch) == scored


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_what_stands_at_padding_changes_nothing(student, teacher, batch, stage):
    objective = OBJECTIVES[stage](teacher, student)
    before = losses(objective, batch)
    other = batch | {"input_ids": torch.where(batch["valid"], batch["input_ids"], 96 - batch["input_ids"])}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert losses(objective, other) == before


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_the_step_of_a_part_reaches_its_own_layer_alone(student, teacher, batch, stage):
    teacher.requires_grad_(True)
    within_layer = "." if stage in ("hidden block", "logits and hidden") else ".self_attn."
    for name, loss_sum in OBJECTIVES[stage](teacher, student).parts(batch):
        student.zero_grad()
        loss_sum().backward()
        touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert touched
        if name == "logits":
            assert len(touched) == len(list(student.parameters()))
        else:
            assert all(name + within_layer in parameter for parameter in touched)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def offline(batch: dict[str, Tensor], teacher: PreTrainedModel) -> dict[str, Tensor]:
    """The batch with the teacher's likeliest tokens."""
    logits_BTV = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    names = ("teacher_ids", "teacher_log_probs", "teacher_log_tail")
    return {**batch, **dict(zip(names, top_k_and_tail(logits_BTV, 9), strict=True))}


@pytest.mark.parametrize("is_offline", [False, True], ids=["live", "offline"])
def test_logits_chunk_by_chunk_are_the_logits_of_the_models(student, teacher, batch, is_offline, monkeypatch):
    """Beside the same objective that calls both models, as for a family whose head is not understood."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: 7)
    settings = LogitsStage(**SETTINGS, divergence="jsd", ce_weight=0.3)
    found = []
    for is_understood in (True, False):
        if is_offline:
            objective = OfflineLogitObjective(student, settings)
            objective.head = None if is_understood else (None,)
        else:
            objective = LogitObjective(teacher, student, settings)
            objective.heads = None if is_understood else (None, None)
        (loss,) = losses(objective, offline(batch, teacher)).values()
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad for name, parameter in student.named_parameters()}))
        student.zero_grad()
    (got, gradients), (expected, wanted) = found
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_a_part_computed_again_is_the_same(student, teacher, batch, stage):
    """Engines keep only a part's inputs and compute it again when they go backward."""
    parts = list(OBJECTIVES[stage](teacher, student).parts(batch))
    first = [loss_sum() for _, loss_sum in parts]
    assert [loss_sum() for _, loss_sum in reversed(parts)] == first[::-1]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", OBJECTIVES)
def test_all_parts_in_one_forward_give_the_same_step(student, teacher, batch, stage, precision):
    objective = OBJECTIVES[stage](teacher, student)
    assert objective.layerwise == (not stage.startswith("logits"))
    groups = [{"params": list(student.parameters())}]
    fewer = {name: tensor[1:] for name, tensor in batch.items()}
    found = []
    for engine in (PlainEngine(student, groups), JointEngine(student, groups, objective.layerwise)):
        gradients = Gradients(objective, engine, torch.device("cpu"), precision)
        loss, _ = gradients.backward([batch, fewer], lambda: False)
        found.append((loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
        engine.forget()
    (streamed, expected), (at_once, got) = found
    assert at_once == streamed
    assert got.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        if stage == "logits and hidden":  # parts that share weights, whose gradients are added in another order
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
        else:
            assert torch.equal(got[name], gradient), name


def shaping(mixer: nn.Module) -> dict[str, Tensor]:
    """For each parameter of a mixer, True where it has a say in the mixing matrix: not in values, gate and output."""
    said = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in mixer.named_parameters()}
    for name in said.keys() & {"z_bias", "norm.weight", "out_proj.weight"}:
        said[name][:] = False
    rows = mixer.in_rows()
    for part in rows.keys() & {"x", "v", "z"}:
        said["in_proj.weight"][rows[part]] = False
    values = rows["x" if "x" in rows else "v"]
    convolved = min(rows[part].start for part in rows.keys() & {"x", "q"})  # the first rows that have channels there
    for name in ("conv1d.weight", "conv1d.bias"):
        said[name][values.start - convolved : values.stop - convolved] = False
    return said


def test_mixing_leaves_values_gate_and_output_alone(student, teacher, batch):
    for _, loss_sum in OBJECTIVES["mixing"](teacher, student).parts(batch):
        loss_sum().backward()
    for mixer in mixers_of(student).values():
        for name, says in shaping(mixer).items():
            gradient = mixer.get_parameter(name).grad
            assert (gradient is None and not says.any()) or not gradient[~says].any(), name
            assert gradient is None or gradient[says].any() == says.any(), name


@pytest.mark.parametrize("mixer", sorted(name for name, made in MIXERS.items() if made.without_factors is None))
def test_mixing_changes_not_a_bit_of_what_it_does_not_shape(recipe, mixer):
    """Weight decay on a fused projection would shrink the rows that get no gradient."""
    run = open_run(recipe, [f"student.mixer={mixer}"])
    convert_stage(run)
    mixing.main(run)
    before, after = (load_file(run.folder(stage) / "model.safetensors") for stage in ("convert", "mixing"))
    model = convert(run.teacher, mixer=mixer, keep_attention=run.facts.kept)
    says = {
        f"model.layers.{index}.self_attn.{name}": mask
        for index, mixer in mixers_of(model).items()
        for name, mask in shaping(mixer).items()
    }
    assert says.keys() < before.keys()
    for name, weight in before.items():
        changed = weight != after[name]
        assert torch.equal(changed, changed & says.get(name, torch.tensor(False))), name
        assert changed.any() == (name in says and says[name].any()), name


@pytest.mark.parametrize("stage", OBJECTIVES)
def test_a_teacher_computes_in_its_own_precision(stage, batch):
    """Fp32, the default, is what an offline cache and an evaluation have; the student alone is under autocast."""
    teacher = random_teacher("llama")
    student = random_student(teacher)
    dtypes: dict[PreTrainedModel, set[torch.dtype]] = {teacher: set(), student: set()}
    for model, seen in dtypes.items():
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name != "lm_head":  # through which a loss runs by itself
                linear.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.add(output.dtype))
    engine = PlainEngine(student, [{"params": list(student.parameters())}])
    gradients = Gradients(OBJECTIVES[stage](teacher, student), engine, torch.device("cpu"), torch.bfloat16)
    gradients.backward([batch], lambda: False)
    assert dtypes[teacher] == {torch.float32}
    if stage != "mixing":  # which multiplies with a mixer's weights by itself
        assert torch.bfloat16 in dtypes[student]


def all_attention(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = random_teacher(family)
    return teacher, convert(teacher, keep_attention=range(3))


def test_without_a_mixer_there_is_nothing_to_align(family, batch):
    for stage in ("mixing", "hidden", "hidden heads", "hidden block"):
        assert losses(OBJECTIVES[stage](*all_attention(family)), batch) == {}


def test_a_student_that_is_its_teacher_has_nothing_to_learn(family, batch):
    teacher, student = all_attention(family)
    loss = losses(OBJECTIVES["logits"](teacher, student), batch)["logits"]
    assert loss == 0
    loss.backward()
    assert max(parameter.grad.abs().max() for parameter in student.parameters()) < 1e-6
