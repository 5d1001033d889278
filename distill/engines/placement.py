"""Where a model's weights live, by engine, and how they come there from a Hugging Face folder.

    replicated   one, ddp, zero1, zero2, and students that train by layers: whole on every process's device
    sharded      fsdp2, zero3: every process keeps its part; teacher and student alike

With several processes a model is built without weights (memory that nobody touches costs nothing), put where it
belongs, and then filled from the memory-mapped files, tensor by tensor: replicated, straight into each device; under
FSDP2 every process reads its own rows; under ZeRO-3 the main process reads and the others receive. So a host holds the
files once, in its page cache, and besides at most ZeRO-3's one copy.
"""

import gc
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from distill.conversion import load_teacher, unset_model
from distill.engines import fsdp2, processes, zero
from distill.engines.launched import Launched
from distill.stored_weights import StoredWeights
from distill.student import is_student, load_student, mixers_of
from distill.weight_names import names_in


def place_teacher(folder: str, dtype: torch.dtype, launched: Launched, device: torch.device) -> PreTrainedModel:
    """The frozen teacher, in eval mode, where the engine wants it."""
    _make_room()
    if processes.world() == 1 and not launched.shards_weights:
        return _moved(load_teacher(folder, dtype), device)
    teacher = _filled(folder, dtype, launched, device)
    if launched.kind == "zero3":
        zero.serve(teacher, launched.settings)
    return teacher


def place_student(folder: Path, launched: Launched, device: torch.device, *, frozen: bool = False) -> PreTrainedModel:
    """A student with fp32 weights, where the engine wants it.

    Args:
        folder: a stage's.
        launched: the engine.
        device: of this process.
        frozen: it will be measured and not trained.
    """
    _make_room()
    if processes.world() == 1 and not launched.shards_weights:
        return _moved(load_student(folder, dtype=torch.float32), device)
    student = _filled(str(folder), torch.float32, launched, device)
    student.requires_grad_(not frozen)
    if frozen and launched.kind == "zero3":
        zero.serve(student, launched.settings)
    return student


def _filled(folder: str, dtype: torch.dtype, launched: Launched, device: torch.device) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype  # what is built from it later, such as a student, goes by that
    model = unset_model(config, dtype)
    with suppress(OSError):  # a folder may lack it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    stored = StoredWeights(folder, model.base_model_prefix, names_in(model))
    if launched.kind == "fsdp2":
        mixers = mixers_of(model).values() if is_student(model) else ()
        fsdp2.shard(model, mixers, device, launched.settings)
        _fill(model, stored)
    elif launched.kind == "zero3":
        if processes.is_main():
            _fill(model, stored)
        processes.wait()
        zero.partition(model, launched.settings)
    else:
        _fill(_moved(model, device), stored)
    _moved(model, device)  # what has no shards, such as the rotary frequencies
    return model.eval().requires_grad_(False)


def _make_room() -> None:
    """Free models that nobody holds any more: hooks make circles of them, which only the garbage collector undoes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def _fill(model: PreTrainedModel, stored: StoredWeights) -> None:
    """Read every parameter; of one in shards, the rows that this process has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in model.parameters():
        local, rows = parameter.data, slice(None)
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local, rows = parameter.to_local(), slice(offset[0], offset[0] + shape[0])
        local.copy_(stored.rows(names[id(parameter)], tuple(parameter.shape), rows))


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module's signature
