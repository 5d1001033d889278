"""The weights of a Hugging Face folder, read piece by piece from memory-mapped files."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError
from distill.weight_files import shards_of
from distill.weight_names import Renamed


class StoredWeights:
    """Read rows of single tensors; nothing is kept in memory.

    Args:
        folder: a local folder, or the id of a model on the Hub, which is downloaded.
        prefix: of the names in the model; a checkpoint of the bare decoder lacks it.
        renamed: what the model calls a tensor of the folder (``distill.weight_names``), where it is not the same.
    """

    def __init__(self, folder: str | Path, prefix: str, renamed: Callable[[str], Renamed] | None = None) -> None:
        local = Path(folder)
        if not local.is_dir():
            local = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))
        self.folder, self.prefix = local, f"{prefix}."
        self._renamed = renamed or _as_it_is
        self._open = ExitStack()

    def rows(self, names: Sequence[str], shape: tuple[int, ...], rows: slice) -> Tensor:
        """Some rows of a tensor, on the CPU, in the dtype of the file.

        Args:
            names: what the model calls it; tied weights have several names, of which the file has one at least.
            shape: of the whole tensor.
            rows: along its first dimension.

        Raises:
            UserError: the folder lacks it, or has it in another shape.
        """
        stored = next((found for name in names if (found := self._slices.get(name.removeprefix(self.prefix)))), None)
        if stored is None:
            raise UserError(f"{self.folder} lacks weights of its model: {names[0]}")
        if tuple(stored.get_shape()) != shape:
            raise UserError(f"{self.folder} has {names[0]} in shape {stored.get_shape()}, not {list(shape)}")
        return stored[rows]

    @cached_property
    def _slices(self) -> dict[str, Any]:
        opened: dict[str, Any] = {}
        for path in shards_of(self.folder):
            file = self._open.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118
                own, is_part = self._renamed(name)
                if not is_part:
                    opened[own.removeprefix(self.prefix)] = file.get_slice(name)
        return opened


def _as_it_is(name: str) -> Renamed:
    return name, False
