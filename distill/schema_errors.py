"""What pydantic found wrong, in words for the person who wrote the file: what is allowed, what was given."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from distill.marked_yaml import KeyPath

_NEEDED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "path_type": "text",
    "finite_number": "a finite number",
}


def explain(error: ErrorDetails, model: type[BaseModel], given: object) -> tuple[KeyPath, str]:
    """The path of the error in the data as it was given, and one sentence about it.

    Args:
        error: one entry of ``ValidationError.errors()``.
        model: the root model that was validated.
        given: the data that was validated.
    """
    path = _path_as_given(error, given)
    return path, _sentence(error, model, path)


def nearest(word: str, allowed: Sequence[str]) -> str:
    """``", did you mean 'x'?"``, or nothing when no allowed word is close."""
    lower = {name.lower(): name for name in reversed(allowed)}
    close = difflib.get_close_matches(word.lower(), lower, n=1)
    return f", did you mean '{lower[close[0]]}'?" if close else ""


def path_text(path: KeyPath) -> str:
    """``("stages", "logits", "betas", 0)`` as ``stages.logits.betas[0]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def shown(value: object, width: int = 60) -> str:
    """A value on one line, as YAML writes it, cut to `width` characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= width else text[: width - 1] + "…"


def _sentence(error: ErrorDetails, model: type[BaseModel], path: KeyPath) -> str:
    kind, value = error["type"], error["input"]
    section = _section_at(model, path if kind == "model_type" else path[:-1], error["loc"])
    if kind in ("extra_forbidden", "invalid_key") and section:
        return _unknown_key(str(path[-1]), path[:-1], section, model)
    if kind == "missing":
        field = section.model_fields.get(str(path[-1])) if section else None
        about = field.description.rstrip(".") if field and field.description else ""
        return f"missing: {about[0].lower()}{about[1:]}" if about else "missing"
    if kind == "model_type" and section:
        return f"must be a section with the keys {', '.join(section.model_fields)}, not {shown(value)}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        return f"must be {_either(allowed)}, not {shown(value)}{hint}"
    if kind == "union_tag_invalid":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        key, tag = error["ctx"]["discriminator"].strip("'"), error["ctx"]["tag"]
        return f"{key} must be {_either(allowed)}, not {tag!r}{nearest(tag, allowed)}"
    if kind == "value_error":
        # A section's own rule (its input is the whole section) already names the keys at odds.
        return str(error["ctx"]["error"]) + ("" if isinstance(value, dict) else f", not {shown(value)}")
    if kind == "string_type" and not isinstance(value, (dict, list, type(None))):
        return f"must be text, not {shown(value)}: put it in quotes"
    if kind in _NEEDED:
        return f"must be {_NEEDED[kind]}, not {shown(value)}"
    if kind == "too_long":
        return f"must have at most {error['ctx']['max_length']} items, not {shown(value)}"
    return f"{error['msg'].replace('Input should', 'must')}, not {shown(value)}"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _unknown_key(key: str, parents: KeyPath, section: type[BaseModel], root: type[BaseModel]) -> str:
    allowed = list(section.model_fields)
    elsewhere = [path for path in _paths(root) if path[-1] == key]
    hint = nearest(key, allowed)
    if not hint and elsewhere:
        # A key of another section: the one that shares most of its path with what was written.
        best = max(elsewhere, key=lambda path: sum(a == b for a, b in zip(path, parents, strict=False)))
        hint = f", did you mean '{path_text(best)}'?"
    return f"unknown key{hint} (allowed: {', '.join(allowed)})"


def _path_as_given(error: ErrorDetails, given: object) -> KeyPath:
    """pydantic's location without the steps that validators added, such as the branch of a union."""
    path: list[str | int] = []
    last = len(error["loc"]) - 1
    for place, part in enumerate(error["loc"]):
        if _holds(given, part):
            given = given[part]
        elif error["type"] == "invalid_key":
            part = str(part)
        elif error["type"] != "missing" or place < last:
            continue
        path.append(part)
    return tuple(path)


def _holds(given: object, part: str | int) -> TypeGuard[Any]:
    if isinstance(given, list | tuple):
        return isinstance(part, int) and part < len(given)
    return isinstance(given, dict) and isinstance(part, str) and part in given


def _section_at(model: type[BaseModel], path: KeyPath, tags: Sequence[str | int]) -> type[BaseModel] | None:
    """The section of a path; where it may be one of several, the one whose ``kind`` is among the tags."""
    for part in path:
        if isinstance(part, int):
            continue  # an item of a list is what the list's annotation says
        field = model.model_fields.get(str(part))
        inner = _models_in(field.annotation) if field else []
        if not inner:
            return None
        model = next(
            (one for one in inner if "kind" in one.model_fields and one.model_fields["kind"].default in tags), inner[0]
        )
    return model


def _models_in(annotation: object) -> list[type[BaseModel]]:
    """The models of an annotation such as ``Section``, ``Section | None`` or ``tuple[Section | Other, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, Annotated):
        return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
    return []


def _paths(model: type[BaseModel], above: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        for inner in _models_in(field.annotation):
            yield from _paths(inner, (*above, name))
