"""What a stage costs: floating-point operations, by formula, and memory.

========  =============================================================================
symbol    meaning
========  =============================================================================
L, K      layers; of these the ones that keep attention (the other L − K get a mixer)
T         tokens a sequence, `data.block`
D, V      hidden size, vocabulary
H, P, N   heads, channels a head, state size a head
Q         positions the scan takes at once, `distill.ssd.chunked.CHUNK`
n_role    parameters of a role (`distill.roles`); n_role of the student, unless marked t for the teacher
========  =============================================================================

Floating-point operations a token, forward, multiplications and additions counted apart; what is elementwise
(norms, activations, rotary positions, the short convolution) is left out::

    matrices    2 n                        n weights, each used once
    attention   4 T H P                    scores and weighted sum, the masked upper triangle included
    scan        H (2 Q (N + P) + 4 P N)    inside chunks (scores, sums); between chunks (written, read)
    head        2 D V

Backward costs twice the forward, and n weights that are frozen save 2 n of it. So a token of training costs::

    teacher     2 (n_attention + n_mlp)t + L attention
    mixing      teacher + (L − K) 2 T H P  +  3 (2 n_mixer + (L − K) 2 T H N)
    hidden      teacher                    +  3 (2 n_mixer + (L − K) scan)     and, with target: block,
                                           +  3 · 2 n_mlp (L − K) / L
    logits      teacher + head             +  3 (2 (n_mixer + n_attention + n_mlp) + (L − K) scan
                                                 + K attention + head)

The first two stages never run the head. Evaluation, checkpoints and the conversion come on top.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from distill import activations
from distill.layout import mixer_layers
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Recipe, Stage
from distill.ssd.chunked import CHUNK

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The logit loss turns this many logits into fp32 at a time, in about this many copies.
_LOSS_CHUNK, _LOSS_COPIES = 2**25, 6


@dataclass(frozen=True)
class Memory:
    """Bytes on each process, without sharding."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class Kept(NamedTuple):
    """Bytes that a micro-batch keeps for backward: at the worst moment, and in all, one layer after the other."""

    at_once: int
    in_all: int


@dataclass(frozen=True)
class Sizes:
    """The numbers of the formulas above; parameters by role."""

    n_layers: int
    n_kept: int
    hidden: int
    vocabulary: int
    heads: int
    head_dim: int
    state_dim: int
    block: int
    teacher: dict[str, int]
    student: dict[str, int]

    @property
    def n_changed(self) -> int:
        return self.n_layers - self.n_kept


def sizes_of(student: PreTrainedModel, block: int, teacher_roles: dict[str, int], roles: dict[str, int]) -> Sizes:
    """The sizes of a student, with the parameters by role of its teacher and its own."""
    text, mixer = student.config.get_text_config(), student.config.distill["mixer"]
    return Sizes(
        n_layers=text.num_hidden_layers,
        n_kept=text.num_hidden_layers - len(mixer_layers(student.config)),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        heads=mixer["n_heads"],
        head_dim=mixer["head_dim"],
        state_dim=mixer["state_dim"],
        block=block,
        teacher=teacher_roles,
        student=roles,
    )


def flops_per_token(sizes: Sizes, stage: Stage) -> float:
    """Floating-point operations that training costs a token, teacher and student together."""
    s, n = sizes, sizes.student
    chunk = min(CHUNK, s.block)
    attention = 4 * s.block * s.heads * s.head_dim
    scan = s.heads * (2 * chunk * (s.state_dim + s.head_dim) + 4 * s.head_dim * s.state_dim)
    head = 2 * s.hidden * s.vocabulary
    teacher = 2 * (s.teacher["attention"] + s.teacher["mlp"]) + s.n_layers * attention
    if isinstance(stage, MixingStage):
        teacher += s.n_changed * 2 * s.block * s.heads * s.head_dim
        return teacher + 3 * (2 * n["mixer"] + s.n_changed * 2 * s.block * s.heads * s.state_dim)
    if isinstance(stage, HiddenStage):
        student = 2 * n["mixer"] + s.n_changed * scan
        mlp = n["mlp"] * s.n_changed / s.n_layers if stage.target == "block" else 0
        return teacher + 3 * (student + 2 * mlp) - (0 if "mlp" in stage.train else 2 * mlp)
    layers = 2 * (n["mixer"] + n["attention"] + n["mlp"]) + s.n_changed * scan + s.n_kept * attention
    frozen = sum(2 * n[role] for role in ("mixer", "attention", "mlp") if role not in stage.train)
    return teacher + head + 3 * (layers + head) - frozen


def memory(recipe: Recipe, stage: Stage, sizes: Sizes, kept: Kept) -> Memory:
    """What one process holds at the worst moment of a step: both models, the optimizer, one micro-batch.

    Student weights, gradients and AdamW's two moments are fp32.
    """
    trained = sum(sizes.student[role] for role in stage.train)
    teacher = _DTYPES[recipe.teacher.dtype].itemsize * sum(sizes.teacher.values())
    return Memory(
        weights=teacher + 4 * sum(sizes.student.values()),
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=kept.at_once,
    )


def kept_for_backward(recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel) -> Kept:
    """What a micro-batch keeps for its backward pass, at the precision of the recipe.

    Args:
        student: may be without weights, on the meta device.
    """
    in_logits = isinstance(stage, LogitsStage)
    return (_kept_by_logits if in_logits else _kept_by_layers)(recipe, stage, sizes, student)


def _kept_by_logits(recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel) -> Kept:
    """All layers, both models' logits and the gradient of the student's, and the loss of one chunk of them."""
    dtype, tokens = _DTYPES[recipe.dtype], stage.batch_size * sizes.block
    layers, kinds = student.get_decoder().layers, student.config.distill["layers"]
    saved = {
        kind: activations.of_layer(layers[kinds.index(kind)], sizes.hidden, sizes.block, dtype) for kind in set(kinds)
    }
    logits = sizes.vocabulary * (_DTYPES[recipe.teacher.dtype].itemsize + 2 * dtype.itemsize)
    in_all = stage.batch_size * sum(saved[kind] for kind in kinds) + tokens * logits
    elements = tokens * sizes.vocabulary
    return Kept(
        at_once=in_all + min(elements, _LOSS_CHUNK) * 4 * _LOSS_COPIES, in_all=in_all + elements * 4 * _LOSS_COPIES
    )


def _kept_by_layers(recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel) -> Kept:
    """A layer at a time, and what the teacher read and wrote in each, which stays until the last has trained."""
    if not sizes.n_changed:
        return Kept(0, 0)
    layer = student.get_decoder().layers[mixer_layers(student.config)[0]]
    shape = (sizes.hidden, sizes.block, _DTYPES[recipe.dtype])
    if isinstance(stage, MixingStage):
        saved = activations.of_matrix(layer.self_attn, *shape)
    elif isinstance(stage, HiddenStage) and stage.target == "block":
        saved = activations.of_layer(layer, *shape)
    else:
        saved = activations.of_mixer(layer.self_attn, *shape)
    traces = sizes.block * 3 * sizes.n_changed * sizes.hidden * _DTYPES[recipe.teacher.dtype].itemsize
    return Kept(
        at_once=stage.batch_size * (saved + traces), in_all=stage.batch_size * (sizes.n_changed * saved + traces)
    )
