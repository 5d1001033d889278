"""What a section of the report holds; the page decides how it looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.charts import Chart

HARDLY = 0.05
"""A teacher that beats guessing by less has nothing that a student could keep."""


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names what a row is about.

    Attributes:
        note: one sentence that says how to read it.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Values over two axes, drawn as a grid of coloured, labelled cells.

    Attributes:
        values: by (row, column), each an index of the labels; cells may be missing.
        low, high: what the ends of the colour scale stand for; where low is below 0, the scale has two colours.
        percent: values are shares and are written as percentages.
        log: the colour scale goes by the logarithm; all values are positive.
        group: maps of the same group that follow one another stand side by side under it, with one colour scale.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str
    column_label: str
    values: Mapping[tuple[int, int], float]
    low: float = 0.0
    high: float = 1.0
    percent: bool = True
    log: bool = False
    group: str = ""


@dataclass(frozen=True)
class Score:
    """One task's score of each model, for "kept and lost at a glance" on top of the page.

    Attributes:
        of: the model that the others are compared with.
        chance: what blind guessing scores.
        by_model: the higher the better; models that were not measured are missing.
    """

    task: str
    of: str
    chance: float
    by_model: Mapping[str, float]

    def kept(self, model: str) -> float | None:
        """(score − chance) / (teacher's score − chance); None where the teacher is hardly better than guessing."""
        teacher, score = self.by_model.get(self.of), self.by_model.get(model)
        if teacher is None or score is None or not teacher - self.chance > HARDLY:
            return None
        return (score - self.chance) / (teacher - self.chance)


@dataclass(frozen=True)
class Quote:
    """A text that a model wrote."""

    heading: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Section:
    """One kind of findings, as a person reads them.

    Attributes:
        lead: one or two sentences: what was found, not what was measured.
        figures: charts in the order they are shown (eval.charts), which take the page's colours.
        scores: shares between 0 and 1 that the page's top compares with the teacher's.
    """

    title: str
    lead: str
    tables: Sequence[Table] = ()
    figures: Sequence[Chart] = ()
    maps: Sequence[HeatMap] = ()
    quotes: Sequence[Quote] = ()
    scores: Sequence[Score] = ()
