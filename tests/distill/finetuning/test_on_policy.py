"""On-policy distillation: the loss by hand on what was written, through the student's cache; what is refused."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill import load_student
from distill.errors import UserError
from distill.finetuning.job import Job, at_work_on_tuning, open_job
from distill.finetuning.on_policy import fitting_prompts, load_on_policy_recipe
from distill.student import load_model
from distill.training.tracking import MetricsLog
from tests.distill.finetuning.conftest import TEMPLATE, chat

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")

RECIPE = """\
name: writing
run_dir: {folder}/run
model: {student}
method: lora
device: cpu
teacher: {{path: {teacher}}}
new_tokens: 12
data: {{source: {folder}/prompts.jsonl, max_prompt: 20}}
training: {{steps: 4, batch_size: 4, lr: 1.0e-3, warmup: 0.0, schedule: constant, checkpoint_every: 2}}
"""


@pytest.fixture
def write_prompts(tmp_path) -> Callable[..., None]:
    def write(*rows: object) -> None:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.fixture
def writing(student, stories_teacher, short_stories, write_prompts, tmp_path) -> Path:
    """A recipe of four steps; prompts are of unlike lengths."""
    write_prompts(*({"prompt": text[: 10 + n % 15]} for n, text in enumerate(short_stories)))
    path = tmp_path / "writing.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, student=student, teacher=stories_teacher))
    return path


def refused(recipe: Path, *overrides: str) -> str:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(UserError) as caught, at_work_on_tuning(recipe, overrides, load_on_policy_recipe):
        pass
    assert sorted(recipe.parent.rglob("*")) == before
    return str(caught.value)


def opened(recipe: Path, *overrides: str) -> Job:
    return open_job(load_on_policy_recipe(recipe, overrides))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Hi"}, "prompts.jsonl:2: no key 'prompt'; the keys are text; set data.key"),
        ({"prompt": " "}, "prompts.jsonl:2: the prompt is empty"),
        ({"prompt": 3}, "holds no text and no list of messages"),
        ({"prompt": [{"role": "user"}]}, "message 0 has role; every message needs a role and content"),
        ({"prompt": chat(("assistant", "Hi"))["messages"]}, "all messages are the assistant's"),
        ({"prompt": chat(("user", "Hi"))["messages"]}, "is plain text and"),
    ],
)
def test_rows_that_are_no_prompts(writing, write_prompts, row, said):
    write_prompts({"prompt": "Once"}, row)
    assert said in refused(writing)


def test_other_mistakes(writing, tmp_path):
    assert "teacher.path:" in refused(writing, f"teacher.path={tmp_path}")
    assert "data.max_prompt and new_tokens together: 100020 tokens are more than" in refused(
        writing, "new_tokens=100000"
    )
    assert "all 60 prompts are longer than 1 tokens" in refused(writing, "data.max_prompt=1")


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda text: {}, "a.jsonl:1: the tokenizer does not encode this prompt: 'input_ids'"),
        (lambda text: {"input_ids": []}, "a.jsonl:1: the prompt has no token to go on from; leave the row out"),
    ],
)
def test_plain_text_is_not_blamed_on_a_template(encode, said):
    with pytest.raises(UserError) as caught:
        fitting_prompts([("a.jsonl:1", {"prompt": "Hi"})], encode, 8)
    assert str(caught.value) == said


def test_long_prompts_are_left_out_and_counted(writing, write_prompts):
    write_prompts({"prompt": "Once"}, {"prompt": "Once upon a time " * 10})
    job = opened(writing, "training.batch_size=1")
    assert (len(job.rows), len(job.remarks)) == (1, 1)


def test_too_few_prompts_for_a_step(writing, write_prompts):
    write_prompts(*[{"prompt": "Once"}] * 3, {"prompt": "Once upon a time " * 10})
    said = refused(writing)
    assert "training.batch_size: a step takes 4 prompts, and there are 3 (1 more are longer than" in said
    assert "lower it to 3 at most" in said
    opened(writing, "training.batch_size=3")


def test_of_chats_the_last_answer_is_left_out(writing, write_prompts):
    write_prompts(chat(("user", "Hi"), ("assistant", "Ho"), ("user", "Hey"), ("assistant", "No"), ("assistant", "No")))
    (writing.parent / "template.jinja").write_text(TEMPLATE)
    template = f"data.chat_template={writing.parent / 'template.jinja'}"
    job = opened(writing, "data.key=messages", template, "training.batch_size=1")
    assert job.rows == [{"prompt": chat(("user", "Hi"), ("assistant", "Ho"), ("user", "Hey"))["messages"]}]


# From here on TRL is imported, which takes longer than all of these together.
slow = pytest.mark.slow


def trainer_module() -> Any:
    return importlib.import_module("distill.finetuning.trainer")


def tuned(recipe: Path, *overrides: str) -> Job:
    with at_work_on_tuning(recipe, overrides, load_on_policy_recipe) as job:
        trainer_module().tune(job)
        assert job.is_done()
    return job


def metrics(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.work_folder / "metrics.jsonl").read_text().splitlines()]


def made(recipe: Path, *overrides: str) -> Any:
    tuning = trainer_module()
    job = opened(recipe, *overrides)
    model = tuning.with_adapters(load_model(job.recipe.model), job.recipe)
    return tuning._trainer(job, model, tuning.trained_groups(model, job.recipe), MetricsLog(recipe.parent, (), 0))


@torch.no_grad()
def by_hand(student: Any, teacher: Any, batch: dict[str, Tensor], beta: float) -> float:
    """In fp64, each row alone and without padding, over the written tokens."""
    student, teacher = student.double(), teacher.double()
    total, n = 0.0, 0
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        written = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, written])[None]
        log_q, log_p = (
            model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher)
        )
        p, q = log_p.exp(), log_q.exp()
        if beta in (0, 1):
            total += float((p * (log_p - log_q)).sum() if beta == 0 else (q * (log_q - log_p)).sum())
        else:
            log_m = ((1 - beta) * q + beta * p).log()
            total += float((beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum())
        n += len(written)
    return total / n


@slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_by_hand(writing, student, beta):
    """Of one step, on what that step wrote; no token of a prompt is scored, and padding leaks into nothing."""
    trainer = made(writing, f"beta={beta}")
    base, widths = trainer.model.get_base_model(), []
    handle = base.get_decoder().register_forward_pre_hook(
        lambda _module, _arguments, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    batch = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(4)])
    handle.remove()
    longest, written = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    assert not bool(batch["prompt_mask"].all()), "padding is part of what this is about"
    assert widths == [longest] + [1] * (written - 1), "every step reads one token, and the cache the rest"
    found = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    expected = by_hand(load_student(student), trainer.teacher_model, batch, beta)
    assert found == pytest.approx(expected, rel=5e-5)
    assert not trainer.teacher_model.training


@slow
def test_it_trains_in_every_precision_and_loads(writing, student, dtypes_seen):
    """Both what is written and the loss of it."""
    first = {}
    for dtype in ("float32", "bfloat16", "float16"):
        dtypes_seen.clear()
        job = tuned(writing, f"dtype={dtype}", "training.micro_batch_size=2", f"run_dir={writing.parent / dtype}")
        told = metrics(job)
        assert set(dtypes_seen) == {getattr(torch, dtype)}
        assert len(told) == 4
        assert all(0 < line["written_tokens"] <= 12 for line in told)
        assert told[-1]["tokens"] > told[0]["tokens"] > 4 * 2
        first[dtype] = told[0]["loss"]
        weights = load_file(job.folder / "adapter_model.safetensors")
        assert any(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), job.folder)
    assert max(first.values()) < 1.5 * min(first.values())


@slow
def test_several_gpus(writing, two_gpus):
    assert len(metrics(tuned(writing, "training.steps=1"))) == 1


class KilledError(Exception):
    pass


@slow
def test_an_epoch_has_its_own_order(writing):
    """The same in a process that has seen the epochs before, and in one that begins in it."""
    trainer = made(writing)
    epochs = [rows_of_epoch(trainer.get_train_dataloader(), epoch) for epoch in range(3)]
    assert len({str(rows) for rows in epochs}) == 3
    through = trainer.get_train_dataloader()
    assert [rows_of_epoch(through, epoch) for epoch in range(3)] == epochs
    assert rows_of_epoch(skip_first_batches(trainer.get_train_dataloader(), 5), 1) == epochs[1][5:]


def rows_of_epoch(loader: Any, epoch: int) -> list[list[dict]]:
    """As transformers' Trainer reads them."""
    loader.set_epoch(epoch)
    return list(loader)


@slow
@pytest.mark.parametrize("killed_at", [2, 4], ids=["in the first epoch", "in the second"])
def test_a_killed_run_goes_on_exactly(writing, monkeypatch, killed_at):
    """What is written after a kill is what would have been written without, in that epoch and in those that follow."""
    prompts = writing.parent / "prompts.jsonl"
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:12]))  # three steps an epoch
    settings = "method=full", "training.steps=7"
    whole = tuned(writing, *settings, f"run_dir={writing.parent / 'whole'}")

    def die(watch: object, args: object, state: Any, control: object, **_rest: object) -> None:
        if state.global_step == killed_at:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module()._Watch, "on_save", die)
        with pytest.raises(KilledError):
            tuned(writing, *settings)
    job = tuned(writing, *settings)
    assert metrics(job) == metrics(whole)
    ours, theirs = (load_file(of.folder / "model.safetensors") for of in (job, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
