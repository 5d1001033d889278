"""What a selection leaves in its folder: selection.json, selection.png and recipe.yaml.

selection.json, version 1:

    recipe, teacher        the recipe's name, the teacher's place
    method, unit           how layers were ranked, and what a score is
    n_layers, candidates   the depth, and the layers that might keep attention
    keep, layers           K, and the layers chosen
    ranking                [{layer, score}], the best first; score null where a method only names layers
    rounds                 [{layer: score}] of each round, for a greedy ranking; else []
    baselines              {uniform, last, first_last: layers}, for comparison
    kl                     {aligned, chosen} in nats a token on the scoring text, where it was measured; else null
    refined                [{layers, kl_before, kl_after}] of each choice that was trained; else []
    cost                   tokens: alignment (by stage), scoring, refinement, total; distillation, and share of it
    settings               seed, tokens of a pass and of a row, the teacher's dtype; digests of teacher, aligned student
                           and text
    versions               of the packages that numbers may depend on
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill import marked_yaml
from distill.atomic import replace_file
from distill.handover import versions
from distill.recipe import StageName
from distill.selection.asked import Asked
from distill.selection.budget import Budget
from distill.selection.ranking import BASELINES, Layers, Ranking
from distill.units import count

VERSION = 1
FILES = ("selection.json", "selection.png", "recipe.yaml")


@dataclass(frozen=True)
class Refined:
    """A choice of layers before and after its short training; KL in nats a token on the scoring text."""

    layers: Layers
    kl_before: float
    kl_after: float


@dataclass(frozen=True)
class Selection:
    """A finished selection.

    Attributes:
        asked: what was asked for.
        layers: the choice, ascending.
        ranking: what the method made of the candidates.
        kl: of the student without attention, and of the ranking's choice untrained; None where not measured.
        refined: the choices that were trained, the best first.
        scoring: tokens of all forward passes.
        settings: what the numbers depend on.
    """

    asked: Asked
    layers: Layers
    ranking: Ranking
    kl: tuple[float, float] | None = None
    refined: Sequence[Refined] = ()
    scoring: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alignment(self) -> Mapping[StageName, int]:
        """Tokens of each stage that aligned the student."""
        return self.asked.budget.align

    @property
    def refinement(self) -> int:
        """Tokens of all short trainings."""
        return len(self.refined) * self.asked.budget.refine

    @property
    def tokens(self) -> int:
        """What selection cost."""
        return sum(self.alignment.values()) + self.scoring + self.refinement

    @property
    def share(self) -> float:
        """Of the distillation's tokens."""
        return self.tokens / self.asked.budget.distillation


def write(selection: Selection, folder: Path) -> None:
    """All three files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(selection), indent=1, ensure_ascii=False)
    replace_file(folder / "selection.json", f"{text}\n".encode())
    draw(selection, folder / "selection.png")
    replace_file(folder / "recipe.yaml", recipe_text(selection).encode())


def promise(budget: Budget) -> str:
    """What a selection will do, and what it may cost, in a line."""
    parts = [f"{name} {count(tokens)}" for name, tokens in budget.align.items()]
    parts += [f"{budget.passes} forward passes of {count(budget.score)}"] if budget.passes else []
    parts += [f"{budget.refined} choices of {count(budget.refine)}"] if budget.refine else []
    share = budget.spent / budget.distillation
    return f"{' + '.join(parts) or 'nothing to measure'}: at most {share:.1%} of {count(budget.distillation)} tokens"


def as_json(selection: Selection) -> dict[str, Any]:
    """The fields listed on top."""
    ranking, scores = selection.ranking, selection.ranking.scores
    keep = len(selection.layers)
    return {
        "version": VERSION,
        "recipe": selection.asked.recipe.name,
        "teacher": selection.asked.recipe.teacher.path,
        "method": selection.asked.method,
        "unit": ranking.unit,
        "n_layers": selection.asked.n_layers,
        "candidates": list(selection.asked.candidates),
        "keep": keep,
        "layers": list(selection.layers),
        "ranking": [{"layer": layer, "score": scores.get(layer)} for layer in ranking.order],
        "rounds": [{str(layer): score for layer, score in round_.items()} for round_ in ranking.rounds],
        "baselines": {name: list(choose(selection.asked.candidates, keep)) for name, choose in BASELINES.items()},
        "kl": None if selection.kl is None else dict(zip(("aligned", "chosen"), selection.kl, strict=True)),
        "refined": [
            {"layers": list(one.layers), "kl_before": one.kl_before, "kl_after": one.kl_after}
            for one in selection.refined
        ],
        "cost": {
            "alignment": dict(selection.alignment),
            "scoring": selection.scoring,
            "refinement": selection.refinement,
            "total": selection.tokens,
            "distillation": selection.asked.budget.distillation,
            "share": selection.share,
        },
        "settings": dict(selection.settings),
        "versions": versions(),
    }


def recipe_text(selection: Selection) -> str:
    """The recipe with the chosen layers, and where they come from on top of it.

    It says what the given one said and no defaults; run_dir is left out, since a finished run with other layers may be
    there.
    """
    asked = selection.asked
    plain = asked.recipe.model_dump(mode="json", exclude_unset=True)
    plain.pop("run_dir", None)
    plain["name"] = "-".join([asked.recipe.name, "keep", *map(str, selection.layers)])  # a run folder for each choice
    plain["student"] = {**plain.get("student", {}), "keep_attention": list(selection.layers)}
    scores = selection.ranking.scores
    order = ", ".join(
        f"{layer} ({scores[layer]:+.4f})" if layer in scores else str(layer) for layer in selection.ranking.order
    )
    refined = f"; {len(selection.refined)} choices refined" if selection.refined else ""
    comment = [
        f"{asked.recipe.name} with the layers that `stages.select --method {asked.method}` chose{refined}.",
        f"Layers from the one most worth keeping ({selection.ranking.unit}): {order}",
        f"It cost {selection.tokens:,} tokens, {selection.share:.1%} of the distillation's; see selection.json.",
    ]
    return "".join(f"# {line}\n" for line in comment) + marked_yaml.write(plain)


def draw(selection: Selection, path: Path) -> None:
    """Scores by layer, the chosen ones in colour; where layers were chosen in rounds, one panel a round."""
    asked, ranking = selection.asked, selection.ranking
    rounds = ranking.rounds or (ranking.scores,)
    figure = Figure(figsize=(max(4.0, 0.3 * asked.n_layers + 2), 2.6 * len(rounds)), layout="constrained")
    axes = figure.subplots(len(rounds), 1, squeeze=False)[:, 0]
    for place, (ax, scores) in enumerate(zip(axes, rounds, strict=True)):
        for layer in range(asked.n_layers):
            chosen = layer in selection.layers
            ax.bar(layer, scores.get(layer, 0.0), color="C0" if chosen else "0.75")
            if chosen and layer not in scores:  # chosen in an earlier round, or by its place alone
                ax.plot(layer, 0, marker="o", color="C0")
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set_xticks(range(asked.n_layers))
        ax.set_ylabel(ranking.unit.replace(", ", ",\n"), fontsize="small")
        ax.set_title(f"round {place + 1}" if len(rounds) > 1 else "", fontsize="small")
    ax.set_xlabel("layer")
    figure.suptitle(f"{asked.recipe.name}, {asked.method}: attention stays in {', '.join(map(str, selection.layers))}")
    figure.savefig(path, dpi=120, metadata={"Software": None})
