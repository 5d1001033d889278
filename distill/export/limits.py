"""What each native format can say: the differences between them, on top of what ``distill.export.refusals`` checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from distill.export import names
from distill.export.changes import MixerSize
from distill.export.facts import StudentFacts
from distill.export.weights import Rule


@dataclass(frozen=True)
class Limits:
    """A format.

    Attributes:
        name: what ``--to`` and ``student.exportable`` call it.
        program: the class or program that reads it.
        rules: its names for a student's tensors.
        expand: what the width of the mixers, H·P, must be a multiple of the hidden size by; None for any whole number.
        needs_attention: it cannot run without a layer that keeps attention.
        scales: it has the multipliers of Granite (``facts.Scales`` and a free scaling of the scores).
        needs_rotation: its attention always rotates positions.
        mixer_bias: its mixers' output projection may have a bias.
        rope_types: the kinds of rotary positions it knows; None for all of transformers'.
        conv_widths: the widths of the short convolution it runs.
    """

    name: str
    program: str
    rules: Callable[[StudentFacts], Sequence[Rule]]
    expand: int | None
    needs_attention: bool
    scales: bool
    needs_rotation: bool
    mixer_bias: bool
    rope_types: tuple[str, ...] | None
    conv_widths: range

    def padded(self, facts: StudentFacts) -> MixerSize | None:
        """The mixers as the format gets them: with heads of zeros up to the width it asks for.

        None where no number of heads gives that width.
        """
        return self.widened(facts.mixer_size, facts.config.get_text_config().hidden_size)

    def widened(self, size: MixerSize, hidden: int) -> MixerSize | None:
        """:meth:`padded`, of mixers of any size."""
        least = ceil(size.inner / hidden)
        wanted = range(least, least + size.head_dim) if self.expand is None else range(self.expand, self.expand + 1)
        fitting = [times for times in wanted if times >= least and times * hidden % size.head_dim == 0]
        return replace(size, heads=fitting[0] * hidden // size.head_dim) if fitting else None


GRANITE = Limits(
    name="granite",
    program="GraniteMoeHybridForCausalLM",
    rules=lambda facts: names.granite(norm_plus_one=facts.scales.norm_plus_one),
    expand=None,
    needs_attention=True,
    scales=True,
    needs_rotation=False,
    mixer_bias=True,
    rope_types=None,
    conv_widths=range(1, 64),
)
BAMBA = Limits(
    name="bamba",
    program="BambaForCausalLM",
    rules=lambda _: names.bamba(),
    expand=None,
    needs_attention=True,
    scales=False,
    needs_rotation=True,
    mixer_bias=True,
    rope_types=None,
    conv_widths=range(1, 64),
)
GGUF = Limits(
    name="gguf",
    program="llama.cpp",
    rules=lambda _: names.gguf(),
    expand=2,
    needs_attention=True,
    scales=True,
    needs_rotation=False,
    mixer_bias=False,
    rope_types=("default", "linear", "llama3"),
    conv_widths=range(2, 64),
)

LIMITS: dict[str, Limits] = {limits.name: limits for limits in (GRANITE, BAMBA, GGUF)}
