"""One thing asked of a model, as ids of tokens and as text; what stands between the two is the tokenizer.

    prompt  … k v … k' v' … k     answer  v
                ↑ source  └ distance ┘

Whatever the task, a model is given the prompt and asked for the answer: to write it, or to prefer it to a few others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distill.errors import UserError

CHOICES = 4
"""The answer and the others, where the task does not itself say how many there are."""


@dataclass(frozen=True)
class Example:
    """What a model reads and what it should go on with, in ids.

    Attributes:
        prompt: what is read.
        choices: the right answer and others like it.
        label: which of the choices is right.
        distance: tokens from where the answer, or the first thing it depends on, begins in the prompt to its end.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    label: int
    distance: int

    @property
    def answer(self) -> tuple[int, ...]:
        return self.choices[self.label]


@dataclass(frozen=True)
class Question:
    """The same as text. A choice follows the prompt after one space.

    Attributes:
        source: the place in the prompt, in characters, where the answer or the first thing it depends on begins.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int
    source: int

    @property
    def answer(self) -> str:
        return self.choices[self.label]


def encoded(question: Question, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A question in a tokenizer's ids, cut between prompt and choice as lm-evaluation-harness does.

    Raises:
        UserError: the tokenizer writes two choices alike, or one as nothing, so that they cannot be told apart.
    """
    prompt = _ids(tokenizer, question.prompt)
    choices = tuple(tuple(_ids(tokenizer, f"{question.prompt} {choice}")[len(prompt) :]) for choice in question.choices)
    if not all(choices) or len(set(choices)) < len(choices):
        raise UserError(
            f"the tokenizer cannot tell the answers {', '.join(map(repr, question.choices))} apart: it lacks their "
            "characters; take the token ids of the task (--surface ids) or another task"
        )
    before = len(_ids(tokenizer, question.prompt[: question.source].rstrip()))
    return Example(tuple(prompt), choices, question.label, len(prompt) - before)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def require_room(task: str, items: int, length: int, needed: int) -> None:
    """Raises UserError where a prompt of ``length`` tokens cannot hold what is asked of it; 0 is as long as needed."""
    if length and needed > length:
        raise UserError(
            f"{task}: {items} items need {needed} tokens and the length is {length}; give a greater length, or 0 for "
            "prompts just as long as their items"
        )


def require_items(task: str, items: int, least: int, most: int | None) -> None:
    """Raises UserError where the task has no prompt of so many items."""
    if items < least or (most is not None and items > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise UserError(f"{task}: {items} items were asked for; it has {allowed}")


def shuffled_in(place: int, answer: Sequence[int] | str, others: Sequence) -> tuple:
    """The choices with the answer at ``place``."""
    return (*others[:place], answer, *others[place:])
