"""Fine-tuning in every method and precision: losses agree, adapters load with plain PEFT, killed runs go on exactly."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import convert, handover, load_student
from distill.errors import UserError
from distill.finetuning.job import Job, at_work_on_tuning
from distill.finetuning.recipe import FinetuneRecipe
from distill.mixers import MIXERS
from distill.student import load_model
from distill.training.tracking import MetricsLog
from tests.stages.program import require_refused, run

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")
tuning: Any = importlib.import_module("distill.finetuning.trainer")

pytestmark = pytest.mark.slow  # importing TRL takes longer than all of these together

METHODS = ("full", "lora", "rslora", "dora")
HALF = 0.05
"""By how much a loss in bfloat16 or float16 may differ from the one in float32, relatively, at each of six steps."""


def tuned(recipe: Path, *overrides: str) -> Job:
    with at_work_on_tuning(recipe, overrides) as job:
        tuning.tune(job)
        assert job.is_done()
    return job


def metrics(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.work_folder / "metrics.jsonl").read_text().splitlines()]


def losses(job: Job) -> list[float]:
    return [line["loss"] for line in metrics(job)]


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_precisions_agree(recipe, method):
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        settings = f"method={method}", f"dtype={dtype}", "training.lr=5e-4", f"run_dir={recipe.parent / dtype}"
        job = tuned(recipe, *settings)
        found[dtype] = losses(job)
        assert len(found[dtype]) == 6
        assert found[dtype][-1] < found[dtype][0]
        weights = load_file(next(job.folder.glob("*.safetensors")))
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for dtype in ("bfloat16", "float16"):
        assert found[dtype] == pytest.approx(found["float32"], rel=HALF)
    # Before the first update only the forward's own precision can tell them apart.
    assert len({found[dtype][0] for dtype in found}) == 3, "a precision was left off without a word"


def test_float16_scales_its_loss(recipe, monkeypatch):
    """A scale that overflows is halved, and those steps change nothing, instead of writing NaN."""
    monkeypatch.setattr(tuning, "FIRST_SCALE", 2.0**40)
    job = tuned(recipe, "dtype=float16")
    found = losses(job)
    assert found[0] == pytest.approx(found[-1], rel=0.2), "nothing was learnt yet"
    assert all(tensor.isfinite().all() for tensor in load_file(job.folder / "adapter_model.safetensors").values())


def test_full_tuning_writes_a_student(recipe, student):
    job = tuned(recipe, "method=full")
    before, after = load_student(student), load_student(job.folder)
    moved = [name for name, parameter in after.named_parameters() if not torch.equal(parameter, _at(before, name))]
    assert moved == [name for name, _ in before.named_parameters()]
    # The trainer's wishes (padding, the cache off) do not stay in the student.
    ours, theirs = before.config.to_dict(), after.config.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"_name_or_path"}
    assert handover.verify(job.folder).parent == job.parent


def _at(model, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name]


@pytest.mark.parametrize("method", METHODS[1:])
def test_adapters_load_with_plain_peft_and_merge(recipe, student, method):
    job = tuned(recipe, f"method={method}", "adapter.rank=4")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), job.folder).eval()
    ids = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    plain = load_student(student).eval()
    adapted = loaded(ids, use_cache=False).logits
    assert not torch.allclose(plain(ids, use_cache=False).logits, adapted, atol=1e-3)

    again = tuned(recipe, f"method={method}", "adapter={rank: 4, merge: true}", f"run_dir={recipe.parent / 'm'}")
    merged, wanted = load_student(again.folder).state_dict(), loaded.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_an_adapter_goes_on_from_another(recipe):
    first = tuned(recipe)
    second = tuned(recipe, f"adapter.start={first.folder}", f"run_dir={recipe.parent / 'on'}")
    assert losses(second)[0] < losses(first)[-1] * 1.05
    assert losses(second)[-1] < losses(first)[0]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("overrides", [("method=full",), ("dtype=float16",)], ids=["full", "lora in float16"])
def test_a_killed_run_goes_on_exactly(recipe, monkeypatch, overrides):
    whole = tuned(recipe, *overrides, f"run_dir={recipe.parent / 'whole'}")

    def die(watch: object, args: object, state: object, control: object, **_rest: object) -> None:
        if state.global_step == 4:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(tuning._Watch, "on_save", die)
        with pytest.raises(KilledError):
            tuned(recipe, *overrides)
    half_written = recipe.parent / "run" / "training" / "finetune" / "checkpoint-5"
    half_written.mkdir()
    with pytest.raises(UserError, match="checkpoint-4 was trained with other settings"):
        tuned(recipe, *overrides, "training.lr=1")
    job = tuned(recipe, *overrides)
    assert metrics(job) == metrics(whole)
    assert handover.read(job.folder).tokens == metrics(job)[-1]["tokens"]
    ours, theirs = (load_file(next(of.folder.glob("*.safetensors"))) for of in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert not list(job.work_folder.glob("checkpoint-*"))


def test_seconds_are_summed_over_restarts(recipe, monkeypatch):
    """Of steps of ten seconds each, the two after the kill are not all."""
    steps = itertools.count(1)
    now = [0.0]

    def later(watch: object, args: object, state: object, control: object, **_rest: object) -> None:
        now[0] += 10
        if next(steps) == 5:
            raise KilledError

    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(tuning._Watch, "on_step_end", later)
    with pytest.raises(KilledError):
        tuned(recipe)
    assert handover.read(tuned(recipe).folder).seconds == 60


def test_several_gpus(recipe, two_gpus):
    """One trains: several would share a step's rows out among copies of the model, which TRL refuses."""
    assert len(losses(tuned(recipe, "training.steps=1"))) == 1


def test_plain_text(recipe, stories_text):
    (recipe.parent / "text.txt").write_text(stories_text.read_text(encoding="utf-8")[:40_000])
    text = f"data={{source: {recipe.parent / 'text.txt'}, format: text, separator: '\\n\\n', max_length: 64}}"
    found = losses(tuned(recipe, text))
    assert found[-1] < found[0]


def test_only_the_assistant_is_scored(recipe):
    """Another question changes what is read, and so the loss; what is scored are as many tokens as the answers have."""
    with at_work_on_tuning(recipe, ["data.packing=false"]) as job:
        made = _trainer(job)
        batch = made.data_collator([made.train_dataset[0]])
    scored = batch["labels"][0] != -100
    answer = job.rows[0]["messages"][1]["content"]
    assert job.tokenizer.decode(batch["input_ids"][0][scored], skip_special_tokens=True).strip() == answer.strip()


def _trainer(job: Job):
    model = tuning.with_adapters(load_model(job.recipe.model), job.recipe)
    return tuning._trainer(job, model, tuning.trained_groups(model, job.recipe), MetricsLog(job.work_folder, (), 0))


# Of `based` alone nothing is made by rows of zeros.
@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"based"}))
def test_dora_on_a_fresh_student_is_refused(recipe, stories_teacher, mixer):
    fresh = recipe.parent / "fresh"
    convert(stories_teacher, mixer=mixer).save_pretrained(fresh)
    AutoTokenizer.from_pretrained(stories_teacher).save_pretrained(fresh)
    with pytest.raises(UserError, match="dora divides by the norm of every row"):
        tuned(recipe, "method=dora", f"model={fresh}")


def test_weights_without_adapters_are_told(recipe, monkeypatch):
    monkeypatch.setattr(tuning, "uncovered_weights", lambda model: ["mlp.experts.down_proj"])
    told = []
    with at_work_on_tuning(recipe, ["training.steps=1"]) as job:
        tuning.tune(job, told.append)
    assert told == ["no adapter is on mlp.experts.down_proj, which are no linear modules; they stay as they are"]


def test_four_bits(recipe, student):
    """Where bitsandbytes is: adapters train in float32 beside weights that stay, and load with plain PEFT."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra qlora)")
    job = tuned(recipe, "method=qlora", "training.lr=5e-4")
    assert losses(job)[-1] < losses(job)[0]
    weights = load_file(job.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert {name.split(".")[-3] for name in weights} >= {"in_proj", "out_proj", "q_proj", "down_proj"}
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), job.folder)
    quantised = tuning.load_base(job.recipe)
    loaded = peft.PeftModel.from_pretrained(quantised, job.folder).eval()
    ids = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = loaded(ids, use_cache=False).logits
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids, use_cache=False).logits, adapted, atol=1e-3)


def test_dead_adapters_end_the_run(recipe, monkeypatch):
    """As where a fused kernel reads the weight: the module is never called."""
    made = tuning.with_adapters

    def passed_by(base, wanted):
        model = made(base, wanted)
        projection = base.model.layers[0].self_attn.out_proj
        projection.forward = lambda x: torch.nn.functional.linear(x, projection.base_layer.weight)
        return model

    monkeypatch.setattr(tuning, "with_adapters", passed_by)
    with pytest.raises(UserError, match=r"2 of \d+ adapter parameters had no gradient in the first step.*out_proj"):
        tuned(recipe)
    assert not (recipe.parent / "run" / "finetune").exists()


def test_weight_decay_leaves_the_dynamics_alone(student):
    recipe = FinetuneRecipe(
        name="r", model=str(student), method="full", data={"source": "s"}, training={"weight_decay": 0.1}
    )
    model = load_student(student)
    decayed = {
        id(parameter)
        for group in tuning.trained_groups(model, recipe)
        if group["weight_decay"]
        for parameter in group["params"]
    }
    ends = {name.rsplit(".", 1)[-1] for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert ends == {"weight"}


def test_the_program(recipe):
    ended = run("stages.finetune", recipe)
    assert ended.code == 0, ended
    assert "in 6 steps" in ended.out
    again = run("stages.finetune", recipe)
    assert (again.code, again.out.strip()) == (0, f"{recipe.parent / 'run' / 'finetune'}: already done")
    require_refused(run("stages.finetune", recipe, "seed=1"), "was made with another recipe than this one")
    require_refused(run("stages.finetune", recipe, "data.source=nothing.jsonl"), "no such file")
