"""The tasks as text: a reader who takes the prompt apart finds the answer, with the repository's own tokenizer too."""

import re

import pytest
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.recall import TASKS, encoded, row_examples, text_examples, text_questions
from scripts.recall_teacher import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(stdlib_teacher):
    return AutoTokenizer.from_pretrained(stdlib_teacher)


def read(task: str, prompt: str) -> str:
    """The answer, by regular expressions."""
    if task == "copying":
        return re.search(r"^Line: (.*)$", prompt, re.M)[1]
    if task == "parity":
        return "on" if len(re.findall(r"is pressed", prompt)) % 2 else "off"
    if task == "permutation":
        cups = dict(re.findall(r"Cup (\d) holds the (\w+)\.", prompt))
        for a, b in re.findall(r"Swap cup (\d) and cup (\d)", prompt):
            cups[a], cups[b] = cups[b], cups[a]
        return cups[prompt.split()[-3]]
    pattern = {
        "associative": r"^(\w+) = (\d+)$",
        "phonebook": r"^(\w+ \w+): ([\d-]+)$",
        "passkey": r"key of the (\w+) door is (\d+)\.",
    }
    known = dict(re.findall(pattern[task], prompt, re.M))
    return known[re.search(r"([A-Z]\w+ \w+|\w+)(?: =|:| door is)$", prompt)[1]]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("items", [1, 4])
def test_the_prompt_holds_the_answer(task, items):
    for length in (0, 120):
        questions = text_questions(task, items, length, samples=30, seed=1)
        assert questions == text_questions(task, items, length, samples=30, seed=1)
        assert len({one.label for one in questions}) > 1
        for one in questions:
            assert read(task, one.prompt) == one.answer
            assert len(set(one.choices)) == len(one.choices)
            assert not one.prompt.endswith(" ")
            if task not in ("parity", "permutation"):
                assert one.prompt[one.source :].startswith(one.answer)


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_the_tokenizers(task, tokenizer):
    for one in text_examples(task, 2, 300, samples=4, seed=0, tokenizer=tokenizer):
        assert 260 < len(one.prompt) <= 302
        assert 0 < one.distance <= len(one.prompt)


def test_a_question_in_ids_reads_as_its_text(tokenizer):
    for task in TASKS:
        (question,) = text_questions(task, 3, 0, samples=1, seed=5)
        example = encoded(question, tokenizer)
        text = tokenizer.decode(example.prompt + example.answer, skip_special_tokens=True)
        assert text == f"{question.prompt} {question.answer}"
        if task != "permutation":
            tail = tokenizer.decode(example.prompt[len(example.prompt) - example.distance :])
            assert question.prompt[question.source :] in tail


def test_a_tokenizer_without_the_words_is_refused():
    with pytest.raises(UserError, match="cannot tell the answers"):
        text_examples("phonebook", 3, 0, samples=1, seed=0, tokenizer=word_tokenizer(64))


def test_both_surfaces_are_as_hard_to_guess():
    for task in TASKS:
        rows = row_examples(task, 3, 0, samples=1, seed=0, vocabulary=512)[0]
        text = text_questions(task, 3, 0, samples=1, seed=0)[0]
        assert len(rows.choices) == len(text.choices) or task == "permutation"
