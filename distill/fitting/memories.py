"""How far each head looks back: the constant decay whose matrix lies nearest to attention's.

    A        attention's matrix of a head, M_τ the mixer's where it forgets by 1/e in τ positions
    min_s |s M_τ − A|²  =  |A|² − ⟨M_τ, A⟩² / |M_τ|²

A matrix counts by its shape, whatever its size: size is what comes after (norm, step, output projection). Sums run over
all tokens looked at, and τ over half octaves from 1 position to 1024; a head that no τ brings nearer to attention than
zero keeps its own. Attention's distances enter through A alone: where a head attends to the last few tokens, M_τ has
nothing to gain far away. A state-space layer's matrix gets attention's size again, as in seeding.

Copies of a head (``distill.copies``) choose one after another, each beside those before it: M_τ is then the sum of what
these make with what the next would.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.attention import AttentionView
from distill.capture import LayerTrace
from distill.copies import copies_of
from distill.memories import SET_MEMORY, memories_of
from distill.mixers import DiscreteMamba2Mixer, GatedDeltaNetMixer, HedgehogMixer, Mamba2Mixer, Mixer
from distill.mixers.parts import between_tokens, inverse_softplus
from distill.seeding import LARGEST_RATIO

MEMORIES = tuple(2 ** (half / 2) for half in range(21))
"""τ, in positions."""

Arguments = dict[str, Tensor | None]
"""A batch's padding and borders of documents (``capture.sequence_arguments``)."""

Read = tuple[LayerTrace, Arguments]
"""What both read: ``attention_input``, and what stands beside it."""


@torch.no_grad()
def fit_memories_(mixer: Mixer, attention: AttentionView, traces: Sequence[Read]) -> None:
    """Give every head of a freshly seeded ``mixer`` the memory that fits best, and its matrix attention's size.

    Args:
        mixer: of a class in ``SET_MEMORY``.
        traces: ``attention_input``, which both read.
    """
    now_H = memories_of(mixer)
    copies = copies_of(mixer, attention)
    grid_M = torch.tensor(MEMORIES, dtype=torch.float64).to(now_H)
    chosen_HE, ratio_H = now_H.unflatten(0, (-1, copies)).clone(), torch.ones_like(now_H[::copies])
    wanted = [_attention(attention, *read) for read in traces]
    teacher_H = torch.stack([_summed(teacher_BHTT.square()) for teacher_BHTT in wanted]).sum(dim=0)
    for copy in range(copies):
        measured = [
            _measure_(mixer, read, teacher_BHTT, grid_M, chosen_HE, copy)
            for read, teacher_BHTT in zip(traces, wanted, strict=True)
        ]
        along_MH, student_MH = (torch.stack(sums).sum(dim=0) for sums in zip(*measured, strict=True))
        tiny = torch.finfo(along_MH.dtype).tiny
        gain_MH = along_MH.clamp_min(0).square() / student_MH.clamp_min(tiny)
        nearest_H = (grid_M[:, None].log() - chosen_HE[:, copy].log()).abs().argmin(dim=0)
        best_H = torch.where(gain_MH.amax(dim=0) > 0, gain_MH.argmax(dim=0), nearest_H)
        chosen_HE[:, copy] = grid_M[best_H]
        size_H = student_MH.gather(0, best_H[None])[0] / (copy + 1) ** 2  # of the mean, and not of the sum
        ratio_H = (teacher_H / size_H.clamp_min(tiny)).sqrt().clamp(1 / LARGEST_RATIO, LARGEST_RATIO).to(now_H)
    SET_MEMORY[type(mixer)](mixer, chosen_HE.flatten())
    SCALE[type(mixer)](mixer, ratio_H.repeat_interleave(copies))


def _measure_(
    mixer: Mixer, read: Read, teacher_BHTT: Tensor, grid_M: Tensor, chosen_HE: Tensor, copy: int
) -> tuple[Tensor, Tensor]:
    """⟨S + M_τ, A⟩ and |S + M_τ|², (M, H) for every τ; the mixer is left with the last that were tried.

    Args:
        teacher_BHTT: A.
        grid_M: every τ.
        chosen_HE: of the first ``copy`` copies the memories that they have; S is the sum of their matrices.
    """
    n_heads, copies = chosen_HE.shape
    earlier_BHTT = torch.zeros_like(teacher_BHTT)
    if copy:
        earlier_BHTT = _matrices_(mixer, read, chosen_HE)[:, :, :copy].sum(dim=2)
    along, sizes = [], []
    for tried_E in grid_M.split(copies):
        # Copies are alike but for their memories, so each stands for the one that is looked for, with a τ of its own.
        memories_E = tried_E[torch.arange(copies).clamp(max=len(tried_E) - 1)]
        made_BHETT = _matrices_(mixer, read, memories_E.expand(n_heads, -1))
        for place in range(len(tried_E)):
            together_BHTT = earlier_BHTT + made_BHETT[:, :, place]
            along.append(_summed(together_BHTT * teacher_BHTT))
            sizes.append(_summed(together_BHTT.square()))
    return torch.stack(along), torch.stack(sizes)


def _matrices_(mixer: Mixer, read: Read, memories_HE: Tensor) -> Tensor:
    """(B, H, E, T, T): every copy's matrix with these memories, which the mixer has from then on."""
    trace, arguments = read
    SET_MEMORY[type(mixer)](mixer, memories_HE.flatten())
    positions, u_BTD = trace.position_embeddings, trace.attention_input.to(mixer.in_proj.weight.dtype)
    matrix_BHTT = mixer.mixing_matrix(u_BTD, position_embeddings=positions, **arguments)
    return matrix_BHTT.unflatten(1, memories_HE.shape)


def _attention(attention: AttentionView, trace: LayerTrace, arguments: Arguments) -> Tensor:
    """A, (B, H, T, T); zeros at padding."""
    resets_BT, valid_BT = arguments["resets_BT"], arguments["valid_BT"]
    document_BT = None if resets_BT is None else resets_BT.cumsum(dim=1)
    matrix_BHTT = attention.matrix(trace.attention_input, trace.position_embeddings, document_BT)
    return between_tokens(matrix_BHTT, valid_BT)


def _summed(matrix_BHTT: Tensor) -> Tensor:
    """(H,), in fp64."""
    return matrix_BHTT.sum(dim=(0, 2, 3), dtype=torch.float64)


def _scale_step_(mixer: Mamba2Mixer, factor_H: Tensor) -> None:
    """A step of another size scales the whole matrix; A takes it out of the decay again."""
    mixer.dt_bias.copy_(inverse_softplus(F.softplus(mixer.dt_bias) * factor_H))
    mixer.A_log.sub_(factor_H.log())


SCALE: dict[type, Callable[[Any, Tensor], None]] = {
    Mamba2Mixer: _scale_step_,
    DiscreteMamba2Mixer: lambda mixer, factor_H: mixer.scale_reads_(factor_H),
    GatedDeltaNetMixer: lambda mixer, factor_H: None,  # its norm takes any factor out again
    HedgehogMixer: lambda mixer, factor_H: None,  # its rows sum to one, as attention's
}
"""How its matrix is multiplied by factors, (H,)."""
