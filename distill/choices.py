"""What a student is asked to be: everything that a conversion takes besides its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, get_args

from distill.copies import require_copies
from distill.errors import UserError
from distill.heads import Heads
from distill.mixers import KINDS
from distill.mixers.rotary import Rope


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The keyword arguments of ``distill.convert``; what depends on the teacher is checked against it by the plan.

    Attributes:
        mixer: what takes attention's place, a key of ``distill.mixers.KINDS``.
        keep_attention: 0-based indices of the layers that keep attention; with all of them the student equals the
            teacher bit for bit.
        keep_heads: query heads that keep attention beside the mixer of their layer, by layer, such as ``{3: [0, 2]}``.
        seed: for the tokens the seeding looks at and for mixers that start at random; the same seed, the same student.
        seed_from_attention: copy the attention weights into the mixers; False starts the mixers at random, attention
            behind a window (``window_layers``, ``sliding_window``) too.
        from_scratch: take nothing from the teacher but its shape: all weights start as its class starts them.
        expand: heads of the mixer for each of attention's (``distill.copies``).
        state_dim: state size of a head; None means the teacher's head size (``based``: queries' and keys', at most 16).
        conv_width: taps of the mixers' short convolution.
        rope: ``keep`` gives the mixers the teacher's rotary positions (``distill.mixers.rotary``), ``drop`` does not.
        bidirectional: for a teacher that reads images in both directions; ``"causal"`` lets mixers read them one way.
        window_layers: 0-based indices of layers with attention behind a window, beside those with the mixer; with the
            teacher's weights unless ``seed_from_attention`` is False.
        window, sinks: of these, or of ``sliding_window``: the tokens that they see (``distill.window``); 64, 4 if None.

    Raises:
        UserError: for a mixer that there is none of, or a choice that no teacher would make possible.
    """

    mixer: str = "mamba2"
    keep_attention: Sequence[int] = ()
    keep_heads: Heads | None = None
    seed: int = 0
    seed_from_attention: bool = True
    from_scratch: bool = False
    expand: int = 1
    state_dim: int | None = None
    conv_width: int = 4
    rope: str = "drop"
    bidirectional: str = "refuse"
    window_layers: Sequence[int] = ()
    window: int | None = None
    sinks: int | None = None

    def __post_init__(self) -> None:
        if self.mixer not in KINDS:
            raise UserError(f"mixer is {self.mixer!r}; allowed are {', '.join(sorted(KINDS))}")
        for name, size in (("state_dim", self.state_dim), ("conv_width", self.conv_width)):
            if size is not None and size < 1:
                raise UserError(f"{name} is {size}; it must be at least 1")
        if self.rope not in get_args(Rope):
            raise UserError(f"rope is {self.rope!r}; allowed are {', '.join(get_args(Rope))}")
        require_copies(self.expand, self.mixer, bool(self.keep_heads))


class Chosen(TypedDict, total=False):
    """`Choices` as keyword arguments, for editors and type checkers: ``**choices: Unpack[Chosen]``."""

    mixer: str
    keep_attention: Sequence[int]
    keep_heads: Heads | None
    seed: int
    seed_from_attention: bool
    from_scratch: bool
    expand: int
    state_dim: int | None
    conv_width: int
    rope: str
    bidirectional: str
    window_layers: Sequence[int]
    window: int | None
    sinks: int | None
