"""Write a student's Hugging Face folder from wherever its weights live.

A sharded student is gathered one tensor at a time, so that the main process holds one file's worth of weights and
nobody holds the model.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from distill.engines import processes, zero
from distill.layout import parts_of
from distill.standalone import auto_map, write_code
from distill.student import student_class, teacher_class

FILE_BYTES = 5 * 10**9
"""A file of weights ends when it has this many bytes, as Hugging Face's do."""


def save_student(student: PreTrainedModel, folder: Path) -> None:
    """Write ``folder``, which exists; every process calls it, the main one writes."""
    if not any(_is_sharded(parameter) for parameter in student.parameters()):
        if processes.is_main():
            student.save_pretrained(folder)
        return
    if processes.is_main():
        own_class = student_class(teacher_class(student.config))  # fully_shard changes an instance's class
        write_code(folder, own_class, parts_of(student.config.distill))
        student.config.auto_map = auto_map(own_class)
        student.config.architectures = [own_class.__name__]
        student.config.dtype = str(student.dtype).removeprefix("torch.")
        student.config.save_pretrained(folder)
        if student.generation_config is not None:
            student.generation_config.save_pretrained(folder)
    _write_weights(_whole_tensors(student), folder)


def _write_weights(tensors: Iterator[tuple[str, Tensor | None]], folder: Path) -> None:
    """One file, or several with an index, named as Hugging Face names them."""
    files: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        if tensor is None:
            continue
        if pending and sum(held.nbytes for held in pending.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        pending[name] = tensor
    if not processes.is_main():
        return
    flush()
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files):
        final = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    total = sum(size for names in files for size in names.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


@torch.no_grad()
def _whole_tensors(student: PreTrainedModel) -> Iterator[tuple[str, Tensor | None]]:
    """Every weight by name, tied ones once: whole and on the CPU on the main process, None elsewhere."""
    kept = student.state_dict().keys()
    held = (*student.named_parameters(), *((name, b) for name, b in student.named_buffers() if name in kept))
    for name, tensor in held:
        if isinstance(tensor, DTensor):
            whole = tensor.full_tensor().cpu()
        elif isinstance(tensor, nn.Parameter) and hasattr(tensor, "ds_id"):
            with zero.whole([tensor]):
                whole = tensor.data.cpu().clone()
        else:
            whole = tensor.detach().cpu()
        yield name, whole if processes.is_main() else None


def _is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
