"""What a measuring program works on: a model from its folder, a text cut into batches, questions to recall."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill import student
from distill.data import Blocks, Document, evaluation_batches, prepare, read_documents
from distill.errors import UserError
from distill.recall import Example
from distill.recall.sweep import Surface, drawing
from distill.windowed import windowed
from eval import windows

DEVICES = ("auto", "cpu", "cuda")
# No tokenizer makes tokens this long on average, so this many characters a token are always enough text.
CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True)
class Text:
    """A text and how to cut it; the fields are those of a recipe's ``data`` and ``evaluation``."""

    source: Sequence[str]
    block: int = 1024
    batch_size: int = 8
    tokens: int = 64_000
    text_key: str = "text"
    separator: str | None = None


def load_model(path: str, device: str) -> PreTrainedModel:
    """A student or any other causal language model, in the dtype it was saved in.

    Args:
        path: a Hugging Face folder, or a hub id; with a window behind it (``eval.windows``), a teacher that sees less.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        UserError: there is no such model or device.
    """
    if device not in DEVICES:
        raise UserError(f"--device is {device!r}; allowed are auto, cpu and cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this PyTorch; use auto or cpu")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder = windows.folder_of(path)
    _require_folder(folder)
    try:
        model = student.load_model(folder, dtype="auto", device_map=place)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no causal language model that can be loaded ({_first_line(error)})") from error
    rule = windows.read(path)
    return model if rule is None else windowed(model, rule.layers, window=rule.window, sinks=rule.sinks)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; raises UserError if there is none."""
    path = windows.folder_of(path)
    _require_folder(path)
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: has no tokenizer that can be loaded ({_first_line(error)})") from error


def questions(
    model: PreTrainedModel, path: str, task: str, surface: Surface, *, samples: int, seed: int
) -> Callable[[int, int], list[Example]]:
    """What draws the examples of a recall task for the model at ``path`` (``distill.recall.sweep.drawing``)."""
    tokenizer = load_tokenizer(path) if surface == "text" else None
    vocabulary = model.config.get_text_config().vocab_size
    return drawing(task, surface, samples=samples, seed=seed, vocabulary=vocabulary, tokenizer=tokenizer)


def read_batches(text: Text, path: str) -> list[dict[str, Tensor]]:
    """The first ``text.tokens`` of a text as packed batches (see ``distill.data``) for the model at ``path``.

    Blocks are no longer than the positions the model knows. Every document begins with the tokenizer's BOS where
    it has one, as in training by default.

    Raises:
        UserError: the text or the tokenizer cannot be read, or the text has less than two tokens.
    """
    tokenizer, config = load_tokenizer(path), load_config(path)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or text.block
    documents = _first_documents(text)
    bos = tokenizer.bos_token_id is not None
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "text"
        prepare(documents, documents, tokenizer, prepared, block=2, bos=bos)
        blocks = Blocks(prepared, "held_out", min(text.block, limit))
        return list(evaluation_batches(blocks, text.batch_size, text.tokens))


def _first_documents(text: Text) -> list[Document]:
    """As many documents as hold ``text.tokens`` for certain."""
    documents, characters = [], 0
    for document in read_documents(text.source, text_key=text.text_key, separator=text.separator):
        documents.append(document)
        characters += len(document.text)
        if characters >= CHARACTERS_A_TOKEN * text.tokens:
            break
    return documents


def load_config(path: str) -> PreTrainedConfig:
    """The config of a model folder or hub id; raises UserError if there is none."""
    path = windows.folder_of(path)
    _require_folder(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: has no config that can be read ({_first_line(error)})") from error


def _require_folder(path: str) -> None:
    """Refuse a path that is no model folder, before transformers takes it for the name of a model on the Hub."""
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{path}: has no config.json, so it is no model folder")
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith(("/", ".", "~"))):
        raise UserError(f"{path}: there is no such folder; give a model folder, or a hub id org/name")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
