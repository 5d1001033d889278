"""FSDP2: weights, gradients and optimizer in shards, layer by layer (torch's ``fully_shard``).

A layer's weights are gathered in fp32 for its forward and again for its backward, and freed after each. Mixers are
units of their own, because the first two stages run them without their layers.

``distill.engines.placement`` shards the student when it loads it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from distill.decoder import layers_of
from distill.engines import processes
from distill.engines.engine import Groups, Parts
from distill.engines.joint import detached, joint, total
from distill.engines.plain import PlainEngine
from distill.within import within


class Fsdp2Engine(PlainEngine):
    """See ``Engine``; student and optimizer are ordinary modules whose tensors are shards."""

    def __init__(self, student: nn.Module, groups: Groups, *, layerwise: bool) -> None:
        assert isinstance(student, FSDPModule), "load the student through distill.engines.placement"
        super().__init__(student, groups)
        self.data_rank, self.data_ranks, self.layerwise = processes.rank(), processes.world(), layerwise

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        # Gradients travel with every micro-batch: waiting for the last would keep them whole on every process.
        losses = within(self.student, joint, parts, recompute=self.layerwise)
        total(losses, scale * self.data_ranks).backward()
        return detached(losses)


def shard(model: PreTrainedModel, mixers: Iterable[Any], device: torch.device, settings: dict[str, Any]) -> None:
    """Shard a model in place, over all processes; its weights may be unset still.

    Args:
        model: any Hugging Face decoder.
        mixers: what else than decoder layers is called by itself.
        device: where shards live.
        settings: for ``fully_shard``.
    """
    mesh = init_device_mesh(device.type, (processes.world(),))
    for module in (*mixers, *layers_of(model), model):
        fully_shard(module, mesh=mesh, **settings)
