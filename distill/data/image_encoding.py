"""What a family's processor makes of image-text rows: which text it reads, which tokens are answers, and batches.

A chat template writes a conversation as text, the processor puts as many placeholders as an image has features in the
place of each image, and the vision tower's features replace these in the model. All that the processor returns goes to
the model: without ``mm_token_type_ids`` or ``token_type_ids`` some families silently read images as text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill.data.blocks import IGNORED
from distill.data.image_rows import MARK, ImageRow, Kind, parts_of
from distill.errors import UserError

Score = Literal["answers", "text", "all"]
_FOR_MODELS_ONLY = ("labels", "attention_mask")


@dataclass(frozen=True)
class Encoded:
    """A row as the processor reads it: small enough to be kept for all rows, where pixels are not.

    Attributes:
        text: with the family's own marks where images stand.
        answer: what follows a prompt, in families whose processor takes it apart (PaliGemma).
        images: the files.
        n_tokens: placeholders of images included.
        answers: where in them the answers lie, as (first, behind the last).
    """

    text: str
    answer: str
    images: tuple[str, ...]
    n_tokens: int
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ImageEncoder:
    """A processor and how rows of one kind go through it.

    Attributes:
        processor: of a vision-language family.
        kind: of all rows.
        image_token_id: the placeholder of a feature.
    """

    processor: Any
    kind: Kind
    image_token_id: int

    def encode(self, row: ImageRow) -> Encoded:
        """Find out how long a row is and where its answers are.

        Raises:
            UserError: naming the row: its kind is another, the processor refuses it, or its answers cannot be found.
        """
        if row.kind != self.kind:
            raise UserError(f"{row.where}: has {row.kind} where the rows before have {self.kind}; give one kind")
        if self.takes_answers and row.kind != "prompt":
            name = type(self.processor).__name__
            raise UserError(f"{row.where}: has {row.kind}; {name} reads all but answers in both directions: give these")
        with _about(row.where):
            if row.kind == "messages":
                return self._conversation(row)
            text = row.content.replace(MARK, image_mark(self.processor))
            images = tuple(map(str, row.images))
            if row.kind == "text":
                n_tokens = len(self._ids(text, "", images))
                return Encoded(text, "", images, n_tokens, ((0, n_tokens),))
            answer = row.answer if self.takes_answers else ""
            whole = text if self.takes_answers else text + row.answer + self.processor.tokenizer.eos_token
            # A prompt alone is as long as in front of its answer, since an answer given apart leaves it as it is.
            n_prompt, n_tokens = len(self._ids(text, "", images)), len(self._ids(whole, answer, images))
            return Encoded(whole, answer, images, n_tokens, ((n_prompt, n_tokens),))

    @property
    def takes_answers(self) -> bool:
        """Whether answers are given to the processor apart from the prompt (``suffix``)."""
        return type(self.processor).__name__ == "PaliGemmaProcessor"

    def batch(self, rows: Sequence[Encoded], score: Score) -> dict[str, Tensor]:
        """What models are called with, and ``labels`` (B, T) and ``valid`` (B, T) bool; T is the longest row's.

        Args:
            rows: padded on the right.
            score: which labels are not -100: the answers; all text; or image placeholders too.

        Raises:
            UserError: an image can no longer be read, or the processor makes another length of a row than before.
        """
        with _about(", ".join(image for row in rows for image in row.images) or "these rows"):
            made = _processed(self.processor, rows)
        inputs = {name: tensor for name, tensor in made.items() if name not in _FOR_MODELS_ONLY}
        valid_BT = made["attention_mask"].bool()
        for row, n_tokens in zip(rows, valid_BT.sum(1).tolist(), strict=True):
            if n_tokens != row.n_tokens:
                raise UserError(
                    f"{', '.join(row.images) or row.text[:40]!r}: {n_tokens} tokens, {row.n_tokens} when the data was"
                    " prepared; an image changed its size: remove the data folder to prepare it again"
                )
        scored_BT = valid_BT.clone()
        if score == "answers":
            scored_BT = torch.zeros_like(valid_BT)
            for index, row in enumerate(rows):
                for first, last in row.answers:
                    scored_BT[index, first:last] = True
        if score != "all":
            scored_BT &= ~self._is_image(made)
        labels_BT = torch.where(scored_BT, made["input_ids"], IGNORED)
        labels_BT[:, 0] = IGNORED
        return {**inputs, "labels": labels_BT, "valid": valid_BT}

    def _is_image(self, made: Any) -> Tensor:
        return made["input_ids"] == self.image_token_id

    def _conversation(self, row: ImageRow) -> Encoded:
        images = tuple(map(str, row.images))
        text = self._template(row.content)
        ids, answers = self._ids(text, "", images), list[tuple[int, int]]()
        for index, message in enumerate(row.content):
            if message["role"] != "assistant":
                continue
            spans = []
            for upto, opens in ((index, True), (index + 1, False)):
                part = self._template(row.content[:upto], opens=opens)
                part_ids = self._ids(part, "", images[: _n_images(row.content[:upto])])
                if ids[: len(part_ids)] != part_ids:
                    raise UserError(
                        "the chat template does not write the beginning of a conversation as it writes it alone, so its"
                        " answers cannot be found; use data.images.score: text"
                    )
                spans.append(len(part_ids))
            answers.append((spans[0], spans[1]))
        if not answers:
            raise UserError("no message of the assistant; give one to learn from")
        return Encoded(text, "", images, len(ids), tuple(answers))

    def _template(self, messages: Any, *, opens: bool = False) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)

    def _ids(self, text: str, answer: str, images: tuple[str, ...]) -> list[int]:
        row = Encoded(text, answer, images, 0, ())
        return _processed(self.processor, [row])["input_ids"][0].tolist()


def prompt_inputs(processor: Any, prompt: str, images: Sequence[Path]) -> dict[str, Tensor]:
    """What ``generate`` is called with for a question about images, which stand in front of it.

    Through the chat template where the processor has one; a prompt with ``<image>`` marks says itself where they stand.

    Raises:
        UserError: an image cannot be read, or the processor refuses them.
    """
    marked = prompt if MARK in prompt else MARK * len(images) + prompt
    with _about(f"the prompt {prompt!r:.40}"):
        if processor.chat_template:
            asked = [{"role": "user", "content": parts_of(marked)}]
            text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        else:
            text = marked.replace(MARK, image_mark(processor))
        made = _processed(processor, [Encoded(text, "", tuple(map(str, images)), 0, ())])
    return {name: tensor for name, tensor in made.items() if name != "labels"}


def image_mark(processor: Any) -> str:
    """What stands for one image in a text that the processor is given."""
    if hasattr(processor, "boi_token"):
        return str(processor.boi_token)
    mark = str(processor.image_token)
    tokens = processor.tokenizer.get_added_vocab()
    return f"<|vision_start|>{mark}<|vision_end|>" if "<|vision_start|>" in tokens and "|" in mark else mark


def _processed(processor: Any, rows: Sequence[Encoded]) -> Any:
    """All that the processor makes of rows, padded on the right."""
    pictures = [[read_image(Path(image)) for image in row.images] for row in rows]
    answers = {"suffix": [row.answer for row in rows]} if any(row.answer for row in rows) else {}
    bos = processor.tokenizer.bos_token
    return processor(
        text=[row.text for row in rows],
        images=pictures if any(pictures) else None,
        padding=True,
        padding_side="right",
        # A template that writes the BOS itself must not get a second one, as in transformers' apply_chat_template.
        add_special_tokens=not (bos and rows[0].text.startswith(bos)),
        return_tensors="pt",
        **answers,
    )


def read_image(path: Path) -> Any:
    """The image as Pillow has it, in three channels.

    Raises:
        UserError: Pillow is missing, or cannot read it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError(
            "images are read with Pillow, which is not installed: pip install 'distill-ssm[vision]'"
        ) from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises what its formats raise
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _n_images(messages: Sequence[Any]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


@contextmanager
def _about(where: str) -> Iterator[None]:
    """What goes wrong inside is about that row."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # processors raise what they like, such as a wrong number of images
        raise UserError(f"{where}: the processor refuses it: {str(error).strip() or type(error).__name__}") from error
