"""Why a format cannot say a student: every reason at once, from the config alone, each with what would help.

The same code answers ``distill export``, a recipe's ``student.exportable`` and the table in docs/export.md.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from distill.decoder import norm_eps
from distill.errors import UserError
from distill.export.facts import SCALES, StudentFacts, facts_of
from distill.export.limits import LIMITS, Limits
from distill.export.weights import unplaced
from distill.layout import WINDOWED

ELSEWHERE = "no recipe setting changes that: distill export --to standalone keeps all of it"

_SILU = ("silu", "swish")
LEAVE_OUT, KEEP_ONE = "leave out", "keep one"
"""Remedies that are put into words when it is known which layers have attention that would do."""


@dataclass(frozen=True)
class Refusal:
    """One reason.

    Attributes:
        layers: which layers it is about; empty for the whole student.
        reason: what the format has no words for.
        remedy: what recipe setting makes it exportable.
    """

    layers: tuple[int, ...]
    reason: str
    remedy: str

    def __str__(self) -> str:
        where = f"{_layers(self.layers)}: " if self.layers else ""
        return f"{where}{self.reason}; {self.remedy}"


def check_exportable(config: PreTrainedConfig, to: str) -> StudentFacts:
    """The facts of a student that the format can say.

    Raises:
        UserError: it cannot; all reasons, one a line.
    """
    facts, limits = facts_of(config), LIMITS[to]
    found = refusals(facts, limits)
    if found:
        reasons = "".join(f"\n  {refusal}" for refusal in found)
        raise UserError(f"{to} ({limits.program}) cannot say this student:{reasons}")
    return facts


def refusals(facts: StudentFacts, limits: Limits) -> list[Refusal]:
    """Every reason why the format cannot say the student; none if it can."""
    if facts.config.get_text_config() is not facts.config:
        return [Refusal((), "it sees images, and the format holds a language model alone", ELSEWHERE)]
    found = [
        *_layout(facts, limits),
        *_numbers(facts, limits),
        *_parameters(facts, limits),
        *_attention(facts, limits),
        *(_mixers(facts, limits) if facts.mixers else ()),
    ]
    if any(refusal.remedy in (LEAVE_OUT, KEEP_ONE) for refusal in found):
        keepable = _keepable(facts, limits)
        return [replace(refusal, remedy=_remedy(refusal, keepable)) for refusal in found]
    return found


def _keepable(facts: StudentFacts, limits: Limits) -> list[int]:
    """The layers whose attention the format could say."""
    everywhere = facts.all_attention
    found = (*_parameters(everywhere, limits), *_attention(everywhere, limits))
    unsayable = {index for refusal in found if refusal.remedy == LEAVE_OUT for index in refusal.layers}
    return [index for index in range(len(facts.kinds)) if index not in unsayable]


def _remedy(refusal: Refusal, keepable: Sequence[int]) -> str:
    """What to do about attention, given the layers whose attention would do."""
    if refusal.remedy not in (LEAVE_OUT, KEEP_ONE):
        return refusal.remedy
    if not keepable:
        return f"no layer of the teacher has attention that would do, {ELSEWHERE.partition(': ')[2]}"
    if refusal.remedy == KEEP_ONE:
        return f"keep one, such as student.keep_attention: [{keepable[-1]}]"
    return f"leave {_layers(refusal.layers)} out of student.keep_attention"


_NO_CLASS = {
    "gated_deltanet": " (Qwen3-Next has such, with norms, gated attention and experts of its own around them)",
    "sliding_window": " (attention that also sees the first tokens, which it has no place for)",
}
"""What is known of the classes that might have had one."""


def _layout(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    for kind in sorted({facts.kinds[index] for index in facts.mixers} - {"mamba2"}):
        layers = tuple(index for index in facts.mixers if facts.kinds[index] == kind)
        beside = kind == WINDOWED and len(layers) < len(facts.mixers)
        remedy = "set student.window_layers: []" if beside else "set student.mixer: mamba2"
        yield Refusal(layers, f"{kind} mixers{_NO_CLASS.get(kind, '')}", remedy)
    if facts.heads:
        shown = "; ".join(f"layer {index}: {', '.join(map(str, heads))}" for index, heads in facts.heads.items())
        reason = f"single attention heads beside a mixer ({shown})"
        yield Refusal(tuple(facts.heads), reason, "set student.keep_heads: {}, or --to standalone, which keeps them")
    if limits.needs_attention and not facts.kept:
        reason = f"no layer keeps attention, which {limits.program} does not run without"
        yield Refusal((), reason, KEEP_ONE)


OTHER_PROJECTIONS, OTHER_NORMS = "attention with other projections", "norms in other places"
NO_PLACE = "parameters that have no place"
_VAGUE = (OTHER_PROJECTIONS, OTHER_NORMS, NO_PLACE)

# What parameters without a place mean, by their names within a layer; the first that matches counts.
_MEANINGS: tuple[tuple[str, str, bool], ...] = (
    (r"self_attn\.[qk]_(norm|layernorm)\.", "attention with normalised queries and keys", True),
    (r"self_attn\.sinks", "attention with sinks", True),
    (r"self_attn\.", OTHER_PROJECTIONS, True),
    (r"(expert|router|block_sparse_moe|mlp\.gate\.weight)", "a mixture of experts", False),
    (r"mlp\.(gate|up|down)_proj\.bias", "an MLP with biases", False),
    (r"mlp\.", "an MLP without a gate", False),
    (r"norm\w*\.bias", "a LayerNorm with a bias instead of an RMS norm", False),
    (r"norm", OTHER_NORMS, False),
)


def _parameters(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    """Parameters that the table of names does not take, and parameters that every layer must have."""
    found: dict[tuple[str, bool], list[tuple[int, str]]] = {}
    for name in unplaced(limits.rules(facts), len(facts.kinds), facts.shapes):
        if _in_mixer(facts, name):
            continue  # `_layout` and `_mixers` say so
        meaning, of_attention = _meaning(name)
        if facts.family not in SCALES and meaning in _VAGUE:
            continue  # the family is refused, and its names tell nothing more
        found.setdefault((meaning, of_attention), []).append((_layer(name), name))
    for (meaning, of_attention), places in found.items():
        layers = tuple(sorted({index for index, _ in places if index >= 0}))
        example = f"{meaning} ({places[0][1].removeprefix(f'model.layers.{places[0][0]}.')})"
        yield Refusal(layers, example, LEAVE_OUT if of_attention else ELSEWHERE)
    if facts.family not in SCALES:
        return
    bare = [
        index
        for index in range(len(facts.kinds))
        for norm in ("input_layernorm", "post_attention_layernorm")
        if f"model.layers.{index}.{norm}.weight" not in facts.shapes
    ]
    if bare:
        yield Refusal(tuple(sorted(set(bare))), "attention and MLP do not each have a norm before them", ELSEWHERE)


def _in_mixer(facts: StudentFacts, name: str) -> bool:
    return _layer(name) in facts.mixers and ".self_attn." in name


def _meaning(name: str) -> tuple[str, bool]:
    for pattern, meaning, of_attention in _MEANINGS:
        if re.search(pattern, name):
            return meaning, of_attention
    return NO_PLACE, False


def _attention(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    """What kept attention does beyond its parameters."""
    config: Any = facts.config
    windows = {index: window for index, window in facts.windows.items() if window is not None}
    if windows:
        reason = f"attention within a sliding window of {next(iter(windows.values()))} positions"
        yield Refusal(tuple(windows), reason, LEAVE_OUT)
    if facts.kept and getattr(config, "attn_logit_softcapping", None) is not None:
        yield Refusal(tuple(facts.kept), "attention scores with a soft cap", LEAVE_OUT)
    bare = [index for index, rotated in facts.rotary.items() if not rotated]
    if bare and (limits.needs_rotation or len(bare) < len(facts.kept)):
        others = "" if limits.needs_rotation else ", while other layers have them"
        reason = f"attention without rotary positions{others}"
        yield Refusal(tuple(bare), reason, LEAVE_OUT)
    if len(set(facts.scalings.values())) > 1:
        yield Refusal(tuple(facts.kept), "attention scores scaled differently by layer", LEAVE_OUT)
    if not limits.scales and facts.kept and not _close(facts.scaling, facts.head_dim**-0.5):
        reason = f"attention scores scaled by {facts.scaling:g} instead of 1/√{facts.head_dim}"
        yield Refusal(tuple(facts.kept), reason, "granite can say it: --to granite")
    yield from _rotation(facts, limits)


def _rotation(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    rotated = [index for index, rotated in facts.rotary.items() if rotated]
    rope = getattr(facts.config, "rope_parameters", None) or {}
    if not rotated:
        return
    if "rope_type" not in rope:
        yield Refusal(tuple(rotated), "rotary positions of different kinds in different layers", ELSEWHERE)
        return
    partial = rope.get("partial_rotary_factor", getattr(facts.config, "partial_rotary_factor", 1.0))
    if partial is not None and partial != 1:
        yield Refusal(tuple(rotated), f"only {partial:.0%} of a head's channels are rotated", ELSEWHERE)
    if limits.rope_types is not None and rope["rope_type"] not in limits.rope_types:
        known = ", ".join(limits.rope_types)
        reason = f"rotary positions of the kind {rope['rope_type']} ({limits.name} is written with: {known})"
        yield Refusal(tuple(rotated), reason, ELSEWHERE)


def _fewer_copies(facts: StudentFacts, limits: Limits) -> str:
    """What makes mixers narrow enough: of copies of a head (``distill.copies``) as many as the format has room for."""
    size, hidden = facts.mixer_size, facts.config.get_text_config().hidden_size
    fewer = range(size.heads // facts.q_heads - 1, 0, -1)
    fitting = (copies for copies in fewer if limits.widened(replace(size, heads=copies * facts.q_heads), hidden))
    copies = next(fitting, None)
    return ELSEWHERE if copies is None else f"set student.expand to {copies}"


def _mixers(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    mixer, config = facts.mixer, facts.config.get_text_config()
    layers = tuple(index for index in facts.mixers if facts.kinds[index] == "mamba2")
    if not layers:
        return
    if mixer.get("rope", "drop") != "drop":
        yield Refusal(layers, "mixers that rotate B and C", "set student.rope: drop")
    if limits.padded(facts) is None:
        size = facts.mixer_size
        wanted = "a whole multiple of" if limits.expand is None else f"{limits.expand} ×"
        reason = (
            f"{size.heads} heads of {size.head_dim} channels, which no added heads make {wanted} {config.hidden_size}"
        )
        yield Refusal(layers, reason, _fewer_copies(facts, limits))
    if mixer.get("out_bias") and not limits.mixer_bias:
        yield Refusal(layers, "mixers whose output projection has a bias", "granite can say it: --to granite")
    if mixer["conv_width"] not in limits.conv_widths:
        reason = f"a short convolution over {mixer['conv_width']} positions"
        yield Refusal(layers, reason, f"set student.conv_width to {limits.conv_widths.start} or more")
    eps = norm_eps(facts.config)
    if eps != mixer["norm_eps"]:
        reason = f"a gated norm with eps {mixer['norm_eps']:g}, where all norms share the decoder's {eps}"
        yield Refusal(layers, reason, ELSEWHERE)
    if facts.activation not in _SILU:
        reason = f"an MLP with {facts.activation}, which would be the convolution's activation too instead of SiLU"
        yield Refusal(layers, reason, ELSEWHERE)


def _numbers(facts: StudentFacts, limits: Limits) -> Iterator[Refusal]:
    """What the whole model does beyond its layers."""
    config: Any = facts.config
    if facts.family not in SCALES:
        known = ", ".join(sorted(SCALES))
        yield Refusal((), f"{facts.family} layers have not been shown to be what it runs ({known} have)", ELSEWHERE)
    if getattr(config, "final_logit_softcapping", None) is not None:
        yield Refusal((), "logits with a soft cap", ELSEWHERE)
    scales = facts.scales
    if not limits.scales and (scales.embedding, scales.residual, scales.logits) != (1, 1, 1):
        reason = "embeddings, residuals or logits with multipliers"
        yield Refusal((), reason, "granite can say them: --to granite")
    if limits.name != "granite" and scales.norm_plus_one:
        yield Refusal((), "norms that multiply with 1 + w", "granite can say them: --to granite")
    if not facts.mixers and limits.name == "gguf":
        yield Refusal((), "no layer has a mixer", "it is its teacher: convert that instead")


def _layers(layers: Iterable[int]) -> str:
    listed = [str(index) for index in layers]
    return f"layer{'s' if len(listed) > 1 else ''} {', '.join(listed)}"


def _layer(name: str) -> int:
    """The number of the layer a parameter is in, -1 if in none."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * abs(other)
