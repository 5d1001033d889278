"""A student's weights in another format's names and shapes, one tensor at a time, by a table that reads both ways."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.export.changes import SAME, Change, Sizes


@dataclass(frozen=True)
class Rule:
    """All tensors of one side, one behind another, are those of the other side one behind another, but for a change.

    Attributes:
        ours: names in a student, ``{i}`` for the number of a layer.
        theirs: names in the format.
        change: what happens to the numbers.
        axis: along which they stand one behind another: rows, unless said.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    change: Change = SAME
    axis: int = 0

    def reversed(self) -> "Rule":
        return Rule(self.theirs, self.ours, self.change.reversed(), self.axis)

    def at(self, layer: int) -> "Rule":
        """The rule for one layer."""
        return Rule(
            tuple(name.format(i=layer) for name in self.ours),
            tuple(name.format(i=layer) for name in self.theirs),
            self.change,
            self.axis,
        )


def same(name: str, theirs: str | None = None, change: Change = SAME) -> Rule:
    """One tensor on each side; with one name, the same on both."""
    return Rule((name,), (theirs or name,), change)


def applicable(rules: Sequence[Rule], n_layers: int, names: Mapping[str, object]) -> Iterator[Rule]:
    """The rules, once for every layer, all of whose tensors are there."""
    for rule in rules:
        per_layer = any("{i}" in name for name in rule.ours)
        for made in map(rule.at, range(n_layers)) if per_layer else (rule,):
            if all(name in names for name in made.ours):
                yield made


def unplaced(rules: Sequence[Rule], n_layers: int, names: Mapping[str, object]) -> list[str]:
    """The tensors that no rule takes, in their order."""
    taken = {name for rule in applicable(rules, n_layers, names) for name in rule.ours}
    return [name for name in names if name not in taken]


def translate(
    rules: Sequence[Rule],
    n_layers: int,
    stored: Mapping[str, Callable[[], Tensor]],
    sizes: Sizes,
    lengths: Callable[[str, int], int],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the format by its name, each read when its turn comes.

    Args:
        rules: the table; its reversed rules lead back.
        n_layers: how often rules for layers apply.
        stored: the student's tensors by name, each behind a call that reads it.
        sizes: for the changes.
        lengths: how long a tensor of the format is along an axis; asked only where a rule makes several of one.
    """
    for rule in applicable(rules, n_layers, stored):
        read = [stored[name]() for name in rule.ours]
        whole = rule.change.there(read[0] if len(read) == 1 else torch.cat(read, rule.axis), sizes)
        if len(rule.theirs) == 1:
            yield rule.theirs[0], whole
        else:
            parts = whole.split([lengths(name, rule.axis) for name in rule.theirs], rule.axis)
            yield from zip(rule.theirs, parts, strict=True)
