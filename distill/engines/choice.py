"""The engine that trains a student, from what was launched and what the recipe's stage asks for."""

import re

import torch
from transformers import PreTrainedModel

from distill.engines import processes
from distill.engines.ddp import DdpEngine
from distill.engines.engine import Engine, Groups
from distill.engines.fsdp2 import Fsdp2Engine
from distill.engines.launched import Launched
from distill.engines.layers import LayersEngine
from distill.engines.plain import PlainEngine
from distill.engines.zero import ZeroEngine


def data_ranks(by_layers: bool) -> int:
    """How many processes share a step's sequences: all, or none where each trains its own layers on all of them."""
    return 1 if by_layers else processes.world()


def make_engine(
    student: PreTrainedModel,
    groups: Groups,
    launched: Launched,
    device: torch.device,
    *,
    layerwise: bool,
    by_layers: bool,
    accumulate: int,
    clip: float | None,
) -> Engine:
    """The engine for a student that ``distill.engines.placement`` has loaded for the same ``launched``.

    Args:
        student: its ``requires_grad`` flags are set.
        groups: its parameter groups for AdamW.
        launched: what the launch config asks for.
        device: of this process.
        layerwise: whether the objective's parts are layers that share nothing.
        by_layers: every process trains its own layers; the student is then replicated.
        accumulate: micro-batches a step.
        clip: largest norm of the gradient.
    """
    if by_layers and processes.world() > 1:
        return LayersEngine(student, groups, {name: _layer_of(name) for name, _ in student.named_parameters()})
    if launched.is_zero:
        return ZeroEngine(
            student, groups, layerwise=layerwise, config=launched.settings, accumulate=accumulate, clip=clip
        )
    if launched.kind == "fsdp2":
        return Fsdp2Engine(student, groups, layerwise=layerwise)
    if launched.kind == "ddp":
        return DdpEngine(student, groups, layerwise=layerwise, device=device)
    return PlainEngine(student, groups)


def _layer_of(parameter: str) -> str:
    """The objective's part that a parameter belongs to: "layers.3"; "" for what stands outside the layers."""
    found = re.search(r"(?:^|\.)(layers\.\d+)\.", parameter)
    return found[1] if found else ""
