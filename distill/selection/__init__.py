"""Which layers keep attention, K being given: scores of layers, sets of them, and what finding out may cost."""

from distill.selection.budget import METHODS, Budget, divide
from distill.selection.ranking import BASELINES, Layers, Ranking, choices
from distill.selection.restoring import hybrid, restored
from distill.selection.scores import divergence, greedy, restore_one

__all__ = [
    "BASELINES",
    "METHODS",
    "Budget",
    "Layers",
    "Ranking",
    "choices",
    "divergence",
    "divide",
    "greedy",
    "hybrid",
    "restore_one",
    "restored",
]
