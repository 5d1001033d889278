"""lm-evaluation-harness on the shipped task files, against this project's own scores of the same questions."""

import runpy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.recall import TASKS, examine, text_examples
from tests.conftest import CHECKOUT

FOLDER = CHECKOUT / "eval" / "harness" / "tasks"
DRAWN = {"items": 2, "length": 200, "samples": 6, "seed": 3}


def test_what_is_written_must_be_the_answer_and_end_there():
    written = runpy.run_path(str(FOLDER / "recall_questions.py"))["written"]
    right = [" 482", "482.", "482, and", " 482\n483"]
    wrong = ["", "48", "4823", "is 482", "482nd"]
    assert [written({"answer": "482"}, [text])["written"] for text in right + wrong] == [1.0] * 4 + [0.0] * 5


@pytest.mark.slow  # importing the harness takes half a minute on a busy machine
def test_the_harness_finds_what_examine_finds(stdlib_teacher, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = (kind.from_pretrained(stdlib_teacher) for kind in (AutoModelForCausalLM, AutoTokenizer))
    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata=DRAWN | {"tokenizer": str(stdlib_teacher)}
    )
    recall = {f"recall_{task}{end}" for task in TASKS for end in ("", "_written")}
    assert set(manager.all_subtasks) == recall | {"text_perplexity"}
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512, device="cpu"),
        tasks=["recall", "recall_parity_written"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    for task in TASKS:
        with torch.no_grad():
            ours = examine(model, text_examples(task, **DRAWN, tokenizer=tokenizer))
        theirs = sorted(found["samples"][f"recall_{task}"], key=lambda sample: sample["doc_id"])
        assert len(theirs) == DRAWN["samples"]
        assert found["results"][f"recall_{task}"]["acc,none"] == sum(one.rank == 1 for one in ours) / len(ours)
        logs = [float(sample["filtered_resps"][sample["doc"]["label"]][0]) for sample in theirs]
        assert logs == pytest.approx([one.log_probability for one in ours], rel=1e-4)
    assert 0 <= found["results"]["recall_parity_written"]["written,none"] <= 1
