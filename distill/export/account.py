"""All that is known of how a student came to be, from its folder and the run around it; nothing here needs a model.

    run_dir/data/manifest.json     the text
    run_dir/teacher/               the teacher's evaluation
    run_dir/convert/ mixing/ …     a stage each: stage.json, evaluation.json, recipe.yaml
    run_dir/logits/                the student: the stages before it are followed from record to record

A folder that ``distill convert`` or a user made has less of this, and what is not there is None: it is said to be
unknown and never guessed.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import AutoConfig, PreTrainedConfig

from distill import handover
from distill.data.blocks import MANIFEST, Manifest, read_manifest
from distill.data.image_text import read_image_manifest
from distill.errors import UserError
from distill.evaluation_record import Evaluation, read_evaluation
from distill.handover import StageRecord

RECIPE, TEACHER, CONVERT = "recipe.yaml", "teacher", "convert"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


@dataclass(frozen=True)
class Teacher:
    """What the student was made from.

    Attributes:
        name: a Hub id or the last part of a folder's path; None where nobody wrote it down.
        on_hub: whether ``name`` is a Hub id.
        licence: ``license``, ``license_name`` and ``license_link`` of its card; empty where it has none here.
        language: of its card.
    """

    name: str | None = None
    on_hub: bool = False
    licence: dict[str, str] = field(default_factory=dict)
    language: str | list[str] | None = None


@dataclass(frozen=True)
class Account:
    """What a model card is written from.

    Attributes:
        config: the student's.
        recipe: as the run resolved it, paths of this machine cut to names; None where there was none.
        stages: conversion first, the student's own stage last; empty where nothing was recorded.
        whole: whether ``stages`` begins with the conversion.
        planned: names of the stages the recipe asks for.
        evaluations: by stage, and the teacher's; what was measured.
        data: what the text was.
    """

    config: PreTrainedConfig
    teacher: Teacher
    recipe: dict[str, Any] | None = None
    stages: tuple[StageRecord, ...] = ()
    whole: bool = False
    planned: tuple[str, ...] = ()
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    data: Manifest | None = None

    @property
    def trained(self) -> tuple[StageRecord, ...]:
        """The stages that trained it."""
        return tuple(record for record in self.stages if record.stage != CONVERT)

    @property
    def evaluation(self) -> Evaluation | None:
        """Of the student itself."""
        return self.evaluations.get(self.stages[-1].stage) if self.stages else None

    @property
    def sources(self) -> list[str]:
        """What the recipe says the text is."""
        source = (self.recipe or {}).get("data", {}).get("source", [])
        return [source] if isinstance(source, str) else list(source)


def read_account(student: Path, base_model: str | None = None) -> Account:
    """Everything known of a student's folder.

    Args:
        student: a folder that ``save_pretrained`` wrote.
        base_model: the teacher's Hub id, where the user says it.

    Raises:
        UserError: a record that is there is damaged.
    """
    student = student.resolve()
    recipe = _read_recipe(student / RECIPE)
    stages = _ancestry(student)
    beside = student.parent
    folders = {record.stage: student if record is stages[-1] else beside / record.stage for record in stages}
    if stages:
        folders[TEACHER] = beside / TEACHER
    found = {name: read_evaluation(folder) for name, folder in folders.items()}
    return Account(
        config=AutoConfig.from_pretrained(student),
        teacher=_teacher(recipe, stages, base_model),
        recipe=recipe and _without_paths(recipe),
        stages=tuple(stages),
        whole=bool(stages) and stages[0].stage == CONVERT,
        planned=tuple((recipe or {}).get("stages", {})),
        evaluations={name: evaluation for name, evaluation in found.items() if evaluation is not None},
        data=_text(beside / "data") if stages else None,
    )


def _text(prepared: Path) -> Manifest | None:
    """What the run's text was; None where it is not there, or is image-text rows."""
    if not (prepared / MANIFEST).is_file() or read_image_manifest(prepared) is not None:
        return None
    return read_manifest(prepared)


def _ancestry(student: Path) -> list[StageRecord]:
    """The records that led to the student, as far back as folders beside it are the ones that they name."""
    if not handover.is_there(student):
        return []
    records = [handover.read(student)]
    while (parent := records[0].parent) is not None and parent.stage != TEACHER:
        folder = student.parent / parent.stage
        if not handover.is_there(folder) or (before := handover.read(folder)).as_parent() != parent:
            break
        records.insert(0, before)
    return records


def _read_recipe(path: Path) -> dict[str, Any] | None:
    """As written, also by another version whose recipes allow other keys."""
    if not path.is_file():
        return None
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no recipe; restore the file, or remove it") from error


def _teacher(recipe: dict[str, Any] | None, stages: list[StageRecord], base_model: str | None) -> Teacher:
    path = str((recipe or {}).get("teacher", {}).get("path", ""))
    card = _card_of(path)
    facts: dict[str, Any] = {"licence": _licence(card), "language": card.language if card else None}
    if base_model is not None:
        return Teacher(base_model, on_hub=True, **facts)
    if not path:
        return Teacher()
    cached = _CACHED.search(Path(path).as_posix() + "/")
    if cached:
        return Teacher(f"{cached[1]}/{cached[2]}", on_hub=True, **facts)
    # A relative path may look like an id: what the first stage's record calls its parent tells them apart.
    on_hub = bool(stages) and stages[0].parent == handover.Parent(TEACHER, handover.name_digest(path))
    if on_hub and _ID.fullmatch(path):
        return Teacher(path, on_hub=True, **facts)
    return Teacher(_last(path), **facts)


def _card_of(path: str) -> ModelCardData | None:
    """The metadata of a teacher's README.md, of its folder or of the Hub's cache; nothing is downloaded."""
    if not path:
        return None
    readme: Any = Path(path).expanduser() / "README.md"
    if not readme.is_file() and _ID.fullmatch(path):
        readme = try_to_load_from_cache(path, "README.md")
    if not isinstance(readme, str | Path) or not Path(readme).is_file():
        return None
    try:
        if not Path(readme).read_text(encoding="utf-8").startswith("---"):
            return None  # no metadata; the Hub's library would warn
        return ModelCard.load(Path(readme), ignore_metadata_errors=True).data
    except (ValueError, OSError, yaml.YAMLError):  # somebody else's file
        return None


def _licence(card: ModelCardData | None) -> dict[str, str]:
    said = {key: card.get(key) for key in ("license", "license_name", "license_link")} if card else {}
    return {key: str(value) for key, value in said.items() if value} if said.get("license") else {}


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without where things lie on this machine: of an absolute path its last part, and no run_dir."""
    cut = {key: value for key, value in recipe.items() if key != "run_dir"}
    if path := recipe.get("teacher", {}).get("path"):
        cut["teacher"] = recipe["teacher"] | {"path": _anonymous(path)}
    if source := recipe.get("data", {}).get("source"):
        named = _anonymous(source) if isinstance(source, str) else [_anonymous(one) for one in source]
        cut["data"] = recipe["data"] | {"source": named}
    return cut


def _anonymous(path: str) -> str:
    """A path that leads out of the current folder becomes its last part; ids and paths within stay."""
    cached = _CACHED.search(f"{path}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return _last(path) if path.startswith(("/", "~", "..")) or os.path.isabs(path) else path


def _last(path: str) -> str:
    return Path(path.rstrip("/")).name
