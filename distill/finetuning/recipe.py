"""What a recipe of supervised fine-tuning may say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.finetuning.settings import TuningRecipe
from distill.recipe_fields import Flag, Fraction, Integer, Positive, Section, Sources, Text
from distill.recipe_file import read_recipe_file


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


class Guidance(Section):
    """A teacher beside the data: (1 − weight) · cross entropy + weight · τ² · divergence(teacher ‖ model)."""

    path: Text
    """The teacher's folder; it has the model's tokenizer. Any model's will do, such as the student before tuning."""
    weight: Fraction = 0.5
    """0 is tuning without a teacher, 1 is distillation on the rows of the data."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """As in a distillation's last stage."""
    temperature: Positive = 1.0
    """τ, on both sides of the divergence."""


class FinetuneRecipe(TuningRecipe):
    """A supervised fine-tuning of one model."""

    STAGE: ClassVar[str] = "finetune"
    LEARNING_RATES: ClassVar[tuple[float, float]] = (2e-5, 2e-4)

    data: TuningData
    """What is learnt from."""
    teacher: Guidance | None = None
    """Whose predictions are learnt beside the data, so that less is forgotten; null for the data alone."""


def load_finetune_recipe(path: Path, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Reads and checks a fine-tuning recipe.

    Raises:
        UserError: as ``distill.recipe.load_recipe``.
    """
    return read_recipe_file(FinetuneRecipe, Path(path), overrides, in_order={})
