"""A recall task over lengths and numbers of items: what a model wrote and what it preferred in each cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.recall.example import Example
from distill.recall.scoring import Result, examine
from distill.recall.tasks import row_examples, text_examples

Surface = Literal["text", "ids"]
Draw = Callable[[int, int], list[Example]]
"""Examples of so many items in prompts of such a length."""
Drawn = tuple[int, int, list[Example]]
"""Items, length, and their examples."""


@dataclass(frozen=True)
class Cell:
    """One number of items at one length; shares are between 0 and 1.

    Attributes:
        items, length: as asked for.
        samples: examples seen.
        tokens, distance: means over the examples.
        written: share of answers that the model wrote.
        chosen: share of answers that it preferred to the other choices.
        gap: chosen − written.
        chance: what blind guessing would choose.
        log_probability: of the answers, mean in nats.
        rank: of the answers among the choices, mean.
        near, far: shares written of the half whose answers stand closer to the end of the prompt, and of the other.
    """

    items: int
    length: int
    samples: int
    tokens: float
    distance: float
    written: float
    chosen: float
    gap: float
    chance: float
    log_probability: float
    rank: float
    near: float
    far: float


def drawing(
    task: str, surface: Surface, *, samples: int, seed: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None
) -> Draw:
    """What makes the examples of a task, for a model's vocabulary or its tokenizer."""

    def draw(items: int, length: int) -> list[Example]:
        if surface == "ids":
            return row_examples(task, items, length, samples=samples, seed=seed, vocabulary=vocabulary)
        assert tokenizer is not None, "text takes a tokenizer"
        return text_examples(task, items, length, samples=samples, seed=seed, tokenizer=tokenizer)

    return draw


def drawn(draw: Draw, items: Sequence[int], lengths: Sequence[int]) -> list[Drawn]:
    """The examples of every cell that there is: a length too short for its items has none.

    Raises:
        UserError: there is no cell at all.
    """
    found: list[Drawn] = []
    reasons = []
    for length in lengths:
        for number in items:
            try:
                found.append((number, length, draw(number, length)))
            except UserError as error:
                reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def cells_of(model: PreTrainedModel, examples: Sequence[Drawn], batch_size: int) -> list[Cell]:
    """What the model does in each cell."""
    return [cell(items, length, examine(model, some, batch_size=batch_size)) for items, length, some in examples]


def sweep(
    model: PreTrainedModel, draw: Draw, items: Sequence[int], lengths: Sequence[int], batch_size: int
) -> list[Cell]:
    """Both at once.

    Raises:
        UserError: there is no cell at all.
    """
    return cells_of(model, drawn(draw, items, lengths), batch_size)


def cell(items: int, length: int, results: Sequence[Result]) -> Cell:
    """Means over the results of one cell."""
    by_distance = sorted(results, key=lambda result: result.distance)
    half = len(results) // 2
    written, chosen = _mean([r.written for r in results]), _mean([r.rank == 1 for r in results])
    return Cell(
        items=items,
        length=length,
        samples=len(results),
        tokens=_mean([r.tokens for r in results]),
        distance=_mean([r.distance for r in results]),
        written=written,
        chosen=chosen,
        gap=chosen - written,
        chance=_mean([1 / r.choices for r in results]),
        log_probability=_mean([r.log_probability for r in results]),
        rank=_mean([r.rank for r in results]),
        near=_mean([r.written for r in by_distance[: len(results) - half]]),
        far=_mean([r.written for r in by_distance[half:]]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
