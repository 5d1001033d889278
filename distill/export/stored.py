"""A student's folder, read tensor by tensor in its own names."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from distill.errors import UserError
from distill.weight_files import shards_of

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def read_student_config(folder: Path) -> PreTrainedConfig:
    """The config of a student.

    Raises:
        UserError: the folder holds another model.
    """
    import distill.student  # noqa: F401  registers the classes

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "distill", None) is None:
        raise UserError(f"{folder} holds a {config.model_type} model, not a student; convert it first")
    return config


@contextmanager
def open_weights(folder: Path, names: Collection[str]) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """The stored tensors of these names, each behind a call that reads it.

    Raises:
        UserError: the folder has no weights, or not all.
    """
    with ExitStack() as files:
        readers: dict[str, Callable[[], Tensor]] = {}
        for path in shards_of(folder):
            file: Any = files.enter_context(safe_open(path, framework="pt"))
            readers |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        missing = [name for name in names if name not in readers]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{folder} lacks weights of its model: {missing[0]}{more}")
        yield {name: readers[name] for name in names}


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER)
