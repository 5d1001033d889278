"""What a recipe says about measuring: the evaluation, its tasks and when they run, and what is decided by them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from distill.recipe_fields import Count, Integer, NotNegative, Section, Some, Text, Tokens, as_list

After = Literal["convert", "mixing", "hidden", "logits", "end"]
HELD_OUT = ("loss", "kl", "agreement")
"""What is measured on the held-out text in the middle of a stage, every `eval_every` steps."""
SCORES = ("written", "chosen", "log_probability")
"""What is measured by a recall task, each under the name recall.NAME.SCORE (`distill.recall`)."""
FALLING = ("loss", "kl")


class RecallTask(Section):
    """One recall task (docs/recall.md), and when a student is asked it."""

    kind: Literal["recall"] = "recall"
    """What is measured."""
    task: Literal["associative", "phonebook", "passkey", "copying", "parity", "permutation"]
    """What the model must do."""
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] = Field(None, validate_default=True)
    """What it is called in metrics and report; the task's name unless given."""
    items: Annotated[tuple[Count, ...], Some] = (4,)
    """Pairs, entries, words, bits or moves; a list."""
    lengths: Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Some] = (0,)
    """Tokens of the prompts, a list; 0: no filling."""
    surface: Literal["text", "ids"] = "text"
    """text, through the teacher's tokenizer; ids for a model trained on the tasks' own."""
    samples: Count = 64
    """Examples of each number of items at each length."""
    seed: Annotated[Integer, Field(ge=0)] = 0
    """Another seed, other examples."""
    batch_size: Count = 16
    """Prompts a forward pass."""
    every: Count | None = None
    """Steps between two times in every stage, which also measures at the stage's start and end; null for never."""
    after: Annotated[tuple[After, ...], BeforeValidator(as_list), Some] | None = None
    """The stages after which it is asked, beside the teacher, for the report: a list; end is after the last."""

    @field_validator("name", mode="before")
    @classmethod
    def _called_as_its_task(cls, value: object, info: ValidationInfo) -> object:
        return info.data.get("task", "task") if value is None else value

    @model_validator(mode="after")
    def _ever(self) -> "RecallTask":
        if self.every is None and self.after is None:
            raise ValueError("says not when it runs; give every: a number of steps, or after: stages or end, or both")
        return self

    def metrics(self) -> list[str]:
        """The names of its numbers in metrics.jsonl."""
        return [f"recall.{self.name}.{score}" for score in SCORES]


class Evaluation(Section):
    """How a student is measured against its teacher on the held-out text."""

    tokens: Tokens = 64_000
    """The most held-out tokens to score."""
    batch_size: Count = 16
    """Sequences a forward pass."""
    prompts: tuple[Text, ...] = ()
    """Texts that teacher and student both continue in the report."""
    new_tokens: Count = 48
    """Tokens of a continuation."""
    tasks: tuple[RecallTask, ...] = ()
    """What else is measured, and when: {kind: recall, task: .., every: 200} or {.., after: end}."""


class KeepBest(Section):
    """The stage hands on the weights of the step that was best, not of the last."""

    metric: Text
    """loss, kl, agreement, or a task's recall.NAME.written."""
    mode: Literal["min", "max"] = Field(None, validate_default=True)
    """Whether lower or higher is better; min for loss and kl, else max, unless given."""

    @field_validator("mode", mode="before")
    @classmethod
    def _as_the_metric(cls, value: object, info: ValidationInfo) -> object:
        if value is not None:
            return value
        return "min" if info.data.get("metric") in FALLING else "max"


class StopEarly(KeepBest):
    """The stage ends where a metric no longer gets better."""

    patience: Count
    """How many evaluations in a row may bring nothing better."""
    min_delta: NotNegative = 0.0
    """How much better counts as better."""


def measured_in_training(tasks: Sequence[RecallTask], eval_every: int | None, *, offline: bool) -> dict[str, int]:
    """Every metric that a stage measures again and again, with its steps between.

    Args:
        offline: the teacher is not in memory, so that nothing is compared with it.
    """
    found = {name: eval_every for name in (HELD_OUT[:1] if offline else HELD_OUT) if eval_every is not None}
    return found | {name: task.every for task in tasks if task.every is not None for name in task.metrics()}
