"""From a student's folder to an exported folder, whole or not at all."""

from pathlib import Path

from distill.atomic import whole_folder
from distill.checks import teacher_folder
from distill.errors import UserError
from distill.export.formats import FORMATS, Options
from distill.new_folder import check_new_folder


def export_folder(student: Path, out: Path, *, to: str, options: Options, overwrite: bool = False) -> list[str]:
    """Write the student in the format `to`; lines to tell the user.

    Args:
        student: a folder that ``save_pretrained`` wrote.
        out: a new or empty folder; with `overwrite` also one that holds a model, which is replaced.
        to: a key of ``distill.export.formats.FORMATS``.
        options: what the formats let the user choose.
        overwrite: whether a model at `out` may be replaced.

    Raises:
        UserError: the format cannot say this student, or the written model does not equal it; nothing is left behind.
    """
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; allowed are {', '.join(FORMATS)}")
    folder = teacher_folder(str(student))
    if folder is None:
        raise UserError(f"{student} is not a folder here; give the folder of a student")
    check_new_folder(out, folder, "student", overwrite)
    with whole_folder(out.resolve()) as partial:
        return FORMATS[to](folder, partial, options)
