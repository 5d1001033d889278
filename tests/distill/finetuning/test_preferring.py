"""Preference tuning: its loss by hand, its reference, and that margins rise."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from distill import load_student
from distill.finetuning.job import Job, at_work_on_tuning, open_job
from distill.finetuning.preferences import encoded_pair, load_prefer_recipe
from distill.student import load_model
from distill.training.tracking import MetricsLog

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")
tuning: Any = importlib.import_module("distill.finetuning.trainer")

pytestmark = pytest.mark.slow  # importing TRL takes longer than all of these together


def tuned(recipe: Path, *overrides: str) -> Job:
    with at_work_on_tuning(recipe, overrides, load_prefer_recipe) as job:
        tuning.tune(job)
        assert job.is_done()
    return job


def metrics(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.work_folder / "metrics.jsonl").read_text().splitlines()]


def made(recipe: Path, *overrides: str) -> tuple[Job, Any]:
    job = open_job(load_prefer_recipe(recipe, overrides))
    model = load_model(job.recipe.model)
    if job.recipe.method != "full":
        model = tuning.with_adapters(model, job.recipe)
    return job, tuning._trainer(job, model, tuning.trained_groups(model, job.recipe), MetricsLog(recipe.parent, (), 0))


def log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Of an answer alone in its batch, without padding."""
    logits_TV = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_TV.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()


@torch.no_grad()
def by_hand(policy: Any, reference: Any, job: Job, n: int) -> float:
    losses = []
    for row in job.rows[:n]:
        prompt, *answers = encoded_pair(job.tokenizer, row)
        chosen, rejected = (
            log_likelihood(policy, prompt, answer) - log_likelihood(reference, prompt, answer) for answer in answers
        )
        losses.append(-logsigmoid(job.recipe.beta * (chosen - rejected)))
    return float(torch.stack(losses).mean())


@torch.no_grad()
def of_trainer(trainer: Any, n: int) -> float:
    """Of the first pairs in one batch, whose rows are padded."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(n)])
    assert not bool(batch["attention_mask"].all()), "padding is part of what this is about"
    return float(trainer.compute_loss(trainer.model.train(), batch))


def moved(model: Any) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_the_loss_by_hand_beside_the_start(prefer, student, method):
    job, trainer = made(prefer, f"method={method}")
    assert of_trainer(trainer, 5) == pytest.approx(math.log(2), abs=1e-6)
    moved(trainer.model)
    start = load_student(student)
    expected = by_hand(trainer.model, start, job, 5)
    assert abs(expected - math.log(2)) > 1e-3
    assert of_trainer(trainer, 5) == pytest.approx(expected, abs=1e-5)
    if method == "full":
        held, wanted = trainer.ref_model.state_dict(), start.state_dict()
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)
        assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    else:
        assert trainer.ref_model is None
        assert set(trainer.model.peft_config) == {"default"}


def test_another_reference(prefer, stories_teacher):
    """Such as the teacher, when it is asked for by name."""
    job, trainer = made(prefer, f"reference={stories_teacher}")
    expected = by_hand(trainer.model, AutoModelForCausalLM.from_pretrained(stories_teacher), job, 4)
    assert abs(expected - math.log(2)) > 1e-2
    assert of_trainer(trainer, 4) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_to_go_on_with_is_part_of_the_start(prefer, student):
    first = tuned(prefer)
    job, trainer = made(prefer, f"adapter.start={first.folder}")
    assert of_trainer(trainer, 4) == pytest.approx(math.log(2), abs=1e-6)
    moved(trainer.model)
    start = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), first.folder)
    assert of_trainer(trainer, 4) == pytest.approx(by_hand(trainer.model, start, job, 4), abs=1e-5)


@pytest.mark.parametrize("override", ["method=full", "dtype=float16"])
def test_margins_rise(prefer, student, override):
    """On four pairs, which every step sees all of."""
    pairs = prefer.parent / "pairs.jsonl"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:4]))
    job = tuned(prefer, override, "training.lr=3e-4", "training.micro_batch_size=2", "training.steps=10")
    told = metrics(job)
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(told[0]["margin"]) < 1e-4
    assert told[-1]["loss"] < told[0]["loss"]
    assert told[-1]["margin"] > 0.05
    assert told[-1]["accuracy"] > 0.7
    assert told[-1]["reward_chosen"] - told[-1]["reward_rejected"] == pytest.approx(told[-1]["margin"], abs=1e-4)
    if override == "method=full":
        load_student(job.folder)
    else:
        weights = load_file(job.folder / "adapter_model.safetensors")
        assert not [name for name in weights if ".ref." in name]
        assert not (job.folder / "ref").exists()
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), job.folder)


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("full", "float16")])
def test_the_reference_computes_in_the_same_precision(prefer, method, dtype, dtypes_seen):
    """Else the first loss is that of two roundings."""
    job = tuned(prefer, f"method={method}", f"dtype={dtype}", "training.steps=1")
    assert set(dtypes_seen) == {getattr(torch, dtype)}
    assert metrics(job)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_several_gpus(prefer, two_gpus):
    assert len(metrics(tuned(prefer, "training.steps=1"))) == 1


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_exactly(prefer, monkeypatch):
    whole = tuned(prefer, f"run_dir={prefer.parent / 'whole'}")

    def die(watch: object, args: object, state: Any, control: object, **_rest: object) -> None:
        if state.global_step == 4:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(tuning._Watch, "on_save", die)
        with pytest.raises(KilledError):
            tuned(prefer)
    job = tuned(prefer)
    assert metrics(job) == metrics(whole)
    ours, theirs = (load_file(of.folder / "adapter_model.safetensors") for of in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
