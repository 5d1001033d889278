"""``parallel: layers``: every process trains its own layers, and nothing but a few numbers travels.

In the first two stages layers share nothing: each reads the teacher's hidden state and is matched to the teacher's
layer. So a process can train some of them to the end by itself, on the same data as all others. It makes what one
process would make, number for number; what differs is who computes it. The norm that clipping goes by is that of all
layers, put together from every process's.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from distill.engines import processes, training_state
from distill.engines.engine import Groups, Parts

_NONE = torch.tensor(-1.0)  # in the place of the norm of a gradient that another process has


class LayersEngine:
    """See ``Engine``. Process r of R trains part r, r + R, … of the parts an objective names."""

    data_rank: int = 0
    data_ranks: int = 1

    def __init__(self, student: nn.Module, groups: Groups, part_of: dict[str, str]) -> None:
        """
        Args:
            student: whole on every process.
            groups: its trained parameters.
            part_of: the part of the objective that each trained parameter belongs to, both by name.
        """
        self.student = student
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        parts = dict.fromkeys(part_of[name] for name in self.trained)
        self.owner = {part: index % processes.world() for index, part in enumerate(parts)}
        self.process_of = {name: self.owner[part_of[name]] for name in self.trained}
        for name, parameter in self.trained.items():
            parameter.requires_grad_(self._is_mine(name))
        mine = {id(parameter) for name, parameter in self.trained.items() if self._is_mine(name)}
        self.optimizer: Optimizer = AdamW(
            [{**group, "params": [p for p in group["params"] if id(p) in mine]} for group in groups]
        )

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        losses = {}
        for part in parts():
            if self.owner[part.name] != processes.rank():
                losses[part.name] = torch.zeros(())
                continue
            loss_sum = part.loss_sum()
            (loss_sum * scale).backward()
            losses[part.name] = loss_sum.detach()
        return losses

    def step(self, clip: float | None) -> float:
        norm = self._global_norm()
        if norm.isfinite():
            mine = [p for p in self.trained.values() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(mine, math.inf if clip is None else clip, norm)
            self.optimizer.step()
            self.forget()
        return float(norm)

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def settle(self) -> None:
        for name, parameter in self.trained.items():
            dist.broadcast(parameter.data, src=self.process_of[name])

    def save(self, folder: Path) -> None:
        training_state.save(self.student, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        training_state.load(self.student, self.optimizer, folder)

    def close(self) -> None:
        self.forget()
        self.optimizer.state.clear()

    def _is_mine(self, name: str) -> bool:
        return self.process_of[name] == processes.rank()

    def _global_norm(self) -> Tensor:
        """The norm of the norms of all gradients, in the order and the precision that one process would take."""
        norms = [torch.linalg.vector_norm(p.grad) if p.grad is not None else _NONE for p in self.trained.values()]
        # Each gradient is on one process at most, so the largest of all is exact.
        everybodys = processes.gather_numbers(torch.stack([norm.cpu() for norm in norms])).amax(0)
        return torch.linalg.vector_norm(everybodys[everybodys != _NONE])
