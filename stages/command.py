"""The command line every stage shares: a recipe, then settings that replace the recipe's."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.programs import quiet_unless_watched, report_user_errors
from distill.run import at_work_on

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as those under recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's: stages.logits.tokens=3M"),
]


def run_program(
    program: Callable[[Any], object],
    description: str,
    opened: Callable[[Path, Sequence[str]], AbstractContextManager[Any]] = at_work_on,
) -> None:
    """Read the arguments, open the recipe's run (``opened``: how), and carry out ``program`` on it.

    A user's mistake is printed on one screen and ends the program with exit code 2.
    """

    def main(recipe: RecipePath, overrides: Overrides = None) -> None:
        quiet_unless_watched()
        with report_user_errors(), opened(recipe, overrides or []) as run:
            program(run)

    main.__doc__ = description
    typer.run(main)
