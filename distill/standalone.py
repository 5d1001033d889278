"""Write the code a student's folder needs to load where this package is not installed.

``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` imports Python files lying flat in the folder.
So the modules a student class needs are copied with their absolute imports turned into relative ones:
``distill/ssd/chunked.py`` becomes ``distill_ssd_chunked.py`` and ``from distill.ssd.chunked import scan`` becomes
``from .distill_ssd_chunked import scan``. The copies are this package's source, not a second implementation.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from transformers import PreTrainedModel

ROOT = "distill.student"
_IMPORT = re.compile(r"^(\s*)from (distill[\w.]*) import ", flags=re.MULTILINE)


def auto_map(student: type[PreTrainedModel]) -> dict[str, str]:
    """The config entry that tells transformers which classes to load from the folder."""
    from distill.student import auto_classes

    module = _flat(ROOT)
    assert student.config_class is not None
    names = [auto.__name__ for auto in auto_classes(student)]
    loads = dict.fromkeys(names, f"{module}.{student.__name__}")
    return {"AutoConfig": f"{module}.{student.config_class.__name__}", **loads}


def write_code(folder: Path) -> list[Path]:
    """Copy the student class and everything of this package it imports into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if __name__ != "distill.standalone":  # this is itself such a copy: its neighbours are all that is needed
        return [_copy(path, folder) for path in sorted(Path(__file__).parent.glob("distill_*.py"))]
    written = []
    for module in _needed(ROOT):
        path = folder / f"{_flat(module)}.py"
        relative = _IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])} import ", _source(module))
        path.write_text(relative, encoding="utf-8")
        written.append(path)
    return written


def _copy(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder))


def _needed(root: str) -> list[str]:
    """``root`` and the modules of this package it imports, directly or through others."""
    found, queue = [], [root]
    while queue:
        module = queue.pop()
        if module not in found:
            found.append(module)
            queue += [match[2] for match in _IMPORT.finditer(_source(module))]
    return sorted(found)


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _flat(module: str) -> str:
    return module.replace(".", "_")
