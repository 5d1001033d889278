"""All parts of a loss in one forward, which is what engines that hook into forward and backward need."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.engines.engine import Parts


def joint(parts: Parts, *, recompute: bool) -> dict[str, Tensor]:
    """The loss sum of every part, with one graph for all.

    Args:
        parts: of one micro-batch.
        recompute: keep of every part only its inputs and compute it again in backward, so that the graph of one
            layer is all that is alive at a time, as where each part goes backward at once.
    """
    return {
        part.name: checkpoint(part.loss_sum, use_reentrant=False) if recompute else part.loss_sum() for part in parts()
    }


def total(losses: dict[str, Tensor], scale: float) -> Tensor:
    """The scalar that goes backward."""
    return sum(losses.values(), start=next(iter(losses.values())).new_zeros(())) * scale


def detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}
