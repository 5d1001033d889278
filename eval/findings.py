"""What a measuring program found, on disk: FOLDER/KIND.json, which the report makes a section of its page from.

A kind is the program's name: ``recall``, ``harness``, ``long_context``, … In the file stand the settings it ran with,
the models it measured by the names that tell them apart, and its results, whose form is the kind's own.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.atomic import explained_full_disk, replace_file
from distill.errors import UserError
from distill.evaluation_record import json_numbers
from eval import windows, words

Fields = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """One program's findings.

    Attributes:
        kind: the program's name.
        models: each model's path by its name, in the order they were given.
        settings: whatever would have to be given again to find the same.
        results: JSON of the kind's own form, numbers unrounded.
    """

    kind: str
    models: dict[str, str]
    settings: Fields
    results: Fields


def write_findings(folder: Path, found: Findings) -> Path:
    """FOLDER/KIND.json, whole or not at all."""
    path = folder / f"{found.kind}.json"
    with explained_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(json_numbers(vars(found)), indent=1, ensure_ascii=False)
        replace_file(path, f"{text}\n".encode())
    return path


def read_findings(path: Path) -> Findings:
    """The findings of one file.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        return Findings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the program that wrote it again") from error


def require_folder(output: Path) -> None:
    """Refuse, before anything is measured, an --output that cannot be a folder."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; --output takes a folder")


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Each model's path by the shortest name that no other one may be called (``eval.windows.names_for``).

    Raises:
        UserError: a model is given twice.
    """
    possible = [windows.names_for(path) for path in paths]
    if len(set(paths)) < len(paths):
        raise UserError(f"{words.listed(paths)}: a model is given twice")
    taken = Counter(name for names in possible for name in set(names))
    return {next(name for name in names if taken[name] == 1): path for names, path in zip(possible, paths, strict=True)}
