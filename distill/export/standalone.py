"""A student as a folder with its own modelling code: weights, tokenizer, generation config, and the code (see
``distill.standalone``), which ``trust_remote_code=True`` runs where this package is not installed.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from distill.export.formats import Options
from distill.export.stored import has_tokenizer, read_student_config
from distill.export.verification import verify
from distill.student import load_student

_APART = "exported_student"
_BESIDE = ("generation_config.json", "processor_config.json", "preprocessor_config.json")


def write_standalone(student: Path, out: Path, options: Options) -> list[str]:
    """Write the folder; see ``distill.export.formats.Format``."""
    read_student_config(student)
    load_student(student, dtype="auto").save_pretrained(out)
    lines = []
    for name in _BESIDE:
        if (student / name).is_file():
            shutil.copy(student / name, out)
    if has_tokenizer(student):
        AutoTokenizer.from_pretrained(student).save_pretrained(out)
    else:
        lines.append("the student has no tokenizer, so neither has this folder")
    code = sorted(path.name for path in out.glob("*.py"))
    lines.append(f"{len(code)} files of code, which trust_remote_code=True runs")
    return [*lines, verify(student, out, load_by_own_code) if options.verify else "not verified"]


def load_by_own_code(folder: Path) -> PreTrainedModel:
    """The model in fp32 by the class in its folder, this package's left aside; nothing is written anywhere.

    Transformers would copy the code into its cache first; that it finds and loads the class is tested, not asked here.
    """
    module, name = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].split(".")
    with _package_of(folder):
        student = getattr(importlib.import_module(f"{_APART}.{module}"), name)
        loaded: Any = student.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, account = loaded
    wrong = {kind: names for kind, names in account.items() if names}
    assert not wrong, f"the folder's class does not take all that was written: {wrong}"
    return model


@contextmanager
def _package_of(folder: Path) -> Iterator[None]:
    """The folder's files as modules of a package, while the block lasts."""
    package = ModuleType(_APART)
    package.__path__ = [str(folder)]
    compiled, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[_APART] = package
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = compiled
        for name in [name for name in sys.modules if name.partition(".")[0] == _APART]:
            del sys.modules[name]
