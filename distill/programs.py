"""What every program of the project does alike: a user's mistake ends it with one screen of text and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distill.errors import UserError

USER_ERROR = 2
_SCREEN = 20  # lines
_LINE = 500  # characters; libraries sometimes put a whole page into an exception


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Prints a `UserError` on stderr and exits with code 2; any other exception keeps its traceback.

    Around a block (``with report_user_errors():``) or a function (``@report_user_errors()``).
    """
    try:
        yield
    except UserError as error:
        print(_screen(str(error)), file=sys.stderr)
        sys.exit(USER_ERROR)


def _screen(text: str) -> str:
    lines = text.splitlines() or ["the command cannot be carried out"]
    shown = [line if len(line) <= _LINE else line[: _LINE - 1] + "…" for line in lines[:_SCREEN]]
    if len(lines) > _SCREEN:
        shown.append(f"... and {len(lines) - _SCREEN} more lines")
    return "\n".join(shown)
