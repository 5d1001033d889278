"""The report's sections: each kind of findings (``eval.findings``) as a heading, a sentence, tables and charts.

One file a kind, with a function ``section(found: Findings) -> Section``. SECTIONS says which there are, in the order of
the page.
"""

from collections.abc import Callable

from eval.findings import Findings
from eval.sections import ablation, generation, harness, long_context, recall, speed, stability
from eval.sections.section import Section

SECTIONS: dict[str, Callable[[Findings], Section]] = {
    "recall": recall.section,
    "harness": harness.section,
    "generation": generation.section,
    "long_context": long_context.section,
    "ablation": ablation.section,
    "stability": stability.section,
    "speed": speed.section,
}
