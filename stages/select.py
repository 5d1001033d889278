"""Which layers keep attention, K being given: align a student without any, rank the layers, write the recipe.

    python -m stages.select recipes/quickstart.yaml --keep 1 --output runs/select/one
    python -m stages.select recipes/quickstart.yaml --keep 2 --refine 40K --output runs/select/two
    python -m stages.run runs/select/one/recipe.yaml

It trains, by the stages' own programs, so it is a program of the checkout as they are and no command of ``distill``;
what it ranks by is in `distill.selection`. All of it, forward passes included, costs a tenth of the recipe's tokens
unless --budget says otherwise. Killed at any moment it goes on by the same command.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from distill.lock import alone_in
from distill.objective import Objective
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe import MixingStage
from distill.recipe_fields import read_tokens
from distill.run import Run, at_work_on
from distill.selection.asked import BORDERLINE, SETS, Asked, ask
from distill.selection.budget import METHODS
from distill.selection.ledger import Fields
from distill.selection.measures import Measures, named
from distill.selection.ranking import BASELINES, Layers, Ranking, by_place, choices
from distill.selection.record import FILES, Refined, Selection, promise, write
from distill.selection.runs import choice_folder, choice_settings, last_student, put_back
from distill.selection.scores import greedy, restore_one
from stages import hidden, mixing
from stages.command import Overrides, RecipePath
from stages.run import PROGRAMS


@report_user_errors()
def main(
    recipe: RecipePath,
    keep: Annotated[int, typer.Option(help="Layers that shall keep attention.")],
    output: Annotated[Path, typer.Option(help=f"Folder for {', '.join(FILES)}, and for what they come from.")],
    overrides: Overrides = None,
    method: Annotated[str, typer.Option(help=f"How layers are ranked: {', '.join(METHODS)}.")] = "greedy",
    among: Annotated[str, typer.Option(metavar="LAYERS", help="Only these may keep attention: 2,5,8; else all.")] = "",
    budget: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="All that it may cost; a tenth of the recipe's by default.")
    ] = None,
    score_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Text of each forward pass; by default what a quarter of the budget leaves for each, 32K at most.",
        ),
    ] = None,
    refine: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Train the choices near the K-th place so long, rank again.")
    ] = None,
    trained: Annotated[
        int, typer.Option("--choices", min=2, max=SETS, help="Choices that --refine trains.")
    ] = BORDERLINE,
) -> None:
    """Choose the layers of RECIPE's teacher whose attention is worth most, and write the recipe that keeps them."""
    quiet_unless_watched()
    asked = ask(
        recipe,
        overrides or (),
        keep=keep,
        output=output,
        method=method,
        among=among,
        total=None if budget is None else read_tokens("--budget", budget),
        score=None if score_tokens is None else read_tokens("--score-tokens", score_tokens),
        refine=0 if refine is None else read_tokens("--refine", refine),
        refined=trained,
    )
    print(promise(asked.budget), flush=True)
    with alone_in(output):
        found = select(asked)
        write(found, output)
    print(
        f"keep_attention: {list(found.layers)}; it cost {found.tokens:,} tokens, {found.share:.1%} of the"
        f" distillation's.  {', '.join(str(output / name) for name in FILES)}"
    )


def select(asked: Asked) -> Selection:
    """Carry out a selection, or go on with one.

    Raises:
        UserError: as ``distill.run.at_work_on``.
    """
    if asked.method in BASELINES:
        chosen = BASELINES[asked.method](asked.candidates, asked.keep)
        return Selection(asked, chosen, by_place(asked.candidates, chosen), settings={"seed": asked.recipe.seed})
    with measures(asked) as measured:
        ranking = rank(asked, measured)
        chosen = ranking.first(asked.keep)
        kl = None if measured.student is None else (measured.kl(()), measured.kl(chosen))
        refined = _refined(asked, measured, ranking) if asked.budget.refine else []
        return Selection(
            asked,
            refined[0].layers if refined else chosen,
            ranking,
            kl=kl,
            refined=refined,
            scoring=measured.ledger.tokens,
            settings=measured.settings,
        )


@contextmanager
def measures(asked: Asked) -> Iterator[Measures]:
    """The student without attention, aligned where the method needs one, and what can be measured of it."""
    with at_work_on(asked.path, asked.aligned) as run:
        student = None
        if asked.budget.align:
            for stage in run.stages:
                if not run.is_done(stage):
                    print(f"aligning a student without attention, {stage}: running", flush=True)
                    PROGRAMS[stage](run)
            student = last_student(run)
        yield Measures(run, student, asked.budget.score, asked.output)


def rank(asked: Asked, measured: Measures) -> Ranking:
    """The candidates by the method that was asked for."""
    if asked.method == "restore":
        return restore_one(asked.candidates, measured.kl)
    if asked.method == "greedy":
        return greedy(asked.candidates, measured.kl, asked.keep)
    if asked.method == "probe":
        return measured.probed(asked.candidates)
    assert measured.student is not None
    teacher, stages = measured.run.teacher, asked.recipe.stages
    objective: Objective
    if asked.method == "mixing":
        settings = stages.mixing or MixingStage(tokens=1, mixer_lr=1.0)  # of which only the form is read
        objective = mixing.MixingObjective(teacher, measured.student, settings)
    else:
        assert stages.hidden is not None
        objective = hidden.HiddenObjective(teacher, measured.student, stages.hidden)
    return measured.distances(asked.method, objective, asked.candidates)


@contextmanager
def trained_choice(
    asked: Asked, measured: Measures, layers: Layers, tokens: int, *more: str
) -> Iterator[tuple[Run, PreTrainedModel]]:
    """The aligned student with these layers put back, trained in logits; and its run.

    What the run left on disk is removed when the block ends well.

    Args:
        tokens: of training.
        more: settings of the recipe on top.
    """
    assert measured.student is not None
    settings = [*asked.overrides, *choice_settings(asked.recipe, asked.output, layers, tokens), *more]
    with at_work_on(asked.path, settings) as run:
        vars(run)["teacher"] = measured.run.teacher  # one in memory is enough
        put_back(run, measured.run, measured.student)
        if not run.is_done("logits"):
            PROGRAMS["logits"](run)
        yield run, last_student(run)
    shutil.rmtree(choice_folder(asked.output, layers))


def _refined(asked: Asked, measured: Measures, ranking: Ranking) -> list[Refined]:
    """The likeliest choices, each trained for a while; the one with the lowest KL then is first."""
    likely = sorted(choices(ranking, asked.keep, BORDERLINE), key=measured.kl)[: asked.budget.refined]
    refined = []
    for layers in likely:
        name = f"refined {named(layers)} {asked.budget.refine} {digest_of_training(asked)}"
        after = measured.ledger.measure(name, partial(_after, asked, measured, layers))
        refined.append(Refined(layers, measured.kl(layers), after["kl"]))
        print(f"layers {named(layers)}: KL {refined[-1].kl_before:.4f} → {refined[-1].kl_after:.4f}", flush=True)
    return sorted(refined, key=lambda one: one.kl_after)


def digest_of_training(asked: Asked) -> str:
    """A digest of how choices are trained, which nothing else tells from numbers on the same aligned student."""
    assert asked.recipe.stages.logits is not None
    return hashlib.sha256(asked.recipe.stages.logits.model_dump_json().encode()).hexdigest()[:8]


def _after(asked: Asked, measured: Measures, layers: Layers) -> Fields:
    with trained_choice(asked, measured, layers, asked.budget.refine) as (_, student):
        return measured.kl_of(student)


if __name__ == "__main__":
    typer.run(main)
