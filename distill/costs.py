"""What a stage costs wherever it runs: floating-point operations, by formula, and what it keeps for backward.

========  =============================================================================
symbol    meaning
========  =============================================================================
L, K, W   layers; of these the ones that keep attention (the other L − K get a mixer), and of those with a mixer the
          ones that have attention behind a window
T         tokens a sequence, `data.block` or a stage's own
D, V      hidden size, vocabulary
H, P, N   heads, channels a head, state size a head
e         heads of a mixer for each of attention's, `distill.copies`: attention has H / e
Q         positions the scan takes at once, `distill.ssd.chunked.CHUNK`
R         rows of a strip of mixing matrices, `distill.objectives.strips.ROWS`, at most T
n_role    parameters of a role (`distill.roles`); n_role of the student, unless marked t for the teacher; of experts
          the share that a token meets
========  =============================================================================

Floating-point operations a token, forward, multiplications and additions counted apart; what is elementwise
(norms, activations, rotary positions, the short convolution) is left out::

    matrices    2 n                        n weights, each used once
    attention   4 T P H / e                scores and weighted sum, the masked upper triangle included
    scan        H (2 Q (N + P) + 4 P N)    inside chunks (scores, sums); between chunks (written, read)
    delta rule  H (Q (5 N + 3 P) + 6 P N)  instead, of gated_deltanet: two scores, sums, and a triangle solved for N + P
                                           columns; taken back, written, read
    head        2 D V

Backward costs twice the forward, and n weights that are frozen save 2 n of it. So a token of training costs::

    teacher     2 (n_attention + n_mlp)t + L attention
    mixing      teacher + M (T + R) H P        +  3 (2 n_mixer + M (T + R) H N),    M = L − K − W, theirs alone
    hidden      teacher                        +  3 (2 n_mixer + mixers)           and, with target: block,
                                               +  3 · 2 n_mlp (L − K) / L          or, with target: heads,
                                               −  3 · 2 H P D (L − K)
    logits      teacher + head                 +  3 (layers + head),  where
                                               mixers = (L − K − W) scan + W attention
               layers = 2 (n_mixer + n_attention + n_mlp) + mixers + K attention
                                               +  layers again, with gradient_checkpointing
                                               +  hidden with target: block, with hidden_weight

Heads that keep attention beside a mixer add 4 T P each, and 2 n for their weights, which n_attention has: threefold in
the last stage, once in stage 2, where they do not train. The first two stages never run the head, and a last stage with
an offline teacher no teacher. Projections that are frozen for a part of stage 2 save nothing: their gradient is
computed, as zeros. Computing a layer again stops before its last product, whose result backward does not need; that
fifth of it is counted all the same. Evaluation, checkpoints and the conversion come on top. Which weights, gradients
and moments a process holds depends on the engine: `distill.memory`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from distill import activations
from distill.data.batches import micro_batches
from distill.decoder import attention_of, layers_of
from distill.experts import idle_parameters
from distill.layout import ATTENTION, WINDOWED, kept_heads, mixer_layers
from distill.mixers import FEATURES
from distill.mixers.kept_heads import KeptHeads
from distill.mixers.sliding_window import SlidingWindowMixer
from distill.objectives import strips
from distill.objectives.chunked import VOCABULARY_SLICE, chunk_rows
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Recipe, Stage
from distill.ssd.chunked import CHUNK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMPUTED = 4 / 3
"""What computing a forward a second time makes of forward and backward, in operations and in bytes moved."""

_WRITTEN = 7
"""How often the loss writes each fp32 logit of a chunk, or a number as large (`distill.objectives.by_hand`)."""


class Kept(NamedTuple):
    """Bytes that a micro-batch keeps for its backward pass.

    Attributes:
        graph: what autograd keeps at the worst moment.
        traces: what the teacher read and wrote in the converted layers, in the first two stages.
        weights: bfloat16 copies of the fp32 weights that the graph holds at that moment, made by autocast.
        in_all: all that is kept, one layer after the other, as often as it is written; and what is moved as often as
            that without being kept, such as the strips of mixing matrices.
        head: how much of ``graph`` is the gradient of the language-model head.
        beside: what layers fed the teacher's states keep in the last stage, and these states, with hidden_weight.
    """

    graph: int
    traces: int
    weights: int
    in_all: int
    head: int = 0
    beside: int = 0


@dataclass(frozen=True)
class Sizes:
    """The numbers of the formulas above; parameters by role, of which ``idle`` are those of experts not met.

    ``heads`` are the mixers', ``copies`` of each of attention's.
    ``kept_heads`` keep attention beside mixers, in all layers together, with ``kept_weights`` of their own.
    ``n_windows`` of the layers with a mixer have attention behind a window, and ``window_weights`` of its parameters.
    """

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
    idle: int = 0
    mixer: str = "mamba2"
    kept_heads: int = 0
    kept_weights: int = 0
    copies: int = 1
    n_windows: int = 0
    window_weights: int = 0

    @property
    def n_changed(self) -> int:
        return self.n_layers - self.n_kept

    @property
    def n_scanned(self) -> int:
        return self.n_changed - self.n_windows

    @property
    def rows(self) -> int:
        return min(self.block, strips.ROWS["cuda"])


def sizes_of(student: PreTrainedModel, block: int, teacher_roles: dict[str, int], roles: dict[str, int]) -> Sizes:
    """The sizes of a student, with the parameters by role of its teacher and its own."""
    text, mixer = student.config.get_text_config(), student.config.distill["mixer"]
    kept = [module for module in student.modules() if isinstance(module, KeptHeads)]
    kinds = student.config.distill["layers"]
    kind = next((kind for kind in kinds if kind not in (ATTENTION, WINDOWED)), "mamba2")
    windows = [module for module in student.modules() if isinstance(module, SlidingWindowMixer)]
    return Sizes(
        n_layers=text.num_hidden_layers,
        n_kept=text.num_hidden_layers - len(mixer_layers(student.config)),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        heads=mixer["n_heads"],
        head_dim=mixer["head_dim"],
        state_dim=FEATURES[kind](mixer["state_dim"]) if kind in FEATURES else mixer["state_dim"],
        block=block,
        teacher=teacher_roles,
        student=roles,
        idle=idle_parameters(student),
        mixer=kind,
        kept_heads=sum(len(heads.heads) for heads in kept),
        kept_weights=sum(parameter.numel() for heads in kept for parameter in heads.parameters()),
        copies=mixer["n_heads"] // text.num_attention_heads,
        n_windows=len(windows),
        window_weights=sum(parameter.numel() for window in windows for parameter in window.parameters()),
    )


def flops_per_token(sizes: Sizes, stage: Stage) -> float:
    """Floating-point operations that training costs a token, teacher and student together."""
    return teacher_flops_per_token(sizes, stage) + student_flops_per_token(sizes, stage)


def cut(stage: Stage, ranks: int) -> tuple[int, int]:
    """How a step is cut up: (sequences a forward pass on a process, forward passes a step).

    Args:
        ranks: processes that share the data.
    """
    return micro_batches(stage.batch_size, stage.micro_batch_size, ranks)


def runs_teacher(stage: Stage) -> bool:
    """Whether the teacher computes beside the student, or its predictions were written to disk before."""
    return not (isinstance(stage, LogitsStage) and stage.offline_teacher)


def teacher_flops_per_token(sizes: Sizes, stage: Stage) -> float:
    """The teacher's forward, as far as a stage runs it."""
    if not runs_teacher(stage):
        return 0
    s = sizes
    layers = 2 * (s.teacher["attention"] + s.teacher["mlp"] - s.idle) + s.n_layers * _attention(s)
    if isinstance(stage, MixingStage):
        return layers + s.n_scanned * (s.block + s.rows) * s.heads * s.head_dim
    if isinstance(stage, HiddenStage):
        return layers
    return layers + _head(s) + (layers if stage.hidden_weight else 0)


def student_flops_per_token(sizes: Sizes, stage: Stage) -> float:
    """Forward and backward of what a stage runs of the student."""
    s, n = sizes, {**sizes.student, "mlp": sizes.student["mlp"] - sizes.idle}
    if isinstance(stage, MixingStage):
        matched = n["mixer"] - s.window_weights
        return 3 * (2 * matched + s.n_scanned * (s.block + s.rows) * s.heads * s.state_dim)
    # What a window hides is computed, and masked.
    mixers = 2 * n["mixer"] + s.n_scanned * _scan(s) + s.n_windows * _attention(s)
    scores = 4 * s.block * s.kept_heads * s.head_dim
    beside = 2 * s.kept_weights + scores  # heads beside mixers; they do not train in stage 2
    mlp = 2 * n["mlp"] * s.n_changed / s.n_layers  # of the layers with a mixer
    frozen_mlp = 0 if "mlp" in stage.train else mlp
    if isinstance(stage, HiddenStage):
        if stage.target == "block":
            return 3 * (mixers + mlp) - frozen_mlp + beside
        unused = 2 * s.heads * s.head_dim * s.hidden * s.n_changed if stage.target == "heads" else 0
        return 3 * (mixers - unused) + beside
    layers = mixers + 2 * (n["attention"] + n["mlp"]) + s.n_kept * _attention(s) + scores
    frozen = sum(2 * n[role] for role in ("mixer", "attention", "mlp") if role not in stage.train)
    again = layers if stage.gradient_checkpointing else 0
    alone = 0.0  # the layers with a mixer once more, on the teacher's hidden states
    if stage.hidden_weight:
        frozen_mixers = 0 if "mixer" in stage.train else 2 * n["mixer"]
        again_alone = mixers + mlp if stage.gradient_checkpointing else 0
        alone = 3 * (mixers + mlp + beside) - frozen_mlp - frozen_mixers + again_alone
    return 3 * (layers + _head(s)) - frozen + again + alone


def _scan(sizes: Sizes) -> int:
    s, chunk = sizes, min(CHUNK, sizes.block)
    if s.mixer == "gated_deltanet":
        return s.heads * (chunk * (5 * s.state_dim + 3 * s.head_dim) + 6 * s.head_dim * s.state_dim)
    return s.heads * (2 * chunk * (s.state_dim + s.head_dim) + 4 * s.head_dim * s.state_dim)


def _attention(sizes: Sizes) -> int:
    return 4 * sizes.block * sizes.heads // sizes.copies * sizes.head_dim


def _head(sizes: Sizes) -> int:
    return 2 * sizes.hidden * sizes.vocabulary


def kept_for_backward(recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel, sequences: int) -> Kept:
    """What a micro-batch keeps for its backward pass, at the precision of the recipe.

    Args:
        student: may be without weights, on the meta device.
        sequences: of the micro-batch.
    """
    if isinstance(stage, LogitsStage):
        return _kept_by_logits(recipe, stage, sizes, student, sequences)
    return _kept_by_layers(recipe, stage, sizes, student, sequences)


def _kept_by_logits(recipe: Recipe, stage: LogitsStage, sizes: Sizes, student: PreTrainedModel, sequences: int) -> Kept:
    """All layers, a chunk of logits, and the head's gradient, which is formed with the loss.

    With checkpointing only the layers' inputs, and one layer computed again. Of two moments that which takes more
    counts: at the loss, and where the widest gradient goes back through a layer. Then the chunk is gone, and the
    head's gradient too, unless the head is tied to the embeddings, whose own comes last.
    """
    dtype = DTYPES[recipe.dtype]
    every = _every_layer(sizes, student, dtype)
    layers = sequences * sum(layer.a_sequence for layer in every)
    chunk, gradient = _kept_by_chunk(recipe, stage, sizes, sequences), _head_gradient(stage, sizes)
    alone = _kept_by_layers_alone(recipe, stage, sizes, student, every, sequences)
    moved = 4 * _WRITTEN * sequences * sizes.block * sizes.vocabulary
    copied_head = sizes.hidden * sizes.vocabulary * dtype.itemsize if dtype != torch.float32 else 0
    waits = 0 if sizes.student["head"] else gradient
    if not stage.gradient_checkpointing:
        copies = sum(layer.once for layer in every) + copied_head
        back = sequences * max(layer.widest for layer in every) + waits
        graph, head = max((chunk + gradient, gradient), (back, waits))
        return Kept(layers + graph, 0, weights=copies, in_all=layers + moved + alone, head=head, beside=alone)
    inputs = 4 * sequences * sizes.block * sizes.hidden * len(every)  # under autocast too the hidden state is fp32
    largest = max(every, key=lambda layer: layer.a_sequence)
    at_head = chunk + gradient, copied_head, gradient
    at_layer = sequences * (largest.a_sequence + largest.widest) + waits, largest.once, waits
    graph, weights, head = max(at_head, at_layer, key=lambda moment: moment[0] + moment[1])
    in_all = round(RECOMPUTED * layers) + moved + alone
    return Kept(inputs + graph, 0, weights=weights, in_all=in_all, head=head, beside=alone)


def _kept_by_layers_alone(
    recipe: Recipe,
    stage: LogitsStage,
    sizes: Sizes,
    student: PreTrainedModel,
    every: list[activations.Saved],
    sequences: int,
) -> int:
    """What the layers with a mixer keep that are fed the teacher's hidden states, and these states."""
    if not stage.hidden_weight:
        return 0
    changed = mixer_layers(student.config)
    a_sequence = 0 if stage.gradient_checkpointing else sum(every[index].a_sequence for index in changed)
    state = sizes.block * sizes.hidden * DTYPES[recipe.teacher.dtype].itemsize
    return sequences * (a_sequence + _boundaries(changed) * state)


def _kept_by_chunk(recipe: Recipe, stage: LogitsStage, sizes: Sizes, sequences: int) -> int:
    """Scratch tensors of a chunk, and the final hidden states of both models and the gradient of the student's."""
    rows = sequences * sizes.block
    chunk = min(rows, chunk_rows(sizes.vocabulary)) * sizes.vocabulary
    if stage.ce_weight == 1 or not runs_teacher(stage):
        tensors = 2
    else:
        tensors = (4 if stage.divergence == "jsd" else 3) + (stage.ce_weight > 0)
    in_16_bits = 0
    if DTYPES[recipe.dtype] != torch.float32:  # the gradient of the logits, and a piece of the head's
        in_16_bits = 2 * (chunk + min(VOCABULARY_SLICE, sizes.vocabulary) * sizes.hidden)
    of_teacher = DTYPES[recipe.teacher.dtype].itemsize if runs_teacher(stage) else 0
    return 4 * tensors * chunk + in_16_bits + rows * sizes.hidden * (2 * 4 + of_teacher)


def _head_gradient(stage: LogitsStage, sizes: Sizes) -> int:
    """In fp32."""
    role = "head" if sizes.student["head"] else "embeddings"  # where they are tied
    return 4 * sizes.hidden * sizes.vocabulary if role in stage.train else 0


def _every_layer(sizes: Sizes, student: PreTrainedModel, dtype: torch.dtype) -> list[activations.Saved]:
    layers, kinds = layers_of(student), student.config.distill["layers"]
    kept = kept_heads(student.config)
    alike = [(kind, tuple(kept.get(index, ()))) for index, kind in enumerate(kinds)]
    saved = {
        each: activations.of_layer(layers[alike.index(each)], sizes.hidden, sizes.block, dtype) for each in set(alike)
    }
    return [saved[each] for each in alike]


def _kept_by_layers(recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel, sequences: int) -> Kept:
    """A layer at a time, and what the teacher read and wrote in each, which stays until the last has trained."""
    trained = _trained_alone(stage, student)
    if not trained:
        return Kept(0, 0, 0, 0)
    dtype, moved, room = DTYPES[recipe.dtype], 0, 0
    each = _each_alone(stage, sizes, student, trained, dtype)
    if isinstance(stage, MixingStage):
        heads = sequences * sizes.heads
        room = strips.working_bytes(heads, sizes.head_dim, sizes.state_dim, sizes.block, "cuda")
        # Written three times, as scores, as weights and as errors, and never kept.
        moved = len(trained) * 4 * heads * sizes.block * (sizes.block + sizes.rows) // 2
    largest = max(each, key=lambda saved: saved.a_sequence)
    traced = _traced(stage, sizes, trained)
    traces = sequences * sizes.block * traced * DTYPES[recipe.teacher.dtype].itemsize
    in_all = sequences * sum(saved.a_sequence for saved in each) + traces + moved
    return Kept(graph=sequences * largest.a_sequence + room, traces=traces, weights=largest.once, in_all=in_all)


def _trained_alone(stage: Stage, student: PreTrainedModel) -> list[int]:
    """The layers that one of the first two stages trains: with a mixer, and in the first with a matrix to match."""
    kinds = student.config.distill["layers"]
    matrices = isinstance(stage, MixingStage)
    return [index for index in mixer_layers(student.config) if not (matrices and kinds[index] == WINDOWED)]


def _each_alone(
    stage: Stage, sizes: Sizes, student: PreTrainedModel, trained: list[int], dtype: torch.dtype
) -> list[activations.Saved]:
    """What each of these layers keeps in a stage that trains them alone; those of one kind are alike."""
    layers, kinds = layers_of(student), student.config.distill["layers"]

    def of(layer: Any) -> activations.Saved:
        if isinstance(stage, MixingStage):
            return activations.of_matrix(attention_of(layer), sizes.hidden, sizes.block, dtype)
        if isinstance(stage, HiddenStage) and stage.target == "block":
            return activations.of_layer(layer, sizes.hidden, sizes.block, dtype)
        if isinstance(stage, HiddenStage) and stage.target == "heads":
            return activations.of_heads(attention_of(layer), sizes.hidden, sizes.block, dtype)
        return activations.of_mixer(attention_of(layer), sizes.hidden, sizes.block, dtype)

    first = {kinds[index]: index for index in reversed(trained)}
    saved = {kind: of(layers[index]) for kind, index in first.items()}
    return [saved[kinds[index]] for index in trained]


def _traced(stage: Stage, sizes: Sizes, changed: list[int]) -> int:
    """How many numbers a token the teacher's traces hold."""
    if isinstance(stage, MixingStage):
        return len(changed) * sizes.hidden
    if isinstance(stage, HiddenStage) and stage.target == "block":
        return _boundaries(changed) * sizes.hidden
    if isinstance(stage, HiddenStage) and stage.target == "heads":
        return len(changed) * (sizes.hidden + sizes.heads // sizes.copies * sizes.head_dim)
    return 2 * len(changed) * sizes.hidden


def _boundaries(changed: list[int]) -> int:
    """Hidden states before and behind the given layers; what leaves a layer enters the next."""
    return len({boundary for index in changed for boundary in (index, index + 1)})
