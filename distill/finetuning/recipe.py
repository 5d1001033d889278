"""What a fine-tuning recipe may say. A file of its own kind, because what it starts from is a finished model.

A distillation's digests say what made a stage's weights, from the teacher on; tuning comes after all of them, on other
data and any number of times, so that it is no part of them.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

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
    Sources,
    Text,
)
from distill.recipe_file import read_recipe_file

# What never changes a result, as in distill.recipe.
_LABELS = ("name", "run_dir", "device")
_CADENCE = ("micro_batch_size", "checkpoint_every", "keep_checkpoints")
_FILES = ("source", "chat_template", "start")


class Adapter(Section):
    """Low-rank adapters on every linear map of the decoder's layers."""

    rank: Count = 16
    """Rows of A and columns of B."""
    alpha: Positive | None = None
    """What B A is scaled by, over the rank (lora, dora) or its square root (rslora); null for twice the rank."""
    dropout: Fraction = 0.0
    """The part of an adapter's inputs that is left out at random."""
    start: Text | None = None
    """An adapter of this model to go on with, instead of a new one."""
    merge: Flag = False
    """Write the model with the adapter added to its weights, instead of the adapter alone."""


class TuningData(Section):
    """What is learnt from."""

    source: Sources
    """chat: .jsonl or .parquet files, saved datasets or dataset:org/name; text: as in a distillation's recipe."""
    format: Literal["chat", "text"] = "chat"
    """chat: rows of messages, each with a role and content; text: documents."""
    key: Text = Field(None, validate_default=True)
    """The column that holds it; messages or text unless given."""
    separator: Text | None = None
    """What stands between documents in a text file; null for one document a file."""
    chat_template: Text | None = None
    """A Jinja template, or a file of one, that replaces the tokenizer's chat template and is saved with it."""
    assistant_only: Flag = True
    """Score the assistant's tokens alone; of chats only."""
    max_length: Annotated[Integer, Field(ge=2)] = 1024
    """Tokens a row; longer chats are cut, longer texts go on in another row."""
    packing: Flag = True
    """Fill rows with several documents, which do not see one another."""

    @field_validator("key", mode="before")
    @classmethod
    def _by_format(cls, value: object, info: ValidationInfo) -> object:
        return {"text": "text"}.get(info.data.get("format", ""), "messages") if value is None else value

    @model_validator(mode="after")
    def _chats_alone(self) -> "TuningData":
        if self.format == "text" and self.chat_template is not None:
            raise ValueError("chat_template is for format: chat")
        if self.format == "chat" and self.separator is not None:
            raise ValueError("separator is for format: text")
        return self


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
    """The peak learning rate; null for 2e-5 (method: full) or 2e-4 (adapters)."""
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


class FinetuneRecipe(Section):
    """A supervised fine-tuning of one model."""

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What the run is called; the file's name unless given."""
    run_dir: Path = Field(None, validate_default=True)
    """Where everything is written, relative to the current directory; runs/NAME unless given."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Seeds new adapters, dropout and the order of the data."""
    model: Text
    """A student's folder, such as runs/quickstart/logits; or a teacher's, to compare with."""
    method: Literal["full", "lora", "rslora", "dora"] = "lora"
    """full: all weights are trained; the others: adapters (PEFT)."""
    adapter: Adapter | None = None
    """Settings of the adapters; null for the defaults."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in; weights stay float32, and float16 scales its loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU when there is one."""
    data: TuningData
    """What is learnt from."""
    training: Tuning = Tuning()
    """How it is learnt."""

    @field_validator("run_dir", mode="before")
    @classmethod
    def _below_runs(cls, value: object, info: ValidationInfo) -> object:
        return Path("runs", info.data.get("name", "")) if value is None else value

    @model_validator(mode="after")
    def _no_adapter_in_full(self) -> "FinetuneRecipe":
        if self.method == "full" and self.adapter is not None:
            raise ValueError("adapter is for method: lora, rslora or dora; leave it out of method: full")
        return self

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.training.lr or (2e-5 if self.method == "full" else 2e-4)

    def dump(self) -> str:
        """YAML with every default written out, which loads back to an equal recipe."""
        return marked_yaml.write(self.model_dump(mode="json"))

    def digest(self) -> str:
        """sha256 of all settings that can change the result; what stands in files is told by their own digests."""
        content = self.model_dump(mode="json", exclude={*_LABELS, "model"})
        for section, keys in (("training", _CADENCE), ("data", _FILES), ("adapter", _FILES)):
            content[section] = {key: value for key, value in (content[section] or {}).items() if key not in keys}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_finetune_recipe(path: Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Reads and checks a fine-tuning recipe.

    Raises:
        UserError: as ``distill.recipe.load_recipe``.
    """
    return read_recipe_file(FinetuneRecipe, Path(path), overrides, in_order={})
