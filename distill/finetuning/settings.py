"""What the recipes of all tuning programs say alike: which model, how its weights are trained, for how long.

A file of its own kind, because what it starts from is a finished model. A distillation's digests say what made a
stage's weights, from the teacher on; tuning comes after all of them, on other data and any number of times, so that it
is no part of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from distill import marked_yaml
from distill.recipe_fields import (
    Beta,
    Count,
    Flag,
    Fraction,
    Integer,
    NotNegative,
    Positive,
    Section,
    Text,
)

# What never changes a result, as in distill.recipe; and what stands in files, which is told by their own digests.
_LABELS = ("name", "run_dir", "device", "model", "reference")
_CADENCE = ("micro_batch_size", "checkpoint_every", "keep_checkpoints")
_FILES = ("source", "chat_template", "start", "path")

# What an adapter to go on with has of its own.
_OF_NEW = ("rank", "alpha", "dropout")


class Adapter(Section):
    """Low-rank adapters on every linear map of the decoder's layers."""

    rank: Count = 16
    """Rows of A and columns of B."""
    alpha: Positive | None = None
    """What B A is scaled by, over the rank (lora, dora) or its square root (rslora); null for twice the rank."""
    dropout: Fraction = 0.0
    """The part of an adapter's inputs that is left out at random."""
    start: Text | None = None
    """An adapter of this model to go on with, instead of a new one; rank, alpha and dropout are its own."""
    merge: Flag = False
    """Write the model with the adapter added to its weights, instead of the adapter alone."""

    @model_validator(mode="after")
    def _start_has_its_own(self) -> "Adapter":
        given = [name for name in _OF_NEW if name in self.model_fields_set]
        if self.start is not None and given:
            raise ValueError(
                f"{', '.join(given)}: of a new adapter, and adapter.start has its own; leave out what is not meant,"
                " such as by adapter={start: ..}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_start_has(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written out may be read back, with no default of a new adapter beside another one."""
        return {key: value for key, value in plain(self).items() if self.start is None or key not in _OF_NEW}


class Tuning(Section):
    """How it is learnt."""

    epochs: Positive = 1.0
    """Times over the data."""
    steps: Count | None = None
    """Optimizer steps, whatever the epochs; null for what the epochs take."""
    batch_size: Count = 16
    """Rows a step."""
    micro_batch_size: Count | None = None
    """Rows a forward pass, for its memory; it divides batch_size; null for all at once."""
    lr: Positive | None = None
    """The peak learning rate; null for what suits the program and the method (docs/finetuning.md)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after the warmup."""
    warmup: Fraction = 0.03
    """The fraction of the steps in which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """AdamW's decay, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip: Positive = 1.0
    """The largest gradient norm."""
    checkpoint_every: Count = 200
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many checkpoints are kept while it runs."""

    @model_validator(mode="after")
    def _divides(self) -> "Tuning":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size: {self.micro_batch_size} must divide batch_size, {self.batch_size}")
        return self


class TuningRecipe(Section):
    """What every tuning says; each program's recipe adds what it learns from, and how."""

    STAGE: ClassVar[str]
    """What the result is called: a folder in run_dir, and the stage of its stage.json."""
    LEARNING_RATES: ClassVar[tuple[float, float]]
    """The peak unless given, of all weights and of adapters."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the run is called; the file's name unless given."""
    run_dir: Path = Field(None, validate_default=True)
    """Where everything is written, relative to the current directory; runs/NAME unless given."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Seeds new adapters, dropout, the order of the data, and what the model itself writes."""
    model: Text
    """A student's folder, such as runs/quickstart/logits; or a teacher's, to compare with."""
    method: Literal["full", "lora", "rslora", "dora", "qlora"] = "lora"
    """full: all weights are trained; the others: adapters (PEFT); qlora: on a model held in 4 bits (bitsandbytes)."""
    adapter: Adapter | None = None
    """Settings of the adapters; null for the defaults."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in; weights stay float32, and float16 scales its loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU when there is one."""
    training: Tuning = Tuning()
    """How it is learnt."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _below_runs(cls, value: object, info: ValidationInfo) -> object:
        return Path("runs", info.data.get("name", "")) if value is None else value

    @model_validator(mode="after")
    def _no_adapter_in_full(self) -> "TuningRecipe":
        if self.method == "full" and self.adapter is not None:
            raise ValueError("adapter is for method: lora, rslora, dora or qlora; leave it out of method: full")
        return self

    @model_validator(mode="after")
    def _no_merge_in_four_bits(self) -> "TuningRecipe":
        if self.method == "qlora" and self.adapter is not None and self.adapter.merge:
            raise ValueError(
                "adapter.merge would round the sum to 4 bits again; leave it out of method: qlora, and add the adapter"
                " to the whole model (peft) or use it beside the model"
            )
        return self

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.training.lr or self.LEARNING_RATES[self.method != "full"]

    def dump(self) -> str:
        """YAML with every default written out, which loads back to an equal recipe."""
        return marked_yaml.write(self.model_dump(mode="json"))

    def digest(self) -> str:
        """sha256 of all settings that can change the result; what stands in files is told by their own digests."""
        content: dict[str, Any] = self.model_dump(mode="json", exclude=set(_LABELS))
        for section, value in content.items():
            if isinstance(value, dict):
                hidden = _CADENCE if section == "training" else _FILES
                content[section] = {key: entry for key, entry in value.items() if key not in hidden}
        told = {section: value for section, value in content.items() if value is not None}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
