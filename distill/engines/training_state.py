"""What training changes, on disk: trained weights, buffers, and AdamW's states, each under its parameter's name.

Written by torch.distributed.checkpoint: every process writes what it holds, nothing is gathered, and what is read may
be cut up otherwise than what was written, so that a run can go on with another number of processes, or with FSDP2
where it had DDP.

    weights/NAME                     optimizer/NAME/step   optimizer/NAME/exp_avg   optimizer/NAME/exp_avg_sq
"""

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from distill.atomic import is_disk_full
from distill.engines import processes
from distill.errors import UserError

WEIGHTS = "weights/"


def save(student: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write this process's part into ``folder``; every process calls it."""
    with _quiet():
        dcp.save(_tensors(student, optimizer), storage_writer=_Writer(folder), no_dist=processes.world() == 1)


class _Writer(dcp.FileSystemWriter):
    """Says so when the disk is full, which torch.save, unable to end its file, covers up with an error of its own."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def load(student: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Put back what ``save`` wrote; every process calls it.

    Raises:
        UserError: it holds other weights than this student's, or DeepSpeed wrote it.
    """
    if not (folder / ".metadata").is_file():
        raise UserError(
            f"{folder} was written by DeepSpeed, which alone can read it; launch with its config and as many processes"
            " as before"
        )
    written = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, parameter in _trained(student).items():
        if f"optimizer/{name}/step" in written:
            optimizer.state.setdefault(parameter, _fresh_state(parameter))
        else:  # no step had reached it yet: stage 1 never does some, and stepwise the later layers
            optimizer.state.pop(parameter, None)
    tensors = _tensors(student, optimizer)
    # Every process asks for its own; a refusal must be everybody's, or the others would wait in the reading.
    missing = sorted(set().union(*processes.gather(tensors.keys() - written.keys())))
    if missing:
        raise UserError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more of what this run trains")
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=processes.world() == 1)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights and buffers that ``save`` wrote, whole, on the CPU, without any processes."""
    written = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in written.items()
        if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)
    }
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in tensors.items()}


def _tensors(student: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The very tensors that train, by name: reading into them restores the run."""
    trained = _trained(student)
    held = {WEIGHTS + name: tensor.detach() for name, tensor in (*trained.items(), *_buffers(student).items())}
    for name, parameter in trained.items():
        held |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return held


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def _buffers(student: nn.Module) -> Mapping[str, Tensor]:
    """Persistent buffers: those that ``state_dict`` has beside the parameters."""
    kept = student.state_dict().keys()
    return {name: buffer for name, buffer in student.named_buffers() if name in kept}


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state before its first step, as AdamW lays it out."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remark that there is one process only, which we know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        try:
            yield
        except CheckpointException as error:  # which is no Exception
            raise RuntimeError(str(error)) from error
