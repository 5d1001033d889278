"""The stability table's task and figures, against forward passes by hand; and the program on two tiny models."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.data import Document
from distill.evaluation import evaluate
from scripts import stability_table
from scripts.docstring_pairs import CHAT_TEMPLATE, Pair, encoded, pairs_of, shots
from tests.conftest import SHAPE

SOURCE = '''
def second(a, *, b=1):
    """What it does.

    More of it.
    """

def silent(): pass

class Thing:
    def inner(self) -> int:
        """Inside."""

def long():
    """%s"""
''' % ("x" * 101)


def test_pairs_are_described_functions_in_order():
    found = pairs_of(Document("a.py", SOURCE))
    assert found == [
        Pair('def second(a, *, b=1):\n    """', 'What it does."""\n'),
        Pair('def inner(self):\n    """', 'Inside."""\n'),
    ]
    assert pairs_of(Document("b.py", "def broken(:")) == []
    assert shots([found, found[:1], [], 2 * found], 1) == [found, found, found]
    assert shots([5 * found[:1]], 2) == [3 * found[:1]]


@pytest.fixture(scope="module")
def tokenizer(stdlib_teacher):
    return AutoTokenizer.from_pretrained(stdlib_teacher)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer), "initializer_range": 0.3})).eval()


def numbered(file: str) -> list[Pair]:
    return [Pair(f'def {file}{n}(x):\n    """', f'{file.upper()} of x to the {n}."""\n') for n in range(6)]


@pytest.fixture
def task(tokenizer):
    files = [numbered("power"), numbered("log")]
    return stability_table.Task(tokenizer, files[0] + files[1][:3], shots(files, 5))


def loss_by_hand(model, tokenizer, read: str, answer: str) -> tuple[float, int]:
    before = tokenizer(read)["input_ids"]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return -sum(float(logs[len(before) + i - 1, token]) for i, token in enumerate(after)), len(after)


def test_the_prompt_is_the_chat_as_it_is_learnt(tokenizer):
    pair = numbered("power")[0]
    prompt, answer = encoded([], pair, tokenizer)
    rendered = tokenizer.apply_chat_template(
        pair.chat()["messages"], chat_template=CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered["input_ids"] == [*prompt, *answer]
    assert rendered["assistant_masks"] == [0] * len(prompt) + [1] * len(answer)


def test_losses_are_of_the_answers_alone(task, model, tokenizer):
    found = [loss_by_hand(model, tokenizer, pair.asked, pair.answered) for pair in task.pairs]
    metrics = evaluate(model, None, task.batches())
    assert metrics.tokens == sum(count for _, count in found)
    assert metrics.loss == pytest.approx(sum(loss for loss, _ in found) / metrics.tokens, rel=1e-5)


def test_gains_are_of_the_nearest_examples(task, model, tokenizer):
    """With k examples: the k just before the question; of another file: those of the next one."""
    files = [numbered("power"), numbered("log")]

    def loss(k: int, moved: int) -> float:
        told = []
        for place, file in enumerate(files):
            others = files[(place + moved) % 2][5 - k : 5]
            read = "".join(pair.asked + pair.answered for pair in others) + file[5].asked
            told.append(loss_by_hand(model, tokenizer, read, file[5].answered))
        return sum(loss for loss, _ in told) / sum(count for _, count in told)

    gain = task.gain(model)
    assert gain.zero_shot == pytest.approx(loss(0, 0), rel=1e-5)
    for k in (1, 3, 5):
        assert gain.same[k] == pytest.approx(1 - loss(k, 0) / loss(0, 0), abs=1e-5)
        assert gain.other[k] == pytest.approx(1 - loss(k, 1) / loss(0, 0), abs=1e-5)


@pytest.mark.slow
def test_the_program_on_two_tiny_models(model, tokenizer, tmp_path, monkeypatch, capsys):
    """Slow: it tunes eight times. The reference is no distance from itself, and everything else is some."""
    pytest.importorskip("trl")
    for name, one in (("teacher", model), ("student", convert(model))):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for number in range(30):
        lines = [f"{pair.asked}{pair.answered}" for pair in numbered(f"f{number}_")]
        (tmp_path / f"m{number}.py").write_text("\n".join(lines))
    monkeypatch.setattr(stability_table, "METHODS", ("lora",))
    stability_table.main(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        str(tmp_path / "*.py"),
        tmp_path / "out",
        seeds=2,
        steps=2,
        precisions="bf16",
    )
    outcomes = json.loads((tmp_path / "out" / "stability_table.json").read_text())["outcomes"]
    tunings = ("none", "fp32 full", "another seed", "bf16 lora")
    assert [(one["seed"], one["model"], one["tuning"]) for one in outcomes] == [
        (seed, name, tuning) for seed in (0, 1) for name in ("teacher", "student") for tuning in tunings
    ]
    for one in outcomes:
        same = one["tuning"] == "fp32 full"
        assert (one["drift"] == 0) == same
        assert (abs(one["metrics"]["kl"]) < 1e-6) == same
    assert "student, medians of 2 seeds" in capsys.readouterr().out
