"""The weights of a Hugging Face folder, read piece by piece from memory-mapped files."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError
from distill.weight_files import shards_of
from distill.weight_names import Part, Renamed


class _Experts:
    """One parameter that the files have in parts; read as safetensors' slices are."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int], Any] = {}
        self.pieces = 1

    def add(self, part: Part, piece: Any) -> None:
        self.parts[part.expert, part.piece], self.pieces = piece, part.pieces

    def get_shape(self) -> list[int]:
        shapes = [self.parts[0, piece].get_shape() for piece in range(self.pieces) if (0, piece) in self.parts]
        experts = len(self.parts) // self.pieces if len(self.parts) % self.pieces == 0 else -1
        return [experts, sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes else [experts]

    def __getitem__(self, rows: slice) -> Tensor:
        chosen = range(len(self.parts) // self.pieces)[rows]
        made = [torch.cat([self.parts[expert, piece][:] for piece in range(self.pieces)]) for expert in chosen]
        first = self.parts[0, 0][:0]
        return torch.stack(made) if made else first.new_empty(0, *self.get_shape()[1:])


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
                found = self._renamed(name)
                own = found.name.removeprefix(self.prefix)
                if found.whole:
                    opened[own] = file.get_slice(name)
                elif found.part is not None:
                    opened.setdefault(own, _Experts()).add(found.part, file.get_slice(name))
        return opened


def _as_it_is(name: str) -> Renamed:
    return Renamed(name)
