"""The processes of a run: how many there are, which one this is, and how they agree.

One process needs none of this, and every function here then does the obvious thing. Several are started by
``accelerate launch`` (or torchrun), which tells each its place in environment variables.

Objects travel over a gloo group that waits for a day, so that the others outlast whatever the main process does alone
(tokenising, converting). A process that dies breaks the connection and ends the wait at once.

What a step exchanges (NCCL on GPUs, gloo on CPUs) may take ``LIMIT``: whoever waits longer for the others gives up.
That is what notices a machine that vanished without closing its connections.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import UserError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
# Torch's own limit for every backend but NCCL alone, so that DeepSpeed's groups, which go by that, have the same. Ten
# minutes, NCCL's own, are short for processes that wait for the slowest to write its part of a checkpoint.
LIMIT = timedelta(minutes=30)

_waiting_group: Any = None
_alone = False  # inside on_main, where waiting for the others would be for ever


def start(device: str) -> torch.device:
    """Join the other processes, if there are any; the device of this one.

    Args:
        device: "auto", "cpu" or "cuda", as a recipe says.
    """
    global _waiting_group
    on_gpu = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        if here.index >= torch.cuda.device_count():
            raise UserError(
                f"process {here.index} of this machine finds {torch.cuda.device_count()} GPUs; launch as many"
                " processes as there are, with --num_processes"
            )
        torch.cuda.set_device(here)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, wherever it is imported, would take a GPU
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LIMIT)
        _waiting_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return here


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks for all."""
    return rank() == 0


def wait() -> None:
    """Return when every process has come here."""
    assert not _alone
    if world() > 1:
        dist.barrier(group=_waiting_group)


def gather(value: T) -> list[T]:
    """Every process's value, in the order of the processes, on every process."""
    assert not _alone
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_waiting_group)
    return values


def on_main(call: Callable[[], T]) -> T:
    """``call()`` by the main process alone; its result on every process (small: it is pickled).

    Inside ``call`` there is nobody to wait for; another ``on_main`` in it is a plain call.

    Raises:
        UserError: what ``call`` raised, on every process.
    """
    global _alone
    if world() == 1 or _alone:
        return call()
    told: list[Any] = [None, None]
    if is_main():
        _alone = True
        try:
            told[0] = call()
        except UserError as error:
            error.everyones = True
            told[1] = error
        finally:
            _alone = False
    dist.broadcast_object_list(told, src=0, group=_waiting_group)
    if told[1] is not None:
        raise told[1]
    return told[0]


def together(call: Callable[[], T]) -> T:
    """``call()`` by every process; if it fails for one, it fails for all, with that one's message.

    Raises:
        UserError: the first that any process raised.
    """
    result, failure = None, None
    try:
        result = call()
    except UserError as error:
        failure = error
    for index, other in enumerate(gather(failure)):
        if other is not None:
            shared = (
                failure if failure is other else UserError(str(other) if index == 0 else f"process {index}: {other}")
            )
            shared.everyones = True
            raise shared
    return result  # type: ignore[return-value]


def gather_numbers(values: Tensor) -> Tensor:
    """(n,) fp64 of every process as (processes, n); summed over the first dimension, the same everywhere."""
    if world() == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(rows, values)
    return torch.stack(rows)
