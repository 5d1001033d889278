"""From a YAML file and `key=value` overrides to a validated model, with all that is wrong on one screen."""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from distill import marked_yaml
from distill.errors import UserError
from distill.marked_yaml import KeyPath
from distill.schema_errors import explain, path_text

_SCREEN = 15  # problems shown at once; a long one wraps to two or three lines

_OVERRIDE = None  # the line of what was given on the command line

Model = TypeVar("Model", bound=BaseModel)


class _Problem(NamedTuple):
    line: int | None
    key: KeyPath
    text: str


def read_recipe_file(
    model: type[Model], path: Path, overrides: Sequence[str], in_order: Mapping[KeyPath, Sequence[str]]
) -> Model:
    """Reads `path`, applies `overrides` and validates the result as `model`.

    Args:
        model: has a field `name`, which is the file's stem unless given.
        path: a YAML file.
        overrides: texts such as ``"stages.logits.tokens=300M"``; values are YAML.
        in_order: sections whose keys must stand in the file in this order.

    Raises:
        UserError: all that is wrong with file and overrides, each with its line.
    """
    marked = _parse(path)
    if not isinstance(marked.value, dict):
        what = "is empty" if marked.value is None else "is not a mapping of keys to values"
        raise UserError(f"{path}: {what}; needed: {', '.join(_required(model))}")
    lines: dict[KeyPath, int | None] = dict(marked.lines)
    problems = [_Problem(found.line, found.path, found.text) for found in marked.problems]
    problems += [_Problem(lines[key], key, text) for key, text in _out_of_order(marked.value, in_order)]
    raw = {"name": path.stem, **marked.value}
    for override in overrides:
        problems += [_Problem(_OVERRIDE, key, text) for key, text in _apply(override, raw, lines)]
    try:
        validated = model.model_validate(raw)
    except ValidationError as invalid:
        known = {problem.key for problem in problems}
        for error in invalid.errors(include_url=False):
            key, text = explain(error, model, raw)
            # What is below a key already reported, such as one given twice, is not wrong a second time.
            if not any(key[: len(above)] == above for above in known):
                problems.append(_Problem(_line_of(key, lines), key, text))
    if problems:
        raise UserError(_screen(path, problems))
    return validated


def _parse(path: Path) -> marked_yaml.MarkedYaml:
    try:
        return marked_yaml.read(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        others = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern))
        close = difflib.get_close_matches(path.name, others, n=1)
        hint = f", did you mean {path.with_name(close[0])}?" if close else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _out_of_order(value: dict, in_order: Mapping[KeyPath, Sequence[str]]) -> Iterator[tuple[KeyPath, str]]:
    for section, order in in_order.items():
        given: object = value
        for part in section:
            given = given.get(part) if isinstance(given, dict) else None
        known = [key for key in given if key in order] if isinstance(given, dict) else []
        for before, key in itertools.pairwise(known):
            if order.index(key) < order.index(before):
                yield (*section, key), f"stands after '{before}'; the order is {', '.join(order)}"
                return


def _apply(override: str, raw: dict, lines: dict[KeyPath, int | None]) -> Iterator[tuple[KeyPath, str]]:
    """Sets the value in `raw` and marks its place in `lines`; yields what keeps it from doing so."""
    dotted, equals, text = override.partition("=")
    key: KeyPath = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        yield (override,), "must be key=value, such as stages.logits.tokens=300M"
        return
    try:
        marked = marked_yaml.read(text)
    except yaml.YAMLError:
        yield key, f"{text!r} is not valid YAML; put text in quotes"
        return
    if marked.value is None and not text.strip():
        yield key, "has no value; give it one, or write null"
        return
    yield from ((key + found.path, found.text) for found in marked.problems)
    section = raw
    for depth, part in enumerate(key[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
            lines[key[:depth]] = _OVERRIDE
        elif not isinstance(section[part], dict):
            above = path_text(key[:depth])
            yield key, f"{above} is not a section here; set it as a whole: {above}={{{key[depth]}: ..}}"
            return
        # A copy: with an alias in the file, two sections are one object.
        section[part] = dict(section[part])
        section = section[part]
    section[key[-1]] = marked.value
    for below in [known for known in lines if known[: len(key)] == key]:
        del lines[below]
    lines[key] = _OVERRIDE


def _line_of(key: KeyPath, lines: Mapping[KeyPath, int | None]) -> int | None:
    """The line of the key or of the nearest section above it that was written down; 0 for the whole file."""
    while key:
        if key in lines:
            return lines[key]
        key = key[:-1]
    return 0


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required() and name != "name"]


def _screen(path: Path, problems: Sequence[_Problem]) -> str:
    """The problems in the order of the file, then those of the command line, at most a screen of them."""
    lines = []
    for line, key, text in sorted(problems, key=lambda problem: (problem.line is _OVERRIDE, problem.line)):
        place = "override" if line is _OVERRIDE else f"{path}:{line}" if line else str(path)
        lines.append(f"{place}: {path_text(key)}: {text}")
    more = len(lines) - _SCREEN
    return "\n".join(lines[:_SCREEN] + ([f"... and {more} more"] if more > 0 else []))
