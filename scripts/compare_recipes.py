"""Which recipe keeps most of the teacher for its tokens: each is trained with several seeds on the same text.

    python -m scripts.compare_recipes --teacher stories260k --budget 1M --budget 4M --seeds 3 \\
        --recipe ours --recipe mohawk --recipe "ours student.mixer=mamba2" --output runs/compare/stories260k

Writes results.json, table.md and gap.png into --output. Whatever is finished there is used again and what was killed
goes on, so the same command with more budgets, seeds or recipes only does what is new. How the comparison is made fair,
and where it is not, stands in docs/comparison.md.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from distill.errors import UserError
from distill.evaluation_record import json_numbers
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe_fields import read_tokens
from scripts.comparison_pool import carried_out, processes
from scripts.comparison_runs import RECIPES, Common, Fields, Wanted, cut_recipe, prepare, slug
from scripts.comparison_table import draw, gap, table
from scripts.measure import circumstances

GRID = [0.3, 1.0, 3.0]


class Teacher(NamedTuple):
    """A teacher with its text.

    Attributes:
        recipe: that names both.
        recall: whether it answers the rows of `distill.recall` in its own ids.
    """

    recipe: Path
    recall: bool = False


TEACHERS = {
    "stdlib-1m": Teacher(RECIPES / "quickstart.yaml"),
    "stories260k": Teacher(RECIPES / "stories260k.yaml"),
    "recall": Teacher(RECIPES / "recall-hybrid.yaml", recall=True),
}


@report_user_errors()
def main(
    recipe: Annotated[
        list[str],
        typer.Option(help='ours, a name in recipes/published, or a file; settings may follow: "ours seed=1".'),
    ],
    budget: Annotated[list[str], typer.Option(help="Training tokens over all stages, such as 1M; several times.")],
    teacher: Annotated[str, typer.Option(help=f"One of {', '.join(TEACHERS)}, or a recipe that names one.")],
    output: Annotated[Path, typer.Option(help="Folder of all runs and of what they come to.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each.")] = 1,
    seeds_above: Annotated[int | None, typer.Option(min=1, help="Seeds at budgets but the smallest; --seeds.")] = None,
    tune: Annotated[
        bool, typer.Option(help="Choose each recipe's learning rates, × each --factor, by its gap with seed 0.")
    ] = False,
    factor: Annotated[list[float], typer.Option(min=1e-3, help="What --tune multiplies learning rates by.")] = GRID,
    tune_budget: Annotated[str | None, typer.Option(help="Where --tune chooses; the smallest budget.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of the text's block a step, for all; their own unless given.")
    ] = None,
    teacher_path: Annotated[str | None, typer.Option(help="Where the teacher lies, if elsewhere.")] = None,
    source: Annotated[str | None, typer.Option(help="Where its text lies, if elsewhere.")] = None,
    keep_attention: Annotated[str, typer.Option(help="Layers that keep attention, for all: [1] or {count: 1}.")] = "[]",
    evaluation_tokens: Annotated[str, typer.Option(help="Held-out tokens to score.")] = "32K",
    points: Annotated[int, typer.Option(min=1, help="Evaluations on the way, about.")] = 8,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 1,
) -> None:
    """Train every RECIPE on one teacher within the same budgets, and compare what they come to."""
    quiet_unless_watched()
    asked = TEACHERS.get(teacher) or Teacher(Path(teacher))
    moved = {"teacher.path": teacher_path, "data.source": source}
    common = Common(
        teacher=asked.recipe,
        overrides=tuple(f"{key}={json.dumps(place)}" for key, place in moved.items() if place is not None),
        keep_attention=keep_attention,
        evaluation_tokens=read_tokens("--evaluation-tokens", evaluation_tokens),
        points=points,
        recall=asked.recall,
        output=output,
        batch_size=batch_size,
    )
    budgets, recipes = sorted({read_tokens("--budget", given) for given in budget}), _distinct(recipe)
    tuned_at = read_tokens("--tune-budget", tune_budget) if tune_budget else budgets[0]
    grid = sorted(factor) if tune else [1.0]
    for name in recipes:  # whatever is wrong with any of them shows before the first is trained
        for tokens in (*budgets, tuned_at):
            cut_recipe(common, Wanted(name, tokens, 1.0, 0))
    facts = prepare(common, Wanted(recipes[0], budgets[0], 1.0, 0))

    settings = {
        "keep_attention": keep_attention,
        "evaluation_tokens": common.evaluation_tokens,
        "batch_size": batch_size,
        "grid": grid,
        "tuned_at": tuned_at,
    }
    found: Fields = {"teacher": {"name": teacher, **facts}, "settings": settings, "results": []}
    with processes(jobs) as pool:
        tried = carried_out(pool, common, [Wanted(name, tuned_at, f, 0) for name in recipes for f in grid])
        factors = {name: _best(tried, name, facts["loss"]) for name in recipes}
        for tokens in budgets:
            number = seeds if tokens == budgets[0] else seeds_above or seeds
            wanted = [Wanted(name, tokens, factors[name], seed) for seed in range(number) for name in recipes]
            found["results"] += carried_out(pool, common, wanted)
            _write(output, {**found, "tried": tried})  # already here: the larger budgets take longest
    print(f"{output}/results.json, table.md, gap.png")


def _best(tried: Iterable[Fields], recipe: str, teacher_loss: float) -> float:
    """The factor on a recipe's learning rates with the smallest gap; where all failed, the smallest factor."""
    of_recipe = [result for result in tried if result["recipe"] == recipe]
    return min(of_recipe, key=lambda result: (gap(result, teacher_loss), result["factor"]))["factor"]


def _write(output: Path, found: Fields) -> None:
    (output / "results.json").write_text(
        f"{json.dumps(json_numbers({**found, 'measured_on': circumstances()}), indent=1, ensure_ascii=False)}\n"
    )
    text = table(found)
    (output / "table.md").write_text(f"{text}\n")
    draw(found, output / "gap.png")
    print(f"{text}\n", flush=True)


def _distinct(recipes: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(recipes))
    if len({slug(name) for name in names}) < len(names):
        raise UserError(f"--recipe: {', '.join(names)}: two would have the same folder")
    return names


if __name__ == "__main__":
    typer.run(main)
