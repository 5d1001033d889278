"""YAML that remembers: the value of a text, and the line on which every key of it stands.

The scalars are those of YAML 1.2, which is what people expect: ``1e-4`` is a number (PyYAML reads text),
while ``yes``, ``on``, ``12:30`` and ``2024-01-01`` are text (PyYAML reads two booleans, 750 and a date).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (PyYAML's own way to configure a loader)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either PyYAML or this module would not read as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_FLOAT = re.compile(
    r"""[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$
    | [-+]?[0-9]+[eE][-+]?[0-9]+$
    | [-+]?\.(inf|Inf|INF)$
    | \.(nan|NaN|NAN)$""",
    re.VERBOSE,
)
_SCALARS = {
    "bool": (re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), "-+0123456789"),
    "float": (_FLOAT, "-+0123456789."),
    "null": (re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"<<$"), "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Problem:
    """Something in a YAML text that parses but cannot be meant."""

    line: int
    path: KeyPath
    text: str


@dataclass(frozen=True)
class MarkedYaml:
    """The value of a YAML text, the line (from 1) of every key and list item, and what is wrong with it."""

    value: object
    lines: dict[KeyPath, int]
    problems: list[Problem]


def read(text: str) -> MarkedYaml:
    """Parses one YAML document; an empty one has the value None.

    Raises:
        yaml.YAMLError: the text is not YAML, or uses tags beyond plain data.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return MarkedYaml(None, {}, [])
        lines: dict[KeyPath, int] = {}
        problems = list(_mark(root, (), lines, set()))
        return MarkedYaml(loader.construct_document(root), lines, problems)
    finally:
        loader.dispose()


def write(value: object) -> str:
    """YAML of plain data, in the order given, that both `read` and PyYAML read back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def _mark(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], seen: set[int]) -> Iterator[Problem]:
    """Fills in `lines` below `path` and yields keys given twice and keys without a value."""
    if id(node) in seen:  # an alias: its keys are marked where they were written
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
            yield from _mark(item, (*path, index), lines, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            here, line = (*path, str(key.value)), key.start_mark.line + 1
            if here in lines:
                yield Problem(line, here, f"given twice, first on line {lines[here]}; keep one of them")
                continue
            lines[here] = line
            if isinstance(item, yaml.ScalarNode) and item.value == "" and item.style is None:
                yield Problem(line, here, "has no value; give it one, or write null")
            yield from _mark(item, here, lines, seen)
