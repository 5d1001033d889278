"""The report's sections: each kind of findings (``eval.findings``) as a heading, a sentence, tables and charts.

One file a kind, with a function ``section(found: Findings) -> Section``. SECTIONS says which there are, in the order of
the page.
"""

from collections.abc import Callable

from eval.findings import Findings
from eval.sections import stability
from eval.sections.section import Section

SECTIONS: dict[str, Callable[[Findings], Section]] = {
    "stability": stability.section,
}
