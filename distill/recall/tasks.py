"""The tasks by name, and examples of them: the same ones for the same seed, whatever else is asked beside them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.recall import questions, rows
from distill.recall.example import Example, Question, encoded


@dataclass(frozen=True)
class Task:
    """One task on both surfaces.

    Attributes:
        row: drawn from (generator, items, length, vocabulary).
        question: drawn from (generator, items, length, measure).
        says: what a model must do, in a few words.
    """

    row: Callable[[rows.Draw, int, int, int], rows.Row]
    question: Callable[[questions.Draw, int, int, questions.Measure], Question]
    says: str


TASKS = {
    "associative": Task(rows.associative, questions.associative, "values of keys, each key asked once"),
    "phonebook": Task(rows.phonebook, questions.phonebook, "the number of a name"),
    "passkey": Task(rows.passkey, questions.passkey, "a number hidden in a text"),
    "copying": Task(rows.copying, questions.copying, "a whole stretch, word for word"),
    "parity": Task(rows.parity, questions.parity, "whether a count is odd"),
    "permutation": Task(rows.permutation, questions.permutation, "where things are after many moves"),
}


def task_named(name: str) -> Task:
    """Raises UserError where there is no such task."""
    if name not in TASKS:
        raise UserError(f"there is no recall task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def row_examples(task: str, items: int, length: int, *, samples: int, seed: int, vocabulary: int) -> list[Example]:
    """Examples in the task's own ids.

    Args:
        task: a name in ``TASKS``.
        items: pairs, entries, keys, or steps, as the task has it.
        length: of a row (``associative``, whose queries stand anywhere in it) or of the prompt; 0 is as long as needed.
        samples: how many.
        seed: with items, length and its number it makes an example.
        vocabulary: ids 0 … vocabulary − 1.

    Raises:
        UserError: there is no such task, or no example of it is so short, so small or so large.
    """
    row = task_named(task).row
    generators = _generators(items, length, samples, seed)
    return [row(rng, items, length, vocabulary).example(rng) for rng in generators]


def text_questions(
    task: str, items: int, length: int, *, samples: int, seed: int, measure: questions.Measure = questions.words
) -> list[Question]:
    """The same as text, up to ``length`` by ``measure``; see ``row_examples``."""
    question = task_named(task).question
    return [question(rng, items, length, measure) for rng in _generators(items, length, samples, seed)]


def text_examples(
    task: str, items: int, length: int, *, samples: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Questions of up to about ``length`` tokens, in a tokenizer's ids; see ``row_examples`` and ``encoded``."""
    found = text_questions(task, items, length, samples=samples, seed=seed, measure=tokens_by(tokenizer))
    return [encoded(question, tokenizer) for question in found]


def tokens_by(tokenizer: PreTrainedTokenizerBase) -> questions.Measure:
    """A measure of texts in a tokenizer's tokens; the same pieces come again and again, and are counted once."""
    known: dict[str, int] = {}

    def measure(text: str) -> int:
        if text not in known:
            known[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return known[text]

    return measure


def _generators(items: int, length: int, samples: int, seed: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, items, length, number]) for number in range(samples)]
