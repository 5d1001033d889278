"""The loss and gradient of one step: over its micro-batches, over all processes, divided by what they hold together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.engines import processes
from distill.engines.engine import Engine
from distill.errors import UserError
from distill.objective import Batch, Objective, Part
from distill.training import checkpoint
from distill.training.nonfinite import first_nonfinite_gradient, watch_outputs


@dataclass(frozen=True)
class Gradients:
    """How an objective's gradients come about.

    Attributes:
        objective: the loss.
        engine: adds gradients up, here and over processes.
        device: of this process.
        precision: of the autocast that the objective runs in; fp32 for none.
    """

    objective: Objective
    engine: Engine
    device: torch.device
    precision: torch.dtype

    def backward(self, batches: Sequence[Batch], wants_to_stop: Callable[[], bool]) -> tuple[dict[str, float], bool]:
        """Compute the gradient of a step.

        Every part is divided by the weight of the whole step, all micro-batches and processes together, so that how a
        batch is cut up changes nothing.

        Args:
            batches: this process's micro-batches.
            wants_to_stop: whether this process was asked to; looked at when the gradient is there.

        Returns:
            The loss of the step over all processes, part by part, and whether any process wants to stop.

        Raises:
            UserError: there is no token to learn from in any of them.
        """
        weight = self._weight(batches)
        if weight <= 0:
            error = UserError("a step's batches hold no token to learn from (every label is -100)")
            error.everyones = True
            raise error
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
            parts = partial(self._parts, on_device)
            losses = self.engine.backward(parts, 1 / weight, last=index == len(batches) - 1)
            sums = {name: sums.get(name, 0.0) + loss.double().cpu() for name, loss in losses.items()}
        stop = torch.tensor(float(wants_to_stop()), dtype=torch.float64)
        # Added up in the order of the processes, so that every process has the same numbers to the last bit.
        *totals, stopping = processes.gather_numbers(torch.stack([*sums.values(), stop])).sum(0).tolist()
        return {name: total / weight for name, total in zip(sums, totals, strict=True)}, stopping > 0

    def origin_of_nonfinite(self, student: nn.Module, batches: Sequence[Batch], rng: dict[str, Any]) -> str | None:
        """Compute the step again, with the same dropout and without clipping, and watch where it goes wrong."""
        self.engine.forget()
        checkpoint.set_rng_state(rng)
        with watch_outputs(student) as found:
            self.backward(batches, lambda: False)
        outputs = processes.gather(found[0] if found else None)
        gradients = processes.gather(first_nonfinite_gradient(student))
        self.engine.forget()
        where = next((index for index, name in enumerate(outputs) if name), None)
        if where is not None:
            return outputs[where] if processes.world() == 1 else f"{outputs[where]} on process {where}"
        # Of gradients that were averaged it cannot be said whose they were.
        return next((name for name in gradients if name), None)

    def _weight(self, batches: Sequence[Batch]) -> float:
        """Over all micro-batches and processes."""
        mine = torch.tensor([sum(self.objective.weight(batch) for batch in batches)], dtype=torch.float64)
        return float(mine if self.engine.data_ranks == 1 else processes.gather_numbers(mine).sum())

    def _parts(self, batch: Batch) -> Iterator[Part]:
        """The same parts, each computed under autocast, which ends before the part is sent backward.

        What comes before a part is asked for is the teacher's, which computes in its own precision.
        """

        def under_autocast(part: Part) -> Part:
            def loss_sum() -> Tensor:
                with self._autocast():
                    return part.loss_sum()

            return Part(part.name, loss_sum)

        return map(under_autocast, self.objective.parts(batch))

    def _autocast(self) -> torch.autocast:
        # Without the cache: every weight is used once a pass, and copies kept until its end would be a whole model's.
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled, cache_enabled=False)
