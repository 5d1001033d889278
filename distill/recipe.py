"""The Recipe: what a YAML file may say about a distillation, from the teacher to the evaluated student.

A recipe is data. Every key has a type, one line of description, and a default where one makes sense. An
unknown key, a wrong type or a wrong value is an error that names the file, the line and the nearest thing
allowed, before anything is loaded. What depends on files and devices is checked by `distill.checks.check`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from distill import marked_yaml
from distill.recipe_data import Data
from distill.recipe_fields import (
    Beta,
    Count,
    Distinct,
    Flag,
    Fraction,
    Integer,
    NotNegative,
    Positive,
    Section,
    Some,
    Text,
    Tokens,
)
from distill.recipe_file import read_recipe_file

Role = Literal["mixer", "attention", "norms", "mlp", "embeddings", "head", "connector", "vision"]
StageName = Literal["mixing", "hidden", "logits"]
Step = Literal["convert"] | StageName
ROLES: tuple[Role, ...] = get_args(Role)
TEXT_ROLES: tuple[Role, ...] = tuple(role for role in ROLES if role not in ("connector", "vision"))
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


# What never changes a result: labels and places of a recipe, how a step is cut up, how often a stage looks and saves.
_LABELS = ("name", "run_dir", "device", "trackers")
_CUT = ("micro_batch_size", "parallel", "gradient_checkpointing")
_CADENCE = ("eval_every", "checkpoint_every", "keep_checkpoints")


class Teacher(Section):
    """The pretrained Transformer to distil."""

    path: Annotated[Text, AfterValidator(os.path.expanduser)]
    """A local Hugging Face folder, or the id of a model on the Hub (org/name)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The precision the frozen teacher runs in."""


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


class Student(Section):
    """What the teacher is turned into."""

    mixer: Literal["mamba2", "discrete_mamba2"] = "mamba2"
    """What stands where attention stood: the standard Mamba-2 layer, or MOHAWK's discrete one."""
    keep_attention: Keep = Keep(layers=())
    """The layers that keep attention: a list of indices, {pattern: ..}, {ratio: ..} or {count: ..}."""
    seed_from_attention: Flag = True
    """Start the mixers from the teacher's attention weights instead of at random."""
    state_dim: Count | None = None
    """Numbers of state for each channel of a head; null for the size of the teacher's heads."""
    conv_width: Count = 4
    """Positions the mixers' short convolution looks at."""
    bidirectional: Literal["refuse", "causal"] = "refuse"
    """For teachers that read images in both directions (PaliGemma, Gemma 3): causal lets mixers read them one way."""


class Training(Section):
    """What every stage says about its training."""

    tokens: Tokens
    """Tokens to train on, as a number or such as 100K, 1.5M, 2B."""
    batch_size: Count = 16
    """Sequences a step, over all processes: the result does not depend on how many there are."""
    micro_batch_size: Count | None = None
    """The most sequences a forward pass takes on a process, for its memory; null for all that fall to it."""
    lr: Positive = 1e-3
    """The peak learning rate."""
    mixer_lr: Positive = Field(None, validate_default=True)
    """The peak learning rate of the mixers; the same as lr unless given."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """The learning rate after the warmup: wsd stays and falls at the end, cosine falls all the way."""
    warmup: Fraction = 0.1
    """The fraction of the steps in which the learning rate rises."""
    decay: Fraction = 0.1
    """The fraction of the steps in which a wsd learning rate falls."""
    min_lr_ratio: Fraction = 0.0
    """The learning rate at the end, as a fraction of the peak."""
    weight_decay: NotNegative = 0.1
    """AdamW's decay, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip: Positive | None = 1.0
    """The largest gradient norm; null for no clipping."""
    eval_every: Count | None = None
    """Steps between evaluations; null for only the start and the end."""
    checkpoint_every: Count = 200
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many checkpoints are kept while the stage runs."""

    @field_validator("mixer_lr", mode="before")
    @classmethod
    def _same_as_lr(cls, value: object, info: ValidationInfo) -> object:
        return info.data.get("lr", 1.0) if value is None else value

    @model_validator(mode="after")
    def _warmup_before_decay(self) -> "Training":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay must be at most 1, not {self.warmup + self.decay:g}")
        return self


class LayerwiseTraining(Training):
    """What the stages say in which layers share nothing."""

    parallel: Literal["data", "layers"] = "data"
    """data: processes share a step's sequences; layers: each trains its own layers on all of them."""


class MixingStage(LayerwiseTraining):
    """Stage 1: each mixer's matrix is matched to the attention matrix of its layer."""

    weight_decay: NotNegative = 0.0
    """None: the rows of a mixer's projection that make values and gate, which this stage never trains, would shrink."""
    form: Literal["unsquared", "squared", "row_normalised"] = "unsquared"
    """A head's distance: the Frobenius norm, its square, or the mean of the rows' relative errors."""
    train: Annotated[tuple[Literal["mixer"], ...], Some] = ("mixer",)
    """The roles that are trained; no other parameter shapes a mixing matrix."""

    @field_validator("weight_decay")
    @classmethod
    def _nothing_shrinks(cls, value: float) -> float:
        if value:
            raise ValueError("must be 0: values and gate share a matrix with what this stage trains, and would shrink")
        return value


class HiddenStage(LayerwiseTraining):
    """Stage 2: each layer's output is matched to the teacher's, given the teacher's input."""

    target: Literal["mixer", "block"] = "mixer"
    """mixer: the mixer's output against attention's; block: the layer's output against the layer's."""
    train: Annotated[tuple[Literal["mixer", "norms", "mlp"], ...], Some] = ("mixer",)
    """The roles that are trained; with target: mixer only mixer."""

    @field_validator("train")
    @classmethod
    def _within_target(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if info.data.get("target") == "mixer" and value != ("mixer",):
            raise ValueError("must be [mixer] with target: mixer (target: block reaches norms and mlp too)")
        return value


class OfflineTeacher(Section):
    """The teacher's predictions, read from disk where `stages.cache` wrote them."""

    top_k: Annotated[Count, Field(le=255)] = 64
    """Tokens kept at each position, the likeliest; all others are kept as one probability."""


class LogitsStage(Training):
    """Stage 3: the whole student is matched to the teacher's next-token distribution."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The distance between the two distributions."""
    temperature: Positive = 1.0
    """Both distributions are softened by it."""
    ce_weight: Fraction = 0.0
    """The share of the plain next-token loss."""
    gradient_checkpointing: Flag = False
    """Compute each layer's forward again in backward: a third more time, and one layer's activations in memory."""
    offline_teacher: OfflineTeacher | None = None
    """Read the teacher's predictions from disk, such as {top_k: 64}; null to run it beside the student."""
    train: Annotated[tuple[Role, ...], Some] = TEXT_ROLES
    """The roles that are trained; a vision-language model's connector and vision tower only when they are named."""

    @model_validator(mode="after")
    def _tail_at_temperature_1(self) -> "LogitsStage":
        if self.offline_teacher and self.temperature != 1:
            raise ValueError(
                f"offline_teacher needs temperature: 1, not {self.temperature:g}: what the kept tail weighs at another"
                " temperature cannot be known"
            )
        return self


Stage = MixingStage | HiddenStage | LogitsStage


class Stages(Section):
    """The stages that run, always in this order; a stage that is not named does not run."""

    mixing: MixingStage | None = None
    """Stage 1: match the mixing matrices."""
    hidden: HiddenStage | None = None
    """Stage 2: match the hidden states."""
    logits: LogitsStage | None = None
    """Stage 3: match the logits."""

    @model_validator(mode="after")
    def _one_at_least(self) -> "Stages":
        if not self.named():
            raise ValueError(f"give at least one of {', '.join(STAGE_NAMES)}")
        return self

    def named(self) -> dict[StageName, Stage]:
        """The stages of this recipe by name, in the order they run."""
        return {name: stage for name in STAGE_NAMES if (stage := getattr(self, name)) is not None}


class Evaluation(Section):
    """How a student is measured against its teacher on the held-out text."""

    tokens: Tokens = 64_000
    """The most held-out tokens to score."""
    batch_size: Count = 16
    """Sequences a forward pass."""
    prompts: tuple[Text, ...] = ()
    """Texts that teacher and student both continue in the report."""
    new_tokens: Count = 48
    """Tokens of a continuation."""


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
        content["data"].pop("workers")
        content["stages"] = {
            name: {key: value for key, value in stage.items() if key not in (*_CUT, *_CADENCE)}
            for name, stage in content["stages"].items()
            if name in stages
        }
        return content


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
