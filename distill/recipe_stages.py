"""The stages of a recipe: what each of them may say, and the training settings that they share."""

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.recipe_evaluation import KeepBest, StopEarly
from distill.recipe_fields import (
    Beta,
    Count,
    Flag,
    Fraction,
    Integer,
    NotNegative,
    Positive,
    Section,
    Some,
    Tokens,
)

Role = Literal["mixer", "attention", "norms", "mlp", "embeddings", "head", "connector", "vision"]
StageName = Literal["mixing", "hidden", "logits"]
Step = Literal["convert"] | StageName
ROLES: tuple[Role, ...] = get_args(Role)
TEXT_ROLES: tuple[Role, ...] = tuple(role for role in ROLES if role not in ("connector", "vision"))
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)


class Training(Section):
    """What every stage says about its training."""

    tokens: Tokens
    """Tokens to train on, as a number or such as 100K, 1.5M, 2B."""
    block: Annotated[Integer, Field(ge=2)] | None = None
    """Tokens a sequence, where this stage reads shorter ones: a divisor of data.block; null for data.block."""
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
    keep_best: KeepBest | None = None
    """Hand on the weights of the best step instead of the last, such as {metric: kl}; the start does not count."""
    stop_early: StopEarly | None = None
    """End where nothing gets better any more, such as {metric: kl, patience: 3}."""

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

    target: Literal["mixer", "block", "heads"] = "mixer"
    """mixer: its output against attention's; block: the layer's; heads: what the output projections read (mmMamba)."""
    train: Annotated[tuple[Literal["mixer", "norms", "mlp"], ...], Some] = ("mixer",)
    """The roles that are trained; with target: mixer or heads only mixer."""
    projections_frozen: Fraction = 0.0
    """The first part of the steps, in which a mixer's projections to x, B and C do not train (mmMamba's stage 1)."""

    @field_validator("train")
    @classmethod
    def _within_target(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        target = info.data.get("target")
        if target in ("mixer", "heads") and value != ("mixer",):
            raise ValueError(f"must be [mixer] with target: {target} (target: block reaches norms and mlp too)")
        return value

    @model_validator(mode="after")
    def _frozen_is_frozen(self) -> "HiddenStage":
        if self.projections_frozen and self.weight_decay:
            raise ValueError(
                f"projections_frozen needs weight_decay: 0, not {self.weight_decay:g}: what is frozen shares a matrix"
                " with what trains, and would shrink"
            )
        if self.projections_frozen and "norms" in self.train:
            raise ValueError("projections_frozen stops the gradient that norms train by; leave norms out of train")
        return self


class OfflineTeacher(Section):
    """The teacher's predictions, read from disk where `stages.cache` wrote them."""

    top_k: Annotated[Count, Field(le=255)] = 64
    """Tokens kept at each position, the likeliest; all others are kept as one probability."""


class Stepwise(Section):
    """Layers give way to their mixers one part after another, instead of all at once."""

    at: Annotated[tuple[Fraction, ...], Some]
    """When each part's turn begins, in shares of the stage's steps, such as [0.0, 0.2, 0.4, 0.6] for quarters."""
    ramp: Fraction = 0.0
    """How long a turn takes, in which the mixer's output is mixed with attention's; 0 for at once."""

    @model_validator(mode="after")
    def _in_time(self) -> "Stepwise":
        if list(self.at) != sorted(self.at):
            raise ValueError(f"at must rise from each part to the next, not {list(self.at)}")
        if self.at[-1] + self.ramp >= 1:
            raise ValueError(
                "the last of at, and ramp with it, must be less than 1, or the student is never trained whole:"
                f" {self.at[-1]:g} + {self.ramp:g} is {self.at[-1] + self.ramp:g}"
            )
        return self


class LogitsStage(Training):
    """Stage 3: the whole student is matched to the teacher's next-token distribution."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The distance between the two distributions."""
    temperature: Positive = 1.0
    """Both distributions are softened by it."""
    ce_weight: Fraction = 0.0
    """The share of the plain next-token loss."""
    hidden_weight: NotNegative = 0.0
    """Adds so many times the distances of changed layers to the teacher's, each fed the teacher's input (MaTVLM)."""
    gradient_checkpointing: Flag = False
    """Compute each layer's forward again in backward: a third more time, and one layer's activations in memory."""
    stepwise: Stepwise | None = None
    """Let layers keep the teacher's attention until their turn, such as {at: [0.0, 0.3]}; null for no layer."""
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

    @model_validator(mode="after")
    def _attention_at_hand(self) -> "LogitsStage":
        if self.stepwise and self.offline_teacher:
            raise ValueError("stepwise needs the teacher's attention, which offline_teacher leaves out of memory")
        if self.stepwise and self.hidden_weight:
            raise ValueError("stepwise has layers without a mixer, which hidden_weight would compare; leave one out")
        return self

    @model_validator(mode="after")
    def _hidden_states_at_hand(self) -> "LogitsStage":
        if self.offline_teacher and self.hidden_weight:
            raise ValueError(
                "hidden_weight needs the teacher's hidden states, and offline_teacher keeps its predictions alone;"
                " leave one of them out"
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
