"""What a Hugging Face folder's weight files hold, from their headers alone.

A safetensors file is an 8-byte little-endian length n, n bytes of JSON that give each tensor's dtype, shape
and place, and then the tensors, whose places cover the rest of the file exactly. So a truncated download
shows in the header, before a byte of weights is read.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from distill.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorFacts:
    """A stored tensor: its dtype as safetensors names it (``"F32"``, ``"BF16"``), its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Every tensor of the folder's checkpoint, of one file or of all shards of an index.

    Raises:
        UserError: there are no weights, a shard is missing, or a file is truncated or no safetensors file.
    """
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    shard_of = _shard_of(folder)
    stored = {shard.name: read_header(shard) for shard in shards_of(folder)}
    for name, shard in shard_of.items():
        if name not in stored[shard]:
            raise UserError(f"{folder / shard} lacks {name}, which {_INDEX} places there; download it again")
    return {name: stored[shard][name] for name, shard in shard_of.items()}


def shards_of(folder: Path) -> list[Path]:
    """The files that hold the folder's weights.

    Raises:
        UserError: as ``stored_tensors``.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    shards = sorted(set(_shard_of(folder).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (" .." if len(missing) > 3 else "")
        raise UserError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {names}; download them again")
    return [folder / shard for shard in shards]


def _shard_of(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index says."""
    if not (folder / _INDEX).is_file():
        others = sorted(file.name for suffix in ("bin", "pt", "gguf") for file in folder.glob(f"*.{suffix}"))
        found = f"; it has {', '.join(others[:3])}, save it as safetensors first" if others else ""
        raise UserError(f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}{found}")
    shard_of = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{folder / _INDEX} has no weight_map; download it again")
    return shard_of


def read_header(file: Path) -> dict[str, TensorFacts]:
    """The tensors of one safetensors file.

    Raises:
        UserError: the file is not safetensors, or its length is not what its header promises.
    """
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            n = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = stream.read(n) if n <= length - 8 else b""
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if start.startswith(b"version "):
        raise UserError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull")
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} ({length} bytes) is not a whole safetensors file; download it again") from None
    if 8 + n + end != length:
        kind = "truncated" if length < 8 + n + end else "too long"
        raise UserError(f"{file} is {kind}: {length} bytes where its header says {8 + n + end}; download it again")
    return tensors


def _tensor(entry: dict[str, Any]) -> TensorFacts:
    first, last = entry["data_offsets"]
    return TensorFacts(entry["dtype"], tuple(entry["shape"]), last - first)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value
