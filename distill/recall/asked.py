"""A recipe's recall task: its examples, drawn once, and what a model makes of them."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.recall.sweep import Cell, Drawn, cells_of, drawing, drawn
from distill.recipe_evaluation import SCORES, RecallTask


def examples_of(task: RecallTask, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[Drawn]:
    """The task's examples, cell by cell.

    Args:
        tokenizer: needed where the task's surface is text.
        vocabulary: ids that the model knows.

    Raises:
        UserError: no length holds its items.
    """
    text = tokenizer if task.surface == "text" else None
    draw = drawing(task.task, task.surface, samples=task.samples, seed=task.seed, vocabulary=vocabulary, tokenizer=text)
    return drawn(draw, task.items, task.lengths)


def recall_measure(task: RecallTask, examples: list[Drawn]) -> Callable[[nn.Module, int], dict[str, float]]:
    """A hook for training (``distill.training.Hook``): means over the cells, by the names of ``task.metrics``."""

    def measure(student: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(student, PreTrainedModel), "tasks are asked of whole models"
        cells = cells_of(student, examples, task.batch_size)
        return dict(zip(task.metrics(), (_mean(cells, score) for score in SCORES), strict=True))

    return measure


def _mean(cells: list[Cell], score: str) -> float:
    return sum(getattr(cell, score) for cell in cells) / len(cells)
