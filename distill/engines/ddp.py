"""DDP: every process holds the whole student, reads its own share of the data, and gradients are averaged."""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.engines import processes
from distill.engines.engine import Groups, Parts
from distill.engines.joint import detached, joint, total
from distill.engines.plain import PlainEngine
from distill.within import through


class DdpEngine(PlainEngine):
    """See ``Engine``; it differs from one process only in how gradients come about."""

    def __init__(self, student: nn.Module, groups: Groups, *, layerwise: bool, device: torch.device) -> None:
        super().__init__(student, groups)
        self.data_rank, self.data_ranks, self.layerwise = processes.rank(), processes.world(), layerwise
        with warnings.catch_warnings():
            # The name that follows it is younger than the oldest torch that serves.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.wrapped = DistributedDataParallel(
                student,
                device_ids=[device.index] if device.type == "cuda" else None,
                # Otherwise DDP lays its buckets out anew after the first step, and a run that goes on would add up in
                # another order than one that went through.
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        # Gradients travel once a step, with its last micro-batch; DDP divides by the processes.
        with nullcontext() if last else self.wrapped.no_sync():
            losses = through(self.wrapped, self.student, joint, parts, recompute=self.layerwise)
            total(losses, scale * self.data_ranks).backward()
        return detached(losses)

    def close(self) -> None:
        super().close()
        del self.wrapped  # its hooks go with it
