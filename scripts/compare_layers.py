"""Does selection find the layers that an exhaustive search finds? Every choice of K layers is trained, and compared.

    python -m scripts.compare_layers recipes/quickstart.yaml teacher.path=runs/teachers/stdlib-8x64 \\
        --keep 1 --keep 2 --tokens 100K --output runs/layers

All choices start from one aligned student, with their layers put back from the teacher, and train in the recipe's stage
``logits`` on the same text for the same tokens. Then each method of `stages.select` says what it would have chosen, at
what cost; its order over all choices is set beside that of their held-out losses. Whatever is finished in --output is
used again, so the same command goes on where it was killed.

Writes results.json, table.md and layers.png.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.data import evaluation_batches
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.lock import alone_in
from distill.mixers import KINDS
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe import Recipe
from distill.recipe_fields import read_tokens
from distill.selection.asked import Asked, ask
from distill.selection.budget import passes_of
from distill.selection.ledger import Fields, Ledger
from distill.selection.measures import Measures, named
from distill.selection.ranking import BASELINES, Layers, Ranking
from scripts.layer_agreement import draw, table
from scripts.measure import record
from stages.command import Overrides, RecipePath
from stages.select import digest_of_training, measures, rank, trained_choice

METHODS = ("restore", "greedy", "mixing", "hidden", "probe")


@report_user_errors()
def main(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option(help="Folder of everything.")],
    overrides: Overrides = None,
    keep: Annotated[
        list[int] | None, typer.Option(help="Layers that keep attention; may be given again; by default 1 and 2.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Training of each choice, in stage logits.")] = "100K",
    seeds: Annotated[int, typer.Option(min=1, help="Orders of the text, 0, 1, ..., for each choice.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Train only these choices, such as 3 or 2-5.")] = None,
    evaluation_tokens: Annotated[str, typer.Option(help="Held-out tokens to score.")] = "32K",
) -> None:
    """Train every choice of KEEP layers of RECIPE's teacher alike, and set each method's ranking beside the outcome."""
    quiet_unless_watched()
    trained_for = read_tokens("--tokens", tokens)
    scored = read_tokens("--evaluation-tokens", evaluation_tokens)
    # Each size is asked for, so that what is wrong with one shows now; the largest decides what alignment gets.
    every = {size: ask(recipe, overrides or (), keep=size, output=output, method="greedy") for size in keep or [1, 2]}
    asked = every[max(every)]
    wanted = _wanted(asked.candidates, list(every), only or [])
    with alone_in(output), measures(asked) as measured:
        of = [*measured.settings.values(), trained_for, scored, digest_of_training(asked)]
        ledger = Ledger(output / f"trained-{trained_for}-scored-{scored}.json", *of)
        teacher = ledger.measure("teacher", partial(_teacher, measured, scored))
        found: Fields = {"teacher": teacher, "settings": _told(asked, measured, trained_for, scored), "sizes": []}
        rankings = {size: dict(_rankings(asked, measured, size)) for size in wanted}
        for size, sets in wanted.items():
            results = []
            for seed in range(seeds):
                for layers in [one for one in _in_order(rankings[size], size) if one in sets]:
                    name = f"{named(layers)} seed {seed}"
                    result = ledger.measure(name, partial(_trained, asked, measured, layers, trained_for, scored, seed))
                    print(f"layers {name}: loss {result['loss']:.4f}, KL {result['kl']:.4f}", file=sys.stderr)
                    results.append({"layers": list(layers), "seed": seed, **result})
            found["sizes"].append(
                {"keep": size, "results": results, "methods": _methods(rankings[size], measured, size, asked)}
            )
            _write(output, found)
    print(table(found))


def _wanted(candidates: Layers, sizes: Sequence[int], only: Sequence[str]) -> dict[int, set[Layers]]:
    """The choices that are to be trained, by how many layers they keep; sizes without any are left out.

    Raises:
        UserError: ``only`` names what is no choice of these sizes.
    """
    choices = {size: set(combinations(candidates, size)) for size in sizes}
    known = {named(layers) for sets in choices.values() for layers in sets}
    if unknown := [name for name in only if name not in known]:
        raise UserError(
            f"--only names {', '.join(unknown)}, which is no choice of {' or '.join(map(str, sizes))} of the layers"
            f" {candidates[0]} to {candidates[-1]}; give layers in ascending order, such as 0 or 0-1, and --keep for as"
            " many"
        )
    if not only:
        return choices
    named_sets = {size: {layers for layers in sets if named(layers) in only} for size, sets in choices.items()}
    return {size: sets for size, sets in named_sets.items() if sets}


def _methods_for(recipe: Recipe) -> list[str]:
    """Those that the recipe's mixer can be ranked by: one whose matrix has no factors is not ranked by its matrix."""
    made: Any = KINDS[recipe.student.mixer]
    return [method for method in METHODS if method != "mixing" or made.without_factors is None]


def _rankings(asked: Asked, measured: Measures, keep: int) -> Iterator[tuple[str, Ranking]]:
    """What each method makes of the layers, all on the same aligned student."""
    for method in _methods_for(asked.recipe):
        yield method, rank(replace(asked, keep=keep, method=method), measured)


def _in_order(rankings: dict[str, Ranking], keep: int) -> list[Layers]:
    """All choices; first what the methods and baselines would choose, so that the comparison is there soon."""
    candidates = sorted(rankings["restore"].order)
    first = [ranking.first(keep) for ranking in rankings.values()]
    first += [choose(candidates, keep) for choose in BASELINES.values()]
    return list(dict.fromkeys([*first, *combinations(candidates, keep)]))


def _methods(rankings: dict[str, Ranking], measured: Measures, keep: int, asked: Asked) -> list[Fields]:
    """Each method's choice, what it cost, and its score of every choice: the sum of its layers' scores.

    ``sets`` is the exhaustive search without training: the fall of KL of the whole set.
    """
    candidates = list(asked.candidates)
    sets = list(combinations(candidates, keep))
    told = []
    for method, ranking in rankings.items():
        scores = ranking.rounds[0] if ranking.rounds else ranking.scores
        alignment = 0 if method == "probe" else sum(asked.budget.align.values())
        told.append(
            {
                "method": method,
                "layers": list(ranking.first(keep)),
                "by_layer": {str(layer): scores[layer] for layer in candidates},
                "scores": {named(layers): sum(scores[layer] for layer in layers) for layers in sets},
                "tokens": alignment + passes_of(method, len(candidates), keep) * measured.tokens,
            }
        )
    fall = {layers: measured.kl(()) - measured.kl(layers) for layers in sets}
    best = max(sets, key=fall.__getitem__)
    told.append(
        {
            "method": "sets",
            "layers": list(best),
            "scores": {named(layers): value for layers, value in fall.items()},
            "tokens": sum(asked.budget.align.values()) + (1 + len(sets)) * measured.tokens,
        }
    )
    return told + [
        {"method": name, "layers": list(choose(candidates, keep)), "scores": None, "tokens": 0}
        for name, choose in BASELINES.items()
    ]


def _teacher(measured: Measures, tokens: int) -> Fields:
    run = measured.run
    batches = evaluation_batches(run.blocks[1], run.recipe.evaluation.batch_size, tokens)
    return {"loss": evaluate(run.teacher, None, batches).loss, "tokens": tokens}


def _trained(asked: Asked, measured: Measures, layers: Layers, tokens: int, scored: int, seed: int) -> Fields:
    with trained_choice(asked, measured, layers, tokens, f"seed={seed}") as (run, student):
        batches = evaluation_batches(run.blocks[1], run.recipe.evaluation.batch_size, scored)
        metrics = evaluate(student, run.teacher, batches)
        record = run.verified("logits")
        return {
            "loss": metrics.loss,
            "kl": metrics.kl,
            "agreement": metrics.agreement,
            "tokens": record.tokens,
            "seconds": record.seconds,
        }


def _told(asked: Asked, measured: Measures, tokens: int, scored: int) -> Fields:
    return {
        "recipe": asked.recipe.name,
        "teacher": asked.recipe.teacher.path,
        "n_layers": asked.n_layers,
        "tokens": tokens,
        "evaluation_tokens": scored,
        "alignment": dict(asked.budget.align),
        "distillation": asked.budget.distillation,
        "depends_on": measured.settings,
    }


def _write(output: Path, found: Fields) -> None:
    record(output / "results.json", found)
    (output / "table.md").write_text(f"{table(found)}\n")
    draw(found, output / "layers.png")


if __name__ == "__main__":
    typer.run(main)
