"""One process: every part of the loss goes backward, and its graph is freed, before the next is computed."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from distill.engines import training_state
from distill.engines.engine import Groups, Parts


class PlainEngine:
    """See ``Engine``."""

    data_rank: int = 0
    data_ranks: int = 1

    def __init__(self, student: nn.Module, groups: Groups) -> None:
        self.student = student
        self.optimizer: Optimizer = AdamW([dict(group) for group in groups])

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        losses = {}
        for part in parts():
            loss_sum = part.loss_sum()
            (loss_sum * scale).backward()
            losses[part.name] = loss_sum.detach()
        return losses

    def step(self, clip: float | None) -> float:
        norm = clip_gradient(self.student, clip)
        if math.isfinite(norm):
            self.optimizer.step()
            self.forget()
        return norm

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """One process is always of one mind."""

    def save(self, folder: Path) -> None:
        training_state.save(self.student, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        training_state.load(self.student, self.optimizer, folder)

    def close(self) -> None:
        self.forget()
        self.optimizer.state.clear()


def clip_gradient(student: nn.Module, clip: float | None) -> float:
    """Scale all gradients so that their global norm, over all shards, is at most ``clip``; the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), math.inf if clip is None else clip)
    whole = getattr(norm, "full_tensor", lambda: norm)
    return float(whole())
