"""Tuning beside a teacher: its loss by hand, accumulation, packing, and that it is a mean of both at any weight."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distill.errors import UserError
from distill.finetuning.job import Job, at_work_on_tuning, open_job
from distill.finetuning.recipe import load_finetune_recipe
from distill.student import load_model
from distill.training.tracking import MetricsLog

pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")
tuning: Any = importlib.import_module("distill.finetuning.trainer")
guidance: Any = importlib.import_module("distill.finetuning.guidance")

pytestmark = pytest.mark.slow  # importing TRL takes longer than all of these together


def guided(teacher: Path, weight: float, **more: Any) -> str:
    return f"teacher={json.dumps({'path': str(teacher), 'weight': weight, **more})}"


def made(recipe: Path, *overrides: str) -> tuple[Job, Any]:
    job = open_job(load_finetune_recipe(recipe, overrides))
    torch.manual_seed(0)
    model = load_model(job.recipe.model)
    if job.recipe.method != "full":
        model = tuning.with_adapters(model, job.recipe)
    return job, tuning._trainer(job, model, tuning.trained_groups(model, job.recipe), MetricsLog(recipe.parent, (), 0))


def batch_of(trainer: Any, n: int) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[row] for row in range(n)])


def loss_of(trainer: Any, batch: dict[str, Any], n: int) -> float:
    return float(trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=n).detach())


def documents(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of every document of a packed row, or of every row without its padding."""
    if "attention_mask" in batch:
        rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
        return [(ids[mask], labels[mask]) for ids, labels, mask in rows]
    starts = batch["position_ids"][0].eq(0).nonzero()[:, 0].tolist()
    spans = zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True)
    return [(batch["input_ids"][0, a:b], batch["labels"][0, a:b]) for a, b in spans]


@torch.no_grad()
def by_hand(student: Any, teacher: Any, batch: dict[str, Any], weight: float, temperature: float) -> float:
    """In fp64, from plain forward passes of both models over one document at a time."""
    student, teacher = student.double(), teacher.double()
    total, n = 0.0, 0
    for ids_T, labels_T in documents(batch):
        z_TV, y_TV = (model(ids_T[None], use_cache=False).logits[0, :-1] for model in (student, teacher))
        scored = labels_T[1:] != -100
        log_q, log_p = ((logits[scored] / temperature).log_softmax(-1) for logits in (z_TV, y_TV))
        divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        entropy = cross_entropy(z_TV[scored], labels_T[1:][scored], reduction="sum")
        total += float((1 - weight) * entropy + weight * divergence)
        n += int(scored.sum())
    return total / n


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_the_loss_by_hand(recipe, student, stories_teacher, packing, weight):
    beside = guided(stories_teacher, weight, temperature=2.0)
    _, trainer = made(recipe, f"data.packing={str(packing).lower()}", beside)
    batch = batch_of(trainer, 3)
    assert len(documents(batch)) > 2
    n = int((batch["labels"][..., 1:] != -100).sum())
    found = loss_of(trainer, batch, n)
    teacher = trainer.guide.teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    expected = by_hand(load_model(student), teacher, batch, weight, 2.0)
    assert found == pytest.approx(expected, rel=2e-5)


def test_without_plain_heads_it_is_the_same(recipe, stories_teacher, monkeypatch):
    overrides = guided(stories_teacher, 0.4, divergence="jsd")
    losses = []
    for _ in range(2):
        _, trainer = made(recipe, overrides)
        losses.append(loss_of(trainer, batch_of(trainer, 3), 7))
        monkeypatch.setattr(guidance, "head_of", lambda model: None)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def tuned(recipe: Path, *overrides: str) -> list[dict]:
    with at_work_on_tuning(recipe, overrides) as job:
        tuning.tune(job)
    return [json.loads(line) for line in (job.work_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_teacher_without_weight_is_no_teacher(recipe, stories_teacher):
    alone = tuned(recipe, "training.lr=5e-4", f"run_dir={recipe.parent / 'alone'}")
    beside = tuned(recipe, "training.lr=5e-4", guided(stories_teacher, 0))
    assert [line["loss"] for line in beside] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
    assert [line["tokens"] for line in beside] == [line["tokens"] for line in alone]
    assert beside[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5)


def test_micro_batches_do_not_change_the_loss(recipe, stories_teacher):
    """Rows have unlike numbers of scored tokens, so a mean of means would be another number."""
    settings = "training.lr=5e-4", "data.packing=false", "training.steps=3", guided(stories_teacher, 0.5)
    whole = tuned(recipe, *settings, f"run_dir={recipe.parent / 'whole'}")
    split = tuned(recipe, *settings, "training.micro_batch_size=1")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in split] == pytest.approx([line[name] for line in whole], rel=1e-4)


def test_precisions_agree(recipe, stories_teacher, dtypes_seen):
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        dtypes_seen.clear()
        settings = f"dtype={dtype}", "training.lr=5e-4", "training.steps=3", f"run_dir={recipe.parent / dtype}"
        found[dtype] = [line["loss"] for line in tuned(recipe, *settings, guided(stories_teacher, 0.5))]
        assert found[dtype][-1] < found[dtype][0]
        assert found[dtype] == pytest.approx(found["float32"], rel=0.05)
        assert set(dtypes_seen) == {getattr(torch, dtype)}


def test_a_teacher_that_does_not_fit(recipe, stories_teacher, tmp_path):
    with pytest.raises(UserError, match=r"teacher\.path: .* is no model's folder"):
        open_job(load_finetune_recipe(recipe, [guided(tmp_path, 0.5)]))
    plain, beside = (open_job(load_finetune_recipe(recipe, more)) for more in ([], [guided(stories_teacher, 0.5)]))
    assert plain.fingerprint != beside.fingerprint
