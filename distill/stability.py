"""How long a student's mixers remember, and whether what disturbs their memory can grow.

========  =============================================================================
symbol    meaning
========  =============================================================================
S_t       what a layer remembers after position t: S_t = F(S_{t−1}, u_t), u_t what it reads
J_t       ∂S_t / ∂S_{t−1}, at the inputs that were read
v_t       a disturbance of S_t, of length 1
a_t       decay of a head at position t, where J_t = a_t · 1
λ         largest Lyapunov exponent: how fast a small disturbance grows, in nats a token
τ         memory in tokens
========  =============================================================================

::

    λ    = lim 1/T log ‖J_T ⋯ J_1‖
         = lim 1/T Σ_t log ‖J_t v_{t−1}‖,   v_t = J_t v_{t−1} / ‖J_t v_{t−1}‖
    λ_h  = mean_t log a_{t,h}                        of a head of our mixers; in Mamba-2 that is A_h · mean_t Δ_{t,h}
    λ    = max_h λ_h                                 of their layer; ≤ 0, since no decay is above 1
    τ_h  = 1 / |λ_h|                                 so many tokens on, 1/e of what was written is left

The first two lines hold for any recurrence (``largest_exponent``), the others where a state is only ever multiplied by
a number. ``exp(T λ_h)`` is LongMamba's measure of which heads see a whole sequence of T tokens.

Sources: Mamba State-Space Models Are Lyapunov-Stable Learners (arXiv 2406.00209), theorem 1; Benettin et al., Meccanica
15 (1980), for the renormalised tangent; LongMamba (arXiv 2504.16053).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.func import jvp
from transformers import PreTrainedModel

from distill.cache import MixerCacheLayer
from distill.capture import sequence_arguments, traced_layers
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.mixers import Mixer, is_mixer
from distill.mixers.rotary import Rotation
from distill.student import is_student, mixers_of
from distill.within import opened

Given = TypeVar("Given")


def head_exponents(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[int, list[float]]:
    """λ_h of every head of every ``decaying`` layer, on a text; nothing of a model without any.

    A mean over tokens that have one before them in their document and row: of the others' states nothing is left to
    decay. Padding is left out. Decays are the mixer's own, in fp32 at least, and summed in fp64.

    Args:
        batches: dicts of ``input_ids``, ``position_ids`` (B, T) int64 and ``valid`` (B, T) bool.

    Raises:
        UserError: no token has one before it.
    """
    mixers = decaying(model)
    sums: dict[int, Tensor] = {}
    tokens, device = 0, device_of(model)
    with evaluating(model):
        for batch in batches:
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            follows_BT = followers(here)
            tokens += int(follows_BT.sum())
            for index, trace in traced_layers(model, here, mixers, ["attention_input"]):
                of_head = partial(_log_decays, mixers[index], here)
                decays_BTH = opened(mixers[index], of_head, trace.attention_input, trace.position_embeddings)
                sums[index] = sums.get(index, 0) + decays_BTH[follows_BT].sum(0, dtype=torch.float64)
    if not tokens:
        raise UserError("there is no token behind another: every document of the text is shorter than two tokens")
    return {index: (sum_H / tokens).tolist() for index, sum_H in sums.items()}


def decaying(model: PreTrainedModel) -> dict[int, Mixer]:
    """The mixers of a student whose states are only ever multiplied by a number: of others no head has an exponent.

    The delta rule turns its state as well (``mixer_exponent`` follows it), and a window has no state at all.
    """
    mixers = mixers_of(model) if is_student(model) else {}
    return {index: mixer for index, mixer in mixers.items() if is_mixer(mixer) and mixer.without_factors is None}


def followers(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) bool: real tokens with one before them in the same document and row."""
    follows_BT = batch["valid"].clone()
    follows_BT[:, 0] = False
    follows_BT[:, 1:] &= batch["position_ids"].diff(dim=1) == 1
    return follows_BT


def memory_tokens(exponent: float) -> float:
    """τ; infinite where nothing decays."""
    return -1 / exponent if exponent < 0 else math.inf


def largest_exponent(
    step: Callable[[Tensor, Given], Tensor],
    state: Tensor,
    inputs: Iterable[Given],
    *,
    skip: int = 0,
    seed: int = 0,
) -> float:
    """λ of any recurrence, by following a tangent along its trajectory; in the state's dtype, so give fp64.

    Args:
        step: F, as (state, input) to the next state; forward differentiation must know what it calls.
        state: where the trajectory begins, of any shape.
        inputs: one a step.
        skip: first steps that turn the tangent towards what grows most, and are not counted.
        seed: of the first tangent.

    Returns:
        Nats a step; −inf where a tangent ends.

    Raises:
        ValueError: there are no steps beyond ``skip``.
    """
    tangent = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed), dtype=state.dtype)
    tangent = (tangent / tangent.norm()).to(state.device)
    total, counted = 0.0, 0
    for number, given in enumerate(inputs):
        state, tangent = cast("tuple[Tensor, Tensor]", jvp(partial(_of_state, step, given), (state,), (tangent,)))
        growth = float(tangent.norm())
        if growth == 0.0:
            return -math.inf
        tangent = tangent / growth
        if number >= skip:
            total, counted = total + math.log(growth), counted + 1
    if not counted:
        raise ValueError(f"largest_exponent skips {skip} steps and was given no more; give more inputs")
    return total / counted


@torch.no_grad()
def mixer_exponent(
    mixer: Mixer, hidden_BTD: Tensor, *, position_embeddings: Rotation | None = None, skip: int = 0, seed: int = 0
) -> float:
    """λ of one mixer's whole memory, through its own cache token by token; whatever its transition is.

    Args:
        hidden_BTD: what it reads; several rows are one large state, whose λ is the largest of theirs.
        position_embeddings: as the decoder hands them to its layers; for a mixer with ``rope: keep``.
        skip, seed: as in ``largest_exponent``, after the first token, which makes the memory.
    """
    rotations = [None] * hidden_BTD.shape[1] if position_embeddings is None else _by_token(position_embeddings)
    tokens = list(zip(hidden_BTD.split(1, dim=1), rotations, strict=True))
    layer = _advanced(mixer, MixerCacheLayer(), *tokens[0])
    shapes = [part.shape for part in _parts(layer)]

    def step(memory_M: Tensor, token: tuple[Tensor, Rotation | None]) -> Tensor:
        return _memory(_advanced(mixer, _remembering(memory_M, shapes), *token))

    return largest_exponent(step, _memory(layer), tokens[1:], skip=skip, seed=seed)


def _of_state(step: Callable[[Tensor, Given], Tensor], given: Given, state: Tensor) -> Tensor:
    return step(state, given)


def _log_decays(
    mixer: Mixer, batch: dict[str, Tensor], hidden_BTD: Tensor, position_embeddings: Rotation | None
) -> Tensor:
    """log a of each position and head; (B, T, H)."""
    sequence = sequence_arguments(batch)
    factors = mixer.matrix_factors(hidden_BTD, position_embeddings=position_embeddings, **sequence)
    return factors.log_decay_BTH


def _by_token(rotation: Rotation) -> list[Rotation]:
    cos_BTW, sin_BTW = rotation
    return list(zip(cos_BTW.split(1, dim=1), sin_BTW.split(1, dim=1), strict=True))


def _advanced(mixer: Any, layer: MixerCacheLayer, hidden_B1D: Tensor, rotation: Rotation | None) -> MixerCacheLayer:
    """The memory after one more token."""
    mixer(hidden_B1D, cache=SimpleNamespace(layers={mixer.layer_idx: layer}), position_embeddings=rotation)
    return layer


def _memory(layer: MixerCacheLayer) -> Tensor:
    """All that is remembered, as one vector."""
    return torch.cat([part.flatten() for part in _parts(layer)])


def _parts(layer: MixerCacheLayer) -> tuple[Tensor, Tensor]:
    """The convolution's inputs and the scan's state."""
    inputs_BTC, state_BHPN = layer.conv_states[0], layer.recurrent_states[0]
    assert inputs_BTC is not None, "a first token was read"
    assert state_BHPN is not None, "a first token was read"
    return inputs_BTC, state_BHPN


def _remembering(memory_M: Tensor, shapes: list[torch.Size]) -> MixerCacheLayer:
    """A cache layer of its own that holds ``memory_M``, since a mixer writes over what it is given."""
    inputs_M, state_M = memory_M.split([shape.numel() for shape in shapes])
    layer = MixerCacheLayer()
    layer.conv_states[0] = inputs_M.clone().view(shapes[0])
    layer.recurrent_states[0] = state_M.clone().view(shapes[1])
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0] = True
    return layer
