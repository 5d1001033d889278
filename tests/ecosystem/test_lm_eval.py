"""lm-evaluation-harness on a student: every kind of request, in memory and by path, one at a time and padded."""

from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the dev extra brings it)")

import lm_eval
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

pytestmark = pytest.mark.slow  # importing the harness takes longer than all tests

QUESTIONS = [
    {"start": "Once upon a time, there was a little", "choices": [" girl", " boy", " car"], "label": 0},
    {"start": "Tom was sad", "choices": [".", " because his toy was lost.", " the"], "label": 1},
    {"start": "One day, Lily and her mom went to the park to", "choices": [" play", " rain", " zoo of it"], "label": 0},
    {"start": "The end", "choices": [".", "!"], "label": 0},
    {"start": "They saw a big", "choices": [" dog", " tree"], "label": 1},
]


def questions(**_metadata: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(QUESTIONS)}


def task(kind: str, metric: str, **settings: Any) -> dict[str, Any]:
    return {
        "task": kind,
        "custom_dataset": questions,
        "output_type": kind,
        "test_split": "test",
        "target_delimiter": "",
        "metric_list": [{"metric": metric}],
        **settings,
    }


TASKS = [
    task("multiple_choice", "acc", doc_to_text="{{start}}", doc_to_choice="choices", doc_to_target="label"),
    task("loglikelihood_rolling", "word_perplexity", doc_to_text="", doc_to_target="{{start}}"),
    task(
        "generate_until",
        "exact_match",
        doc_to_text="{{start}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 12, "do_sample": False},
    ),
]


def answers(model: HFLM) -> dict[str, list[Any]]:
    """What the model said to each question of each task: numbers, or the text it wrote."""
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=TASKS,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }


def numbers(found: dict[str, list[Any]]) -> torch.Tensor:
    choices = [request[0][0] for question in found["multiple_choice"] for request in question]
    rolling = [question[0][0] for question in found["loglikelihood_rolling"]]
    return torch.tensor(choices + [value[0] if isinstance(value, tuple) else value for value in rolling])


def test_the_harness_gives_the_same_in_memory_by_path_and_in_padded_batches(student, tokenizer, folder):
    settings = {"tokenizer": tokenizer, "max_length": 128, "device": "cpu", "dtype": "float32"}
    alone = answers(HFLM(pretrained=student, batch_size=1, **settings))
    padded = answers(HFLM(pretrained=student, batch_size=4, **settings))
    by_path = answers(HFLM(pretrained=str(folder), batch_size=4, **settings))
    for other in (padded, by_path):
        assert other["generate_until"] == alone["generate_until"]
        torch.testing.assert_close(numbers(other), numbers(alone), rtol=1e-5, atol=1e-4)


def test_what_the_harness_calls_a_likelihood_is_the_students_own(student, tokenizer):
    found = answers(HFLM(pretrained=student, tokenizer=tokenizer, batch_size=4, max_length=128, device="cpu"))
    for question, requests in zip(QUESTIONS, found["multiple_choice"], strict=True):
        for choice, request in zip(question["choices"], requests, strict=True):
            start, whole = (tokenizer(question["start"] + rest)["input_ids"] for rest in ("", choice))
            ids = torch.tensor([whole])
            with torch.no_grad():
                log_probs = student(ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
            own = log_probs.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum()
            assert request[0][0] == pytest.approx(own.item(), rel=1e-4)
