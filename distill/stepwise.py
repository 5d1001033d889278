"""Stepwise replacement (MambaInLlama, arXiv 2408.15237): while a student trains, attention gives way layer by layer.

    output_l = α_l mixer_l(u) + (1 − α_l) attention_l(u)        attention_l is the teacher's, frozen
    α_l(s)   = 0 before the layer's turn, 1 after it, and on a line between where the turn takes a while

s is the share of the stage's steps that are done. A layer whose turn has not come is its teacher's, so that a mixer
learns below and above layers that work. Nothing is kept for it: attention is lent by the teacher in memory, and α
follows from s, so that a run goes on exactly where it stopped. Whatever is measured or saved is the student alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.decoder import attention_of, layers_of
from distill.recipe import Stepwise
from distill.student import mixers_of

_OF_MIXERS = ("valid_BT", "resets_BT", "cache")


class Replacement:
    """The mixers of a student in training, each with its teacher's attention beside it until its turn is over.

    Attributes:
        turns: which part of the layers each belongs to, counted from 0.
        shares: α of each layer.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: Stepwise) -> None:
        self.settings = settings
        mixers, layers = mixers_of(student), layers_of(teacher)
        self.turns = turns(list(mixers), len(settings.at))
        self.shares = dict.fromkeys(mixers, 0.0)
        for index, mixer in mixers.items():
            vars(mixer)["forward"] = self._blended(index, mixer, attention_of(layers[index]))

    def begin(self, done: float) -> None:
        """Set every layer's α for a step, before which so much of the stage is done."""
        for index, turn in self.turns.items():
            self.shares[index] = share(done - self.settings.at[turn], self.settings.ramp)

    def _blended(self, index: int, mixer: Any, attention: Any) -> Callable[..., tuple[Tensor, None]]:
        alone = mixer.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            alpha = self.shares[index]
            if alpha == 1 or not mixer.training:
                return alone(*args, **kwargs)
            attended_BTD = _first(attention(*args, **{k: v for k, v in kwargs.items() if k not in _OF_MIXERS}))
            if alpha == 0:
                return attended_BTD, None
            return torch.lerp(attended_BTD, _first(alone(*args, **kwargs)), alpha), None

        return forward


def share(since: float, ramp: float) -> float:
    """α, where a turn that takes ``ramp`` began so long ago; both in shares of the stage's steps."""
    if since < 0:
        return 0.0
    return min(1.0, since / ramp) if ramp else 1.0


def turns(layers: Sequence[int], parts: int) -> dict[int, int]:
    """Which of the parts each layer belongs to; each part is spread over the depth, and so are the first few together.

    Of four parts the first is every fourth layer, with the second it is every other: as in MambaInLlama, whose 25%, 50%
    and 75% these are; the last in each four is the last to give way.
    """
    bits = (parts - 1).bit_length()
    order = sorted(range(parts), key=lambda part: int(f"{part:0{max(bits, 1)}b}"[::-1], 2))
    return {layer: order.index(place % parts) for place, layer in enumerate(layers)}


def _first(output: Any) -> Tensor:
    """What attention adds to the stream, without its weights."""
    return output[0] if isinstance(output, tuple) else output
