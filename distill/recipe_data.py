"""What a recipe says of its data: where the text is, how it is cut up, and whether images stand in it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe_fields import Count, Flag, Integer, MoreSources, Number, Section, Sources, Text, Tokens


class HeldOut(Section):
    """The part of the documents that is never trained on."""

    fraction: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """The fraction of the documents (by: hash) or of the characters (by: tail)."""
    by: Literal["hash", "tail"] = "hash"
    """hash: by the hash of a document's name; tail: the end of the text, cut between two documents."""


class Images(Section):
    """How image-text rows are read."""

    score: Literal["answers", "text", "all"] = "answers"
    """The tokens whose predictions are compared: of answers, of all text, or image placeholders too."""
    processor: dict[Text, Flag | Integer | Number | Text] = Field(default_factory=dict)
    """Settings for the teacher's processor, such as {max_pixels: 401408}."""


class Data(Section):
    """The text that all stages train on."""

    source: Sources
    """python-stdlib, a file, folder or glob, dataset:org/name[:config][:split], or a list of these."""
    training_only: MoreSources = ()
    """More text, named like source: all of it is trained on and none held out, such as what stages.write wrote."""
    train_on_source: Flag = True
    """false: train on training_only alone; of source only what is held out is read."""
    text_key: Text = "text"
    """The column that holds the text in .jsonl, .parquet and datasets."""
    separator: Text | None = None
    """What stands between documents in a text file; null for one document a file."""
    block: Annotated[Integer, Field(ge=2)] = 256
    """Tokens a training sequence."""
    bos: Flag = True
    """Put the tokenizer's beginning-of-sequence token before every document."""
    eos: Flag = False
    """Put the tokenizer's end-of-sequence token after every document."""
    held_out: HeldOut = HeldOut()
    """The split kept for evaluation."""
    streaming: Flag = False
    """Fetch the rows of dataset: sources while they are read, instead of downloading all first."""
    limit: Tokens | None = None
    """Training tokens that are enough, such as 10B; null for all that the source holds."""
    workers: Count = 1
    """Processes that tokenise; more are faster, and the result is the same."""
    images: Images | None = None
    """Read image-text rows from .jsonl or .parquet, such as {score: answers}; null for text. See docs/vision.md."""

    @model_validator(mode="after")
    def _known_beforehand(self) -> "Data":
        if self.images is not None and (self.limit or self.streaming or self.held_out.by == "tail"):
            raise ValueError("images: rows with images know neither limit nor streaming nor held_out: {by: tail}")
        if self.images is not None and self.training_only:
            raise ValueError("images: rows with images know no training_only; put the rows into source")
        if both := sorted(set(self.source) & set(self.training_only)):
            raise ValueError(f"training_only: {both[0]} is in source too, where a part is held out; name it once")
        if not self.train_on_source and (not self.training_only or self.limit is not None):
            raise ValueError("train_on_source: false needs training_only, and no limit, which is source's")
        if self.limit is not None and self.limit < self.block:
            raise ValueError(f"limit: {self.limit} tokens are less than one block of {self.block}")
        if self.held_out.by == "tail" and self.limit is not None:
            raise ValueError("limit stops before the tail is reached; use it with held_out: {by: hash}")
        if self.held_out.by == "tail" and self.streaming:
            raise ValueError(
                "streaming: the length of a stream is not known, so it has no tail; use held_out: {by: hash}"
            )
        return self
