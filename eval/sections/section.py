"""What a section of the report holds; the page decides how it looks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.charts import Chart


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
        low, high: what the ends of the colour scale stand for.
        percent: values are shares and are written as percentages.
        log: the colour scale goes by the logarithm; all values are positive.
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
    """

    title: str
    lead: str
    tables: Sequence[Table] = ()
    figures: Sequence[Chart] = ()
    maps: Sequence[HeatMap] = ()
    quotes: Sequence[Quote] = ()
