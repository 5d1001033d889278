"""Tasks that only a model which reads its prompt can do, drawn from seeds, and how well a model does them."""

from distill.recall.example import Example, Question, encoded
from distill.recall.scoring import Result, examine
from distill.recall.tasks import TASKS, row_examples, text_examples, text_questions

__all__ = [
    "TASKS",
    "Example",
    "Question",
    "Result",
    "encoded",
    "examine",
    "row_examples",
    "text_examples",
    "text_questions",
]
