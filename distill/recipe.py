"""The Recipe: what a YAML file may say about a distillation, from the teacher to the evaluated student.

A recipe is data. Every key has a type, one line of description, and a default where one makes sense. An
unknown key, a wrong type or a wrong value is an error that names the file, the line and the nearest thing
allowed, before anything is loaded. What depends on files and devices is checked by `distill.checks.check`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from distill import marked_yaml
from distill.recipe_data import Data
from distill.recipe_evaluation import HELD_OUT, Evaluation, measured_in_training
from distill.recipe_fields import (
    Count,
    Distinct,
    Flag,
    Fraction,
    Integer,
    Layer,
    Positive,
    Section,
    Some,
    Text,
    Tokens,
)
from distill.recipe_file import read_recipe_file
from distill.recipe_stages import (
    ROLES,
    STAGE_NAMES,
    TEXT_ROLES,
    HiddenStage,
    LayerwiseTraining,
    LogitsStage,
    MixingStage,
    OfflineTeacher,
    Stage,
    StageName,
    Stages,
    Step,
    Stepwise,
)
from distill.schema_errors import nearest

__all__ = [
    "ROLES",
    "STAGE_NAMES",
    "TEXT_ROLES",
    "Calibrate",
    "Data",
    "HiddenStage",
    "Keep",
    "LayerwiseTraining",
    "LogitsStage",
    "MixingStage",
    "OfflineTeacher",
    "Recipe",
    "Stage",
    "StageName",
    "Step",
    "Stepwise",
    "Student",
    "load_recipe",
]

# What never changes a result: labels and places of a recipe, how a step is cut up, how often a stage looks and saves.
_LABELS = ("name", "run_dir", "device", "trackers")
_HARMLESS = (("data", "workers"), ("student", "exportable"))
_CUT = ("micro_batch_size", "parallel", "gradient_checkpointing")
_CADENCE = ("eval_every", "checkpoint_every", "keep_checkpoints")
# What does, where it is given.
_DECIDING = ("keep_best", "stop_early")

# Keys that came after runs had been made, each with the value that means what was so before. With that value it is left
# out: counted, it would change the digests that older runs have in their folders, and none could go on. Whatever key is
# added to `data`, `student` or `evaluation` belongs here.
_LATER: Mapping[tuple[str, str], object] = {
    ("data", "training_only"): [],
    ("data", "train_on_source"): True,
    ("evaluation", "tasks"): [],
    ("student", "calibrate"): None,
    ("student", "expand"): 1,
    ("student", "window_layers"): [],
    ("student", "keep_heads"): {},
}
# The same where no layer has a window; where one has, these were there from the start, null among their values.
_WINDOW = ("window", "sinks")

Heads = Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Some, Distinct]
Misplaced = tuple[tuple[str | int, ...], object, str]
"""A key of the recipe, what it says, and what is wrong with that."""


class Teacher(Section):
    """The pretrained Transformer to distil."""

    path: Annotated[Text, AfterValidator(os.path.expanduser)]
    """A local Hugging Face folder, or the id of a model on the Hub (org/name)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The precision the frozen teacher runs in, whatever the student's; on a GPU bfloat16 is several times as fast."""


class Keep(Section):
    """Which layers keep their attention, said in exactly one of four ways; a plain list means `layers`."""

    layers: Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Distinct] | None = None
    """Indices of the layers, from 0."""
    pattern: Text | None = None
    """A letter a layer, repeated to the model's depth: m for a mixer, a for attention, such as "m m m a"."""
    ratio: Fraction | None = None
    """The fraction of the layers, spread evenly."""
    count: Annotated[Integer, Field(ge=0)] | None = None
    """The number of layers, spread evenly."""

    @model_validator(mode="before")
    @classmethod
    def _list_of_layers(cls, value: object) -> object:
        return {"layers": value} if isinstance(value, (list, tuple)) else value

    @model_validator(mode="after")
    def _one_way(self) -> "Keep":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            was = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of layers, pattern, ratio, count; given: {was}")
        return self

    @model_serializer
    def _short(self) -> list[int] | dict[str, object]:
        if self.layers is not None:
            return list(self.layers)
        return {name: value for name, value in self if value is not None}


class Calibrate(Section):
    """What is fitted in closed form after seeding, on training text; see docs/calibration.md."""

    tokens: Tokens = 64_000
    """Training tokens that are looked at, in whole blocks; there is no gradient, so no stage counts them."""
    memories: Flag = True
    """Choose how far each head looks back: the decay whose matrix lies nearest to attention's."""
    outputs: Flag = True
    """Fit the output projections to what attention adds to the stream."""
    layers: Literal["parallel", "sequential"] = "parallel"
    """What the mixers read meanwhile: the teacher's states, or their own, each layer after those below it."""
    ridge: Positive = 1e-3
    """How strongly the seeded output projections are held on to, relative to the size of what they read."""

    @model_validator(mode="after")
    def _something(self) -> "Calibrate":
        if not self.memories and not self.outputs:
            raise ValueError("memories and outputs are both false; leave calibrate out")
        return self


_SETTINGS = (
    "mixer",
    "keep_heads",
    "expand",
    "state_dim",
    "conv_width",
    "rope",
    "bidirectional",
    "window_layers",
    "window",
    "sinks",
)


class Student(Section):
    """What the teacher is turned into."""

    mixer: Literal["mamba2", "discrete_mamba2", "gated_deltanet", "based", "hedgehog", "sliding_window"] = "mamba2"
    """What stands where attention stood: Mamba-2, MOHAWK's, Gated DeltaNet, BASED, Hedgehog or a window."""
    keep_attention: Keep = Keep(layers=())
    """The layers that keep attention: a list of indices, {pattern: ..}, {ratio: ..} or {count: ..}."""
    keep_heads: dict[Layer, Heads] = Field(default={})
    """Single query heads that keep attention beside their layer's mixer, by layer, such as {3: [0, 2]}."""
    seed_from_attention: Flag = True
    """Start the mixers from the teacher's attention weights instead of at random."""
    from_scratch: Flag = False
    """Start the whole student at random, mixers or not: a baseline that learns from the text alone."""
    expand: Count = 1
    """Heads of the mixer for each of attention's, which differ at the start in how far they look back."""
    state_dim: Count | None = None
    """Numbers of state for each channel of a head (based: of a query); null for the teacher's heads' (at most 16)."""
    conv_width: Count = 4
    """Positions the mixers' short convolution looks at."""
    bidirectional: Literal["refuse", "causal"] = "refuse"
    """For teachers that read images in both directions (PaliGemma, Gemma 3): causal lets mixers read them one way."""
    exportable: Literal["granite", "bamba", "gguf"] | None = None
    """A format that `distill export` must be able to write the student in, checked before the run; null for any."""
    window_layers: Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], Distinct] = ()
    """Layers, from 0, with attention behind a window, the teacher's at the start, beside the mixer's (BASED, Samba)."""
    window: Count | None = None
    """For sliding_window and window_layers: the latest tokens that a layer sees, and remembers; null for 64."""
    sinks: Annotated[Integer, Field(ge=0)] | None = None
    """For sliding_window and window_layers: the first tokens of a document that it sees besides; null for 4."""
    rope: Literal["drop", "keep"] = "drop"
    """keep: B and C (k and q) carry the teacher's rotary positions, as its keys and queries do; drop: they do not."""
    calibrate: Calibrate | None = None
    """Fit what was seeded to the teacher's attention on some text, such as {tokens: 64K}; null: leave it as seeded."""

    def settings(self) -> dict[str, Any]:
        """What ``distill.conversion.plan`` takes besides the teacher and the layers that keep attention."""
        return {name: getattr(self, name) for name in _SETTINGS}

    @field_validator("calibrate")
    @classmethod
    def _can_be_calibrated(cls, value: Calibrate | None, info: ValidationInfo) -> Calibrate | None:
        if value is None:
            return None
        if info.data.get("mixer") == "sliding_window":
            raise ValueError("not for sliding_window, whose layers are the teacher's attention, output projection too")
        if info.data.get("mixer") == "based" and value.memories:
            raise ValueError("not for based, which forgets nothing and has no memories to choose; give memories: false")
        if info.data.get("from_scratch"):
            raise ValueError("not with from_scratch, which takes nothing from the teacher")
        return value


class Recipe(Section):
    """A distillation, from the teacher to the evaluated student."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the run is called; the file's name unless given."""
    run_dir: Path = Field(None, validate_default=True)
    """Where everything is written, relative to the current directory; runs/NAME unless given."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Seeds the conversion and the order of the data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The precision the student trains in; bfloat16 computes in it and keeps float32 weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU when there is one."""
    teacher: Teacher
    """The pretrained Transformer to distil."""
    student: Student = Student()
    """What the teacher is turned into."""
    data: Data
    """The text that all stages train on."""
    stages: Stages
    """What is trained: any of mixing, hidden, logits, in this order."""
    evaluation: Evaluation = Evaluation()
    """How the student is measured."""
    trackers: Annotated[tuple[Literal["tensorboard"], ...], Distinct] = ()
    """Where metrics go besides metrics.jsonl."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _below_runs(cls, value: object, info: ValidationInfo) -> object:
        return Path("runs", info.data.get("name", "")) if value is None else value

    @field_validator("stages")
    @classmethod
    def _nothing_to_align(cls, value: Stages, info: ValidationInfo) -> Stages:
        student = info.data.get("student")
        if student is None or not student.from_scratch:
            return value
        if set(value.named()) != {"logits"} or value.logits.ce_weight != 1:  # type: ignore[union-attr]
            raise ValueError(
                "student.from_scratch leaves nothing of the teacher to match; name logits alone, with ce_weight: 1"
            )
        return value

    @model_validator(mode="after")
    def _measured(self) -> "Recipe":
        problems = [*self._tasks_out_of_place(), *self._metrics_without_measure()]
        if problems:
            # Each at its own key, so that the message has its line.
            raise ValidationError.from_exception_data(
                "Recipe",
                [
                    InitErrorDetails(type="value_error", loc=key, input=given, ctx={"error": ValueError(text)})
                    for key, given, text in problems
                ],
            )
        return self

    def _tasks_out_of_place(self) -> Iterator[Misplaced]:
        """Tasks after stages that do not run, and two of one name whose numbers would be taken for each other."""
        there = ("convert", *self.stages.named(), "end")
        taken: set[tuple[str, str, str]] = set()
        for index, task in enumerate(self.evaluation.tasks):
            for stage in task.after or ():
                if stage not in there:
                    yield ("evaluation", "tasks", index, "after"), stage, f"must be one of {', '.join(there)}"
            mine = {(task.kind, task.name, use) for use in ("every", "after") if getattr(task, use)}
            if mine & taken:
                yield (
                    ("evaluation", "tasks", index),
                    task.name,
                    "is another task's name; give this one its own",
                )
            taken |= mine

    def _metrics_without_measure(self) -> Iterator[Misplaced]:
        for name, stage in self.stages.named().items():
            measured = self.measured_in(name)
            for choice in ("keep_best", "stop_early"):
                metric = getattr(getattr(stage, choice), "metric", None)
                if metric is not None and metric not in measured:
                    near = nearest(metric, list(measured)) or f"; give stages.{name}.eval_every" * (metric in HELD_OUT)
                    allowed = ", ".join(measured) or "nothing; give eval_every, or a task of evaluation.tasks every"
                    text = f"is not measured while this stage trains{near} (measured: {allowed})"
                    yield ("stages", name, choice, "metric"), metric, text

    def measured_in(self, stage: StageName) -> dict[str, int]:
        """Every metric that is measured again and again while a stage trains, with its steps between."""
        settings = self.stages.named()[stage]
        offline = isinstance(settings, LogitsStage) and settings.offline_teacher is not None
        return measured_in_training(self.evaluation.in_training(), settings.eval_every, offline=offline)

    def block_of(self, stage: Stage) -> int:
        """Tokens a training sequence of one of its stages."""
        return stage.block or self.data.block

    def dump(self) -> str:
        """YAML with every default written out, which loads back to an equal recipe."""
        return marked_yaml.write(self._plain())

    def digest(self) -> str:
        """sha256 of all that can change the result: not names, places, devices and how often to save."""
        return _sha256(self._content(STAGE_NAMES))

    def stage_digest(self, stage: Step) -> str:
        """sha256 of what can change the weights that `stage` ends with: itself and all that comes before."""
        content = self._content(STAGE_NAMES[: STAGE_NAMES.index(stage) + 1] if stage != "convert" else ())
        content.pop("evaluation")
        return _sha256(content)

    def _plain(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json")
        plain["stages"] = {name: stage for name, stage in plain["stages"].items() if stage is not None}
        return plain

    def _content(self, stages: Sequence[StageName]) -> dict[str, Any]:
        content = self._plain()
        for key in _LABELS:
            content.pop(key)
        for section, key in _HARMLESS:
            content[section].pop(key)
        for (section, key), default in _LATER.items():
            if content[section][key] == default:
                content[section].pop(key)
        if self.student.mixer != "sliding_window" and not self.student.window_layers:
            for key in _WINDOW:
                content["student"].pop(key)
        content["stages"] = {
            name: {key: value for key, value in stage.items() if key not in (*_CUT, *_CADENCE, *_DECIDING)}
            | self._decided(name)
            for name, stage in content["stages"].items()
            if name in stages
        }
        return content

    def _decided(self, stage: StageName) -> dict[str, Any]:
        """What a stage's choice among its steps depends on, if it makes one: then also how and when it looks."""
        settings = self.stages.named()[stage]
        choices = {key: choice for key in _DECIDING if (choice := getattr(settings, key)) is not None}
        metrics = {choice.metric for choice in choices.values()}
        looks: dict[str, Any] = {metric: self.measured_in(stage)[metric] for metric in sorted(metrics)}
        tasks = [task for task in self.evaluation.in_training() if metrics & set(task.metrics())]
        if metrics & set(HELD_OUT):
            looks["tokens"] = self.evaluation.tokens
        looks |= {task.name: task.model_dump(mode="json", exclude={"after", "batch_size"}) for task in tasks}
        told: dict[str, Any] = {key: choice.model_dump(mode="json") for key, choice in choices.items()}
        return told | {"decided_by": looks} if told else {}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe file.

    Args:
        path: a YAML file.
        overrides: settings that replace the file's, such as ``"stages.logits.tokens=300M"``.

    Raises:
        UserError: the file cannot be read, or says something that is not allowed; all problems are listed.
    """
    return read_recipe_file(Recipe, Path(path), overrides, in_order={("stages",): STAGE_NAMES})


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
