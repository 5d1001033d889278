"""A run directory as its report reads it; nothing here needs a model.

RUN_DIR/
  recipe.yaml               the resolved recipe
  teacher/evaluation.json   the teacher alone on the held-out text (may be missing)
  convert/                  the student as converted
    conversion.json         layers, state and cache sizes (distill.conversion.Report)
    stage.json  evaluation.json  matrices.npz
  mixing/ hidden/ logits/   the student after each stage
    stage.json              tokens, seconds, versions (distill.handover)
    metrics.jsonl           one line per training step or evaluation (distill.training.tracking)
    evaluation.json  matrices.npz    (distill.evaluation_record)
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.errors import UserError
from distill.evaluation import recovered_share
from distill.evaluation_record import Evaluation, MatrixPair, read_evaluation, read_matrices

CONVERT = "convert"
NOT_MEASURED = ("kind", "step", "tokens", "tokens_per_second", "cpu_seconds", "seconds", "lr", "grad_norm")

Fields = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage directory; whatever is not there yet is empty or None.

    Attributes:
        tokens, seconds: spent on training in this stage.
        kept_step: whose weights were handed on, where that was not the last step (``keep_best``).
        versions: of the software that ran it.
        training: (tokens seen in this stage, training loss), in order.
        held_out: (tokens seen in this stage, what was measured then), in order.
    """

    name: str
    evaluation: Evaluation | None = None
    matrices: list[MatrixPair] = field(default_factory=list)
    tokens: int | None = None
    seconds: float | None = None
    kept_step: int | None = None
    versions: Fields = field(default_factory=dict)
    training: list[tuple[float, float]] = field(default_factory=list)
    held_out: list[tuple[float, Fields]] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """What a table calls this point of the run."""
        return "after conversion" if self.name == CONVERT else f"after {self.name}"


@dataclass(frozen=True)
class Memory:
    """Bytes one sequence holds at inference: a fixed state, and a cache that grows with every token."""

    state_bytes: int
    kv_bytes_per_token: int
    teacher_kv_bytes_per_token: int

    def student(self, tokens: float) -> float:
        return self.state_bytes + tokens * self.kv_bytes_per_token

    def teacher(self, tokens: float) -> float:
        return tokens * self.teacher_kv_bytes_per_token


@dataclass(frozen=True)
class RunRecord:
    """Everything the report is made from.

    Attributes:
        recipe_text: recipe.yaml as written; ``recipe`` the same, parsed.
        stages: the stages found, in the order they ran, conversion first.
        planned: the names of all stages the recipe asks for, conversion first.
        layers: one kind a layer, ``"attention"`` or the mixer's name; empty where unknown.
        parameters: the student's parameters by role; empty where unknown.
        heads: by layer, the attention heads that are kept beside its mixer.
    """

    folder: Path
    name: str
    recipe_text: str
    recipe: Fields
    teacher: Evaluation | None
    stages: list[Stage]
    planned: list[str]
    layers: list[str]
    parameters: dict[str, int]
    memory: Memory | None
    heads: dict[int, list[int]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """Planned stages without an evaluation."""
        measured = {stage.name for stage in self.measured}
        return [name for name in self.planned if name not in measured]

    @property
    def measured(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.evaluation is not None]

    @property
    def teacher_loss(self) -> float | None:
        """The teacher's loss on the held-out text, from its own evaluation or from the last comparison."""
        if self.teacher is not None:
            return self.teacher.metrics.loss
        losses = [stage.evaluation.metrics.teacher_loss for stage in self.stages if stage.evaluation]
        return next((loss for loss in reversed(losses) if loss is not None), None)

    def recovered(self, stage: Stage) -> float | None:
        """The share of the gap opened by conversion that is closed after ``stage``."""
        start = next((s.evaluation for s in self.stages if s.name == CONVERT), None)
        if stage.evaluation is None or start is None or self.teacher_loss is None:
            return None
        return recovered_share(self.teacher_loss, start.metrics.loss, stage.evaluation.metrics.loss)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run directory, finished or not.

    Raises:
        UserError: it is no run directory, holds nothing measured yet, or holds a damaged file.
    """
    folder = Path(folder)
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is no run directory (recipe.yaml is missing); give the run_dir of a recipe")
    recipe_text = path.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(recipe_text)
        planned = [CONVERT, *(recipe.get("stages") or {})]
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path}: is no recipe; this file is written by a run and not meant to be edited") from error
    stages = [_read_stage(folder / name) for name in _stage_names(folder, planned)]
    if not any(stage.evaluation for stage in stages):
        raise UserError(f"{folder}: no stage has been evaluated yet; run the recipe first")
    conversion = _read_json(folder / CONVERT / "conversion.json")
    return RunRecord(
        folder=folder,
        name=str(recipe.get("name") or folder.name),
        recipe_text=recipe_text,
        recipe=recipe,
        teacher=read_evaluation(folder / "teacher"),
        stages=stages,
        planned=planned,
        layers=[str(kind) for kind in conversion.get("layers", [])],
        parameters=conversion.get("parameters_after", {}),
        memory=_memory(conversion),
        heads={int(layer): heads for layer, heads in conversion.get("heads", {}).items()},
    )


def _stage_names(folder: Path, planned: list[str]) -> list[str]:
    """Planned stages that exist, then others that were run on top of them."""
    found = sorted(path.parent.name for path in folder.glob("*/stage.json"))
    extra = [name for name in found if name not in planned and not name.startswith(".") and name != "teacher"]
    return [name for name in [*planned, *extra] if (folder / name).is_dir()]


def _read_stage(folder: Path) -> Stage:
    record = _read_json(folder / "stage.json")
    rows = _read_metrics(folder / "metrics.jsonl")
    return Stage(
        name=folder.name,
        evaluation=read_evaluation(folder),
        matrices=read_matrices(folder),
        tokens=record.get("tokens"),
        seconds=record.get("seconds"),
        kept_step=record.get("kept_step"),
        versions=record.get("versions") or {},
        training=[(row["tokens"], _number(row.get("loss"))) for row in rows if row.get("kind") == "train"],
        held_out=[
            (row["tokens"], {key: _number(value) for key, value in row.items() if key not in NOT_MEASURED})
            for row in rows
            if row.get("kind") == "eval"
        ],
    )


def _read_metrics(path: Path) -> list[Fields]:
    """The rows of a metrics.jsonl; a last line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(row | {"tokens": float(row["tokens"])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise UserError(f"{path}:{number}: is no metrics line; the file is damaged") from error
    return rows


def _read_json(path: Path) -> Fields:
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return dict(fields)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run this stage again") from error


def _memory(conversion: Fields) -> Memory | None:
    try:
        return Memory(*(int(conversion[name]) for name in Memory.__dataclass_fields__))
    except KeyError:
        return None


def _number(value: object) -> float:
    """A number of a metrics line; what is missing or no number is NaN, which charts leave out."""
    return float(value) if isinstance(value, (int, float)) else math.nan
