"""How far each head looks back: the constant decay whose matrix lies nearest to attention's.

    A        attention's matrix of a head, M_τ the mixer's where it forgets by 1/e in τ positions
    min_s |s M_τ − A|²  =  |A|² − ⟨M_τ, A⟩² / |M_τ|²

A matrix counts by its shape, whatever its size: size is what comes after (norm, step, output projection). Sums run over
all tokens looked at, and τ over half octaves from 1 position to 1024; a head that no τ brings nearer to attention than
zero keeps its own. Attention's distances enter through A alone: where a head attends to the last few tokens, M_τ has
nothing to gain far away. A state-space layer's matrix gets attention's size again, as in seeding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.attention import AttentionView
from distill.capture import LayerTrace
from distill.mixers import DiscreteMamba2Mixer, GatedDeltaNetMixer, Mamba2Mixer, Mixer, discrete_mamba2, mamba2
from distill.mixers import gated_deltanet as delta
from distill.mixers.parts import inverse_softplus
from distill.objectives import attention_matrix
from distill.seeding import LARGEST_RATIO

MEMORIES = tuple(2 ** (half / 2) for half in range(21))
"""τ, in positions."""

Arguments = dict[str, Tensor | None]
"""A batch's padding and borders of documents (``capture.sequence_arguments``)."""


@torch.no_grad()
def fit_memories_(mixer: Mixer, attention: AttentionView, traces: Iterable[tuple[LayerTrace, Arguments]]) -> None:
    """Give every head of a freshly seeded ``mixer`` the memory that fits best, and its matrix attention's size.

    Args:
        mixer: of a class in ``SET_MEMORY``.
        traces: ``attention_input``, which both read.
    """
    set_memory_ = SET_MEMORY[type(mixer)]
    now_H = memories_of(mixer)
    along_MH, student_MH = (torch.zeros(len(MEMORIES), len(now_H), dtype=torch.float64).to(now_H.device) for _ in "MA")
    teacher_H = torch.zeros_like(along_MH[0])
    for trace, arguments in traces:
        teacher_BHTT = _attention(attention, trace, arguments)
        teacher_H += _summed(teacher_BHTT.square())
        for place, memory in enumerate(MEMORIES):
            set_memory_(mixer, torch.full_like(now_H, memory))
            student_BHTT = mixer.mixing_matrix(
                trace.attention_input, position_embeddings=trace.position_embeddings, **arguments
            )
            along_MH[place] += _summed(student_BHTT * teacher_BHTT)
            student_MH[place] += _summed(student_BHTT.square())
    tiny = torch.finfo(along_MH.dtype).tiny
    gain_MH = along_MH.clamp_min(0).square() / student_MH.clamp_min(tiny)
    grid_M = torch.tensor(MEMORIES, dtype=torch.float64).to(now_H)
    nearest_H = (grid_M[:, None].log() - now_H.log()).abs().argmin(dim=0)
    best_H = torch.where(gain_MH.amax(dim=0) > 0, gain_MH.argmax(dim=0), nearest_H)
    set_memory_(mixer, grid_M[best_H])
    size_H = student_MH.gather(0, best_H[None])[0]
    ratio_H = (teacher_H / size_H.clamp_min(tiny)).sqrt().clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    SCALE[type(mixer)](mixer, ratio_H.to(now_H))


def memories_of(mixer: Mixer) -> Tensor:
    """τ, (H,), of a mixer whose decays do not depend on what it reads, as seeding leaves them."""
    return 1 / RATE[type(mixer)](mixer).detach()


def _attention(attention: AttentionView, trace: LayerTrace, arguments: Arguments) -> Tensor:
    q_BHTP, k_BHTP = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
    resets_BT, valid_BT = arguments["resets_BT"], arguments["valid_BT"]
    matrix_BHTT = attention_matrix(
        q_BHTP,
        k_BHTP,
        scaling=attention.scaling,
        document_BT=None if resets_BT is None else resets_BT.cumsum(dim=1),
        window=attention.sliding_window,
        softcap=attention.softcap,
    )
    return matrix_BHTT if valid_BT is None else matrix_BHTT * (valid_BT[:, None, :, None] & valid_BT[:, None, None])


def _summed(matrix_BHTT: Tensor) -> Tensor:
    return matrix_BHTT.sum(dim=(0, 2, 3), dtype=torch.float64)


def _scale_step_(mixer: Mamba2Mixer, factor_H: Tensor) -> None:
    """A step of another size scales the whole matrix; A takes it out of the decay again."""
    mixer.dt_bias.copy_(inverse_softplus(F.softplus(mixer.dt_bias) * factor_H))
    mixer.A_log.sub_(factor_H.log())


SET_MEMORY: dict[type, Callable[[Any, Tensor], None]] = {
    Mamba2Mixer: mamba2.set_memory_,
    DiscreteMamba2Mixer: discrete_mamba2.set_memory_,
    GatedDeltaNetMixer: delta.set_memory_,
}
"""How a mixer is made to forget by 1/e in so many positions, (H,), whatever it reads."""

SCALE: dict[type, Callable[[Any, Tensor], None]] = {
    Mamba2Mixer: _scale_step_,
    DiscreteMamba2Mixer: lambda mixer, factor_H: mixer.scale_reads_(factor_H),
    GatedDeltaNetMixer: lambda mixer, factor_H: None,  # its norm takes any factor out again
}
"""How its matrix is multiplied by factors, (H,)."""

RATE: dict[type, Callable[[Any], Tensor]] = {
    Mamba2Mixer: lambda mixer: F.softplus(mixer.dt_bias) * mixer.A_log.exp(),
    DiscreteMamba2Mixer: lambda mixer: F.softplus(mixer.A_log_bias),
    GatedDeltaNetMixer: lambda mixer: F.softplus(mixer.dt_bias) * mixer.A_log.exp(),
}
"""−log decay, (H,), where nothing read changes it."""
