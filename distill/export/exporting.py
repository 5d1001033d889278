"""From a student's folder to an exported folder, whole or not at all."""

from pathlib import Path

from distill.atomic import whole_folder
from distill.checks import teacher_folder
from distill.errors import UserError
from distill.export.account import read_account
from distill.export.card import CARD, write_card
from distill.export.formats import FORMATS, Options
from distill.export.held_out import measured_text
from distill.export.publishing import check_push, push
from distill.export.quantising import check_quantise, quantise_folder, weight_bytes
from distill.export.stored import read_student_config
from distill.export.written import Written
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
            Or the Hub refuses it, who is asked last; the folder is whole by then and stays.
    """
    if to not in FORMATS:
        raise UserError(f"--to is {to!r}; allowed are {', '.join(FORMATS)}")
    folder = teacher_folder(str(student))
    if folder is None:
        raise UserError(f"{student} is not a folder here; give the folder of a student")
    check_new_folder(out, folder, "student", overwrite)
    _check_options(to, options)
    read_student_config(folder)
    account = read_account(folder, options.base_model)
    text = measured_text(folder, account, options.eval_text) if options.quantise else None
    with whole_folder(out.resolve()) as partial:
        lines = FORMATS[to](folder, partial, options)
        cost = quantise_folder(partial, text) if text else None
        file = next((path.name for path in partial.glob("*.gguf")), None)
        place = options.push or out.resolve().name
        write_card(partial, account, Written(place, to, weight_bytes(partial), file, cost))
    lines += cost.told() if cost else []
    if not account.teacher.licence:
        lines.append(f"{CARD}: the teacher's licence is not known; fill it in before this is published")
    if options.push is not None:
        lines.append(f"uploaded to {push(out, options.push, private=options.private)}")
    return lines


def _check_options(to: str, options: Options) -> None:
    if options.quantise is not None:
        check_quantise(options.quantise, to)
    if options.push is not None:
        check_push(options.push)
        if not options.verify:
            raise UserError("--push uploads what was verified; leave --no-verify out")
