"""What may stand where attention stood.

A mixer is an ``nn.Module`` with the call signature of a Hugging Face attention layer, so that a decoder layer
cannot tell the difference::

    output_BTD, None = mixer(hidden_states=…, past_key_values=…, valid_BT=…, resets_BT=…, **anything)

and besides:

* ``mixer.mixing_matrix(hidden_BTD, …) -> (B, H, T, T)``: the matrix it multiplies its values with (MOHAWK stage 1),
* ``mixer.mix(hidden_BTD, …) -> (y_BTHP, x_BTHP)``: that product, and the values, before gate and output projection,
* ``mixer.state_numel()``: numbers it remembers per sequence, whatever the sequence's length.
"""

from torch import nn

from distill.mixers.discrete_mamba2 import DiscreteMamba2Mixer
from distill.mixers.mamba2 import Mamba2Mixer

MIXERS: dict[str, type[nn.Module]] = {"mamba2": Mamba2Mixer, "discrete_mamba2": DiscreteMamba2Mixer}

__all__ = ["MIXERS", "DiscreteMamba2Mixer", "Mamba2Mixer"]
