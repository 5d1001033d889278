"""Write the code a student's folder needs to load where this package is not installed.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` imports Python files lying flat in the folder:

    modeling_distilled_llama.py     written for this student: its class, and the fingerprints of all the others
    distill_mixers.py               written for this student: the mixers it has
    distill_ssd_chunked.py …        this package's source: ``from distill.ssd.chunked import scan`` has become
                                    ``from .distill_ssd_chunked import scan``

The copies are this package's source, not a second implementation, and only what this student needs: no other family,
no other mixer, nothing of training. A model loaded from there is saved with this code again by transformers.
"""

import importlib.util
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from distill.auto_classes import auto_classes
from distill.intact_code import fingerprint
from distill.layout import ATTENTION
from distill.mixers import BESIDE, KINDS

PACKAGE = "distill-ssm"
BASE, TABLE, GUARD = "distill.student_base", "distill.mixers", "distill.intact_code"
_PARTS = {**KINDS, **BESIDE}
_IMPORT = re.compile(r"^(\s*)from (distill[\w.]*) import ", flags=re.MULTILINE)

_CLASS = '''\
"""{student}: {teacher}, some of whose attention layers are state-space mixers."""

from pathlib import Path

from .{guard} import require_intact

# Copied together; a file of another version would compute something else without a word.
WRITTEN = {{
{written}}}
require_intact(Path(__file__).parent, WRITTEN)

{imports}
from .{base} import Student


class {config}({stock}):
    model_type = "{model_type}"


class {student}(Student, {teacher}):
    config_class = {config}


# What is saved again takes its code along.
{config}.register_for_auto_class()
{student}.register_for_auto_class("AutoModelForCausalLM")
'''

_TABLE = '''\
"""The mixers this student has."""

{imports}
KINDS = {{{entries}}}
BESIDE = {{{beside}}}
'''


def auto_map(student: type[PreTrainedModel]) -> dict[str, str]:
    """The config entry that tells transformers which classes to load from the folder."""
    config, module = _config_class(student), _module(student)
    loads = {auto.__name__: f"{module}.{student.__name__}" for auto in auto_classes(student)}
    return {"AutoConfig": f"{module}.{config.__name__}", **loads}


def write_code(folder: Path, student: type[PreTrainedModel], parts: Iterable[str]) -> list[Path]:
    """Write a student's class and everything of this package it imports into ``folder``.

    Args:
        student: its class, of ``distill.student``.
        parts: what its layers are made of, as ``distill.layout.parts_of`` names it.

    Returns:
        The files, the one with the class last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = sorted(set(parts) - {ATTENTION})
    sources = {f"{_flat(module)}.py": _copy(module) for module in _needed(kinds)}
    sources[f"{_flat(TABLE)}.py"] = _header("") + _table(kinds)
    sources[f"{_module(student)}.py"] = _header("") + _class(student, sources)
    for name, text in sources.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in sources]


def package_version() -> str:
    """This package's version; "(a checkout)" where it runs without being installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "(a checkout)"


def _needed(kinds: Iterable[str]) -> list[str]:
    """The modules to copy: the student's base, its mixers, and what these import, directly or through others."""
    queue = [BASE, GUARD, *(_PARTS[kind].__module__ for kind in kinds)]
    found = {TABLE}  # written, not copied: it would bring every mixer
    while queue:
        module = queue.pop()
        if module not in found:
            found.add(module)
            queue += [match[2] for match in _IMPORT.finditer(_source(module))]
    return sorted(found - {TABLE})


def _class(student: type[PreTrainedModel], sources: dict[str, str]) -> str:
    config = _config_class(student)
    teacher, stock = _stock(student), _stock(config)
    return _CLASS.format(
        student=student.__name__,
        teacher=teacher.__name__,
        config=config.__name__,
        stock=stock.__name__,
        model_type=config.model_type,
        guard=_flat(GUARD),
        base=_flat(BASE),
        imports="\n".join(_import_of(made) for made in (stock, teacher)),
        written="".join(f'    "{name}": "{fingerprint(text)}",\n' for name, text in sources.items()),
    )


def _table(kinds: list[str]) -> str:
    classes = {kind: _PARTS[kind] for kind in kinds}
    entries = {kind: f'"{kind}": {made.__name__}' for kind, made in classes.items()}
    return _TABLE.format(
        imports="".join(f"from .{_flat(made.__module__)} import {made.__name__}\n" for made in classes.values()),
        entries=", ".join(entry for kind, entry in entries.items() if kind in KINDS),
        beside=", ".join(entry for kind, entry in entries.items() if kind in BESIDE),
    )


def _copy(module: str) -> str:
    relative = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import ", _source(module))
    return _header(f", {_path(module).relative_to(_path('distill').parent.parent).as_posix()}") + relative


def _header(file: str) -> str:
    return f"# SPDX-License-Identifier: Apache-2.0\n# Written by {PACKAGE} {package_version()}{file}.\n"


def _import_of(made: type) -> str:
    """``from transformers import …``: from its own module only where the library does not name it on top."""
    place = "transformers" if getattr(transformers, made.__name__, None) is made else made.__module__
    return f"from {place} import {made.__name__}"


def _stock(made: type) -> type:
    """The class of transformers that a student's class or config is made of."""
    return next(base for base in made.__mro__ if base.__module__.startswith("transformers."))


def _config_class(student: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    assert student.config_class is not None
    return student.config_class


def _module(student: type[PreTrainedModel]) -> str:
    return f"modeling_{_config_class(student).model_type}"


def _source(module: str) -> str:
    return _path(module).read_text(encoding="utf-8")


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


def _flat(module: str) -> str:
    return module.replace(".", "_")
