"""A recipe's harness tasks after stages: what is refused before anything runs, who is asked, what is shown."""

import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.errors import UserError
from distill.recipe import Recipe
from eval import measured, tasks
from eval.findings import read_findings
from eval.gathered import section_of
from tests.conftest import SHAPE

TASK = {"kind": "harness", "task": "recall_copying", "items": 2, "samples": 3, "after": ["hidden", "end"]}


def recipe(folder, teacher, *asked) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "run_dir": str(folder),
            "teacher": {"path": str(teacher)},
            "data": {"source": "s"},
            "stages": {"hidden": {"tokens": 1000}, "logits": {"tokens": 1000}},
            "evaluation": {"tasks": list(asked)},
        }
    )


def run_of(folder, teacher, *asked) -> SimpleNamespace:
    """What is read of a run."""
    return SimpleNamespace(
        recipe=recipe(folder, teacher, *asked),
        stages=["convert", "hidden", "logits"],
        facts=SimpleNamespace(config=LlamaConfig(**SHAPE | {"max_position_embeddings": 256})),
        device=torch.device("cpu"),
        folder=lambda stage: folder / stage,
        evaluation_subject=lambda name: f"weights of {name}",
        forget_teacher=lambda: None,
    )


def test_without_the_harness_it_is_told_which_extra_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.harness.installed.importlib.util.find_spec", lambda _name: None)
    run = run_of(tmp_path, "t", TASK)
    with pytest.raises(UserError, match=r"task: recall_copying}: lm-evaluation-harness is not .*distill-ssm\[eval\]"):
        tasks.check_tasks(run)
    tasks.check_tasks(run, done=["hidden", "logits"])  # nothing is left to be asked


def test_a_prompt_longer_than_the_positions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "require_harness", lambda: None)
    with pytest.raises(UserError, match="length: 300, but the teacher has only 256 positions"):
        tasks.check_tasks(run_of(tmp_path, "t", TASK | {"length": 300}))


def test_results_of_two_tasks_of_one_name_in_parts_are_kept_apart(tmp_path, monkeypatch):
    """A group's parts stand behind its name, so that another of its tasks with other items is not overwritten."""
    group = TASK | {"task": "recall", "after": "end"}
    run = run_of(tmp_path, "t", TASK, group)

    def asking(run, task):
        found = {"recall_copying": 1, "recall_parity": 2} if task.task == "recall" else {"": 3}
        return measured.Asking(lambda run, name: name, lambda model: found)

    monkeypatch.setitem(tasks.KINDS, "harness", asking)
    for stage in ("hidden", "logits", "logits"):
        tasks.ask_after(run, stage)
    found = read_findings(tmp_path / "evaluations" / "harness.json").results
    assert found == {
        "recall_copying": {"teacher": 3, "hidden": 3, "logits": 3},
        "recall: recall_copying": {"teacher": 1, "logits": 1},
        "recall: recall_parity": {"teacher": 2, "logits": 2},
    }
    run.recipe = recipe(tmp_path, "t", group | {"limit": 1})
    tasks.ask_after(run, "logits")
    assert list(read_findings(tmp_path / "evaluations" / "harness.json").results) == list(found)[1:]


@pytest.mark.slow  # importing the harness takes half a minute on a busy machine
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the dev extra brings it)")
def test_teacher_and_student_are_asked_as_eval_harness_asks_them(stdlib_teacher, tmp_path, monkeypatch):
    from eval.harness.__main__ import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(stdlib_teacher)
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "initializer_range": 0.2}
    teacher = LlamaForCausalLM(LlamaConfig(**shape | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}))
    folders = {name: tmp_path / name for name in ("teacher", "hidden")}
    for model, folder in zip((teacher, convert(teacher, keep_attention=[1])), folders.values(), strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    unknown = run_of(tmp_path, folders["teacher"], TASK | {"task": "recall_copyin"})
    with pytest.raises(UserError, match=r"evaluation\.tasks: task recall_copyin: there is no .*mean recall_copying"):
        tasks.check_tasks(unknown)
    small = run_of(tmp_path, folders["teacher"], TASK | {"task": "recall_written"})
    small.facts.config.max_position_embeddings = 64
    with pytest.raises(UserError, match=r"recall_.*_written has a model write 64 tokens, but the teacher has only 64"):
        tasks.check_tasks(small)
    run = run_of(tmp_path, folders["teacher"], TASK, TASK | {"task": "recall_parity", "limit": 2})
    random.seed(5)
    torch.manual_seed(5)
    tasks.check_tasks(run)
    assert not (tmp_path / "evaluations").exists()
    tasks.ask_after(run, "hidden")
    drawn = random.random(), torch.rand(()).item()
    random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), torch.rand(()).item()), "what is measured moves no generator"
    found = read_findings(tmp_path / "evaluations" / "harness.json")
    assert list(found.models) == ["teacher", "hidden"]
    assert [found.results[task]["hidden"]["samples"] for task in found.results] == [3, 2]
    main([str(folder) for folder in folders.values()], ["recall_copying"], items=2, samples=3, output=tmp_path)
    told = read_findings(tmp_path / "harness.json").results["recall_copying"]
    assert told == found.results["recall_copying"]
    copying, parity = section_of(found).scores
    assert (copying.task, copying.of, set(copying.by_model)) == (
        "harness: recall_copying",
        "teacher",
        {"teacher", "hidden"},
    )
    assert (copying.chance, parity.chance) == (told["teacher"]["chance"], 0.5)
    assert 0 < copying.chance < 0.5
