"""What happens to a tensor's numbers on the way to another format: pairs of functions, there and back.

Symbols: H mixer heads of P channels with N numbers of state each; H' ≥ H and N' ≥ N after padding; D hidden size.

Padding is exact. Projection rows and convolution taps of zeros make x, B and C zero (SiLU 0 = 0), so a head that was
added, or a number of state, holds and reads zero; each head is normalised alone, so it changes no other; and the
columns of the output projection that would read it are zero too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixerSize:
    """H, P and N of a student's mixers."""

    heads: int
    head_dim: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Sizes:
    """What the changes need to know of a student.

    Attributes:
        q_heads, kv_heads: of the attention layers.
        mixer: as the student has it.
        padded: as the format gets it; has the student's head_dim.
    """

    q_heads: int
    kv_heads: int
    mixer: MixerSize
    padded: MixerSize

    def back(self) -> "Sizes":
        return Sizes(self.q_heads, self.kv_heads, self.padded, self.mixer)


@dataclass(frozen=True)
class Change:
    """A change and its inverse; both take the tensor and the sizes on the way there."""

    there: Callable[[Tensor, Sizes], Tensor]
    back: Callable[[Tensor, Sizes], Tensor]

    def reversed(self) -> "Change":
        return Change(self.back, self.there)

    def then(self, other: "Change") -> "Change":
        return Change(
            lambda tensor, sizes: other.there(self.there(tensor, sizes), sizes),
            lambda tensor, sizes: self.back(other.back(tensor, sizes), sizes),
        )


def _resized(parts: Callable[[MixerSize], list[int]]) -> Change:
    """Heads added (or taken away again) in a tensor whose rows are parts of so many rows a head."""

    def resize(rows: Tensor, old: MixerSize, new: MixerSize) -> Tensor:
        pieces = rows.split([old.heads * width for width in parts(old)])
        widths = zip(pieces, parts(old), parts(new), strict=True)
        return torch.cat([_resize(piece, old.heads, width, new.heads, wider) for piece, width, wider in widths])

    return Change(
        lambda tensor, sizes: resize(tensor, sizes.mixer, sizes.padded),
        lambda tensor, sizes: resize(tensor, sizes.padded, sizes.mixer),
    )


def _resize(rows: Tensor, heads: int, width: int, new_heads: int, new_width: int) -> Tensor:
    """(heads·width, …) to (new_heads·new_width, …): zeros where it grows, the rest cut off where it shrinks."""
    if (heads, width) == (new_heads, new_width):
        return rows
    new = rows.new_zeros((new_heads, new_width, *rows.shape[1:]))
    both, common = min(heads, new_heads), min(width, new_width)
    new[:both, :common] = rows.unflatten(0, (heads, width))[:both, :common]
    return new.flatten(0, 1)


def _transposed(change: Change) -> Change:
    return Change(
        lambda tensor, sizes: change.there(tensor.T, sizes).T.contiguous(),
        lambda tensor, sizes: change.back(tensor.T, sizes).T.contiguous(),
    )


SAME = Change(lambda tensor, _: tensor, lambda tensor, _: tensor)
# Gemma's norm multiplies with 1 + w; in bfloat16 the sum would lose what w says.
PLUS_ONE = Change(lambda tensor, _: tensor.float() + 1, lambda tensor, _: tensor - 1)

IN_PROJ = _resized(lambda size: [size.head_dim, size.head_dim, size.state, size.state, 1])
CONVOLUTION = _resized(lambda size: [size.head_dim, size.state, size.state])
HEADS = _resized(lambda size: [1])
CHANNELS = _resized(lambda size: [size.head_dim])
OUT_PROJ = _transposed(CHANNELS)


# llama.cpp's own shapes: a column for what is one number a head, rates instead of their logarithms, a row of norm
# weights a head, taps without the dimension of one channel.
COLUMN = Change(lambda tensor, _: tensor.unsqueeze(1), lambda tensor, _: tensor.squeeze(1))
RATE = Change(lambda tensor, _: -tensor.exp(), lambda tensor, _: (-tensor).log())
BY_HEAD = Change(
    lambda tensor, sizes: tensor.unflatten(0, (sizes.padded.heads, sizes.padded.head_dim)),
    lambda tensor, _: tensor.flatten(),
)
TAPS = Change(lambda tensor, _: tensor.squeeze(1), lambda tensor, _: tensor.unsqueeze(1))


def _paired(heads: Callable[[Sizes], int]) -> Change:
    """Rotary pairs: Hugging Face rotates channel i with i + P/2, llama.cpp (for this architecture) 2i with 2i + 1."""

    def interleave(rows: Tensor, sizes: Sizes) -> Tensor:
        halves = rows.unflatten(0, (heads(sizes), 2, -1))
        return halves.transpose(1, 2).flatten(0, 2).contiguous()

    def separate(rows: Tensor, sizes: Sizes) -> Tensor:
        pairs = rows.unflatten(0, (heads(sizes), -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2).contiguous()

    return Change(interleave, separate)


QUERIES = _paired(lambda sizes: sizes.q_heads)
KEYS = _paired(lambda sizes: sizes.kv_heads)


def _in_fused(there: bool) -> Callable[[Tensor, Sizes], Tensor]:
    """Queries, keys and values one under another, each paired in its own rows."""

    def pair(rows: Tensor, sizes: Sizes) -> Tensor:
        head_dim = rows.shape[0] // (sizes.q_heads + 2 * sizes.kv_heads)
        q, k, v = rows.split([head_dim * heads for heads in (sizes.q_heads, sizes.kv_heads, sizes.kv_heads)])
        paired = [(change.there if there else change.back)(x, sizes) for change, x in ((QUERIES, q), (KEYS, k))]
        return torch.cat([*paired, v])

    return pair


FUSED = Change(_in_fused(True), _in_fused(False))
