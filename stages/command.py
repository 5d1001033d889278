"""The command line every stage shares: a recipe, then settings that replace the recipe's."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from distill.engines import processes
from distill.lock import alone_in
from distill.programs import quiet_unless_watched, report_user_errors
from distill.run import Run, open_run

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: stages.logits.tokens=3M"),
]


def run_program(program: Callable[[Run], object], description: str) -> None:
    """Read the arguments, open the recipe's run, and carry out ``program`` on it.

    A user's mistake is printed on one screen and ends the program with exit code 2.
    """

    def main(recipe: RecipePath, overrides: Overrides = None) -> None:
        quiet_unless_watched()
        with report_user_errors():
            run = open_run(recipe, overrides or [])
            with ExitStack() as held:
                alone = alone_in(run.recipe.run_dir) if processes.is_main() else nullcontext()
                processes.together(lambda: held.enter_context(alone))
                program(run)

    main.__doc__ = description
    typer.run(main)
