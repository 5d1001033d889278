"""Safetensors files written shard by shard, so that no more than one shard is in memory."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_PARTIAL = "{:05d}.partial.safetensors"
_INDEX = "model.safetensors.index.json"


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = 2 * 10**9) -> None:
    """Write tensors as the weights of a Hugging Face folder, with an index where there are several files.

    Args:
        tensors: name and tensor, each made when its turn comes.
        folder: exists.
        shard_bytes: of tensors a file holds at most, unless one alone is larger.
    """
    shards: list[list[str]] = []
    total, held = 0, 0
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(waiting, folder / _PARTIAL.format(len(shards)), metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        waiting[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _PARTIAL.format(0)).rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _PARTIAL.format(number)).rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
