"""What a process holds under each engine, and what it sends: one table of formulas.

======  ====================================================================================================
symbol  meaning
======  ====================================================================================================
R       processes, one a device
n, t    parameters of the student, and those of them that the stage trains; weights, gradients and AdamW's
        two moments are fp32, 4 bytes each
m, b    parameters of the teacher, and bytes of one; m = 0 where its predictions are read from disk
u, u_t  parameters that the stage's forward runs through, of the student and of the teacher
l, l_t  of these in the largest layer
c, c_t  parameters of the largest layer or single matrix, whatever the stage runs
e, e_t  parameters outside the layers, embeddings and head; f of the student's e are trained, less what g has
w       bfloat16 copies of the fp32 weights that the graph holds, made by autocast (bytes): of all layers in the last
        stage, of one with gradient checkpointing and in the first two stages
g, q    what autograd keeps, and what the teacher read and wrote in the converted layers (bytes)
h       what converted layers that are fed the teacher's states keep in the last stage, with hidden_weight (bytes)
K       converted layers; s = ⌈K / R⌉ / K is the largest share of them that falls to one process
a       micro-batches a step
======  ====================================================================================================

Bytes on each process::

    mode           teacher  student  gradients  optimizer  working space
    one, ddp       b m      4 n      4 t        8 t        w
    zero1          b m      4 n      4 t        12 t/R     w + 4 min(t, c)
    zero2          b m      4 n      4 t/R      12 t/R     w + 4 min(t, c)
    fsdp2          b m/R    4 n/R    4 t/R      8 t/R      4 e + max(w + 16 l + 4 f, w + 8 l + b e_t, b (2 l_t + e_t))
    zero3          b m/R    4 n/R    4 t/R      12 t/R     w + 4 min(u, 2 c) + b min(u_t, 2 c_t) + 4 min(t, c)
    zero3_offload  -        -        -          -          as zero3; and (b m + 4 n + 16 t)/R of the host's memory
    layers         b m      4 n      4 t s      8 t s      w

and everywhere g + q of activations, but g + q / K with one and layers, which are done with a layer before the teacher's
next one runs, where the other engines need a single backward for all; there h comes on top. With fsdp2 and one
micro-batch a step, gradients come as activations go, so that of the two the larger counts: its activations are g + q
less the gradients. (Elsewhere gradients have their place from step to step, or are there from the micro-batches
before.) DeepSpeed keeps an fp32 copy of the weights it updates beside weights that are fp32 already, hence 12 and not
8. Under fsdp2 what stands outside the layers is whole while a batch is computed, and of the layers two at a time (the
one that computes and the one fetched ahead): first the teacher's, then the student's with the teacher's head still
whole, and last the student's with gradients. The head's gradient is formed with the loss, and so is part of g where
that is the worst moment. DeepSpeed is told by `distill.engines.zero` to reduce c gradients together, and to keep at
most 2 c weights of a model gathered.

Bytes that each process sends a step, times (R − 1)/R::

    ddp            8 t                       all-reduce of the gradients
    zero1          8 t                       gradients reduced, weights gathered
    zero2          4 t a + 4 t               gradients are reduced after every micro-batch
    fsdp2, zero3   a (8 u + b u_t + 4 t)     weights gathered forward and backward, gradients reduced
    one, layers    0

`layers` is not an engine but ``parallel: layers`` in a recipe's first two stages: every process trains layers of its
own, on the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from transformers import PreTrainedModel

from distill.costs import DTYPES, Kept, Sizes, runs_teacher
from distill.reach import trained
from distill.recipe import HiddenStage, LayerwiseTraining, LogitsStage, MixingStage, Recipe, Stage


@dataclass(frozen=True)
class Memory:
    """Bytes on each process at the worst moment of a step.

    Attributes:
        working: layers gathered for the moment, low-precision copies of weights, buckets.
    """

    teacher: int
    student: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.teacher + self.student + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class Numbers:
    """The symbols of the table above, of one stage."""

    R: int
    n: int
    t: int
    m: int
    b: int
    u: float
    u_t: int
    l: float
    l_t: float
    c: float
    c_t: float
    e: int
    e_t: int
    f: int
    w: int
    g: int
    q: int
    K: int
    a: int
    h: int = 0

    @property
    def s(self) -> float:
        return ceil(self.K / self.R) / self.K if self.K else 1.0


ENGINES = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
"""Those of several processes, the least communication first."""

Formula = Callable[[Numbers], float]


class Mode(NamedTuple):
    """A row of the two tables; bytes.

    Attributes:
        sent: a step, before the factor (R − 1)/R.
        on_host: in the memory of the host, for each process.
    """

    teacher: Formula
    student: Formula
    gradients: Formula
    optimizer: Formula
    working: Formula
    sent: Formula
    on_host: Formula = lambda k: 0


MODES: dict[str, Mode] = {
    "one": Mode(
        teacher=lambda k: k.b * k.m,
        student=lambda k: 4 * k.n,
        gradients=lambda k: 4 * k.t,
        optimizer=lambda k: 8 * k.t,
        working=lambda k: k.w,
        sent=lambda k: 0,
    ),
    "ddp": Mode(
        teacher=lambda k: k.b * k.m,
        student=lambda k: 4 * k.n,
        gradients=lambda k: 4 * k.t,
        optimizer=lambda k: 8 * k.t,
        working=lambda k: k.w,
        sent=lambda k: 8 * k.t,
    ),
    "zero1": Mode(
        teacher=lambda k: k.b * k.m,
        student=lambda k: 4 * k.n,
        gradients=lambda k: 4 * k.t,
        optimizer=lambda k: 12 * k.t / k.R,
        working=lambda k: k.w + _bucket(k),
        sent=lambda k: 8 * k.t,
    ),
    "zero2": Mode(
        teacher=lambda k: k.b * k.m,
        student=lambda k: 4 * k.n,
        gradients=lambda k: 4 * k.t / k.R,
        optimizer=lambda k: 12 * k.t / k.R,
        working=lambda k: k.w + _bucket(k),
        sent=lambda k: 4 * k.t * k.a + 4 * k.t,
    ),
    "fsdp2": Mode(
        teacher=lambda k: k.b * k.m / k.R,
        student=lambda k: 4 * k.n / k.R,
        gradients=lambda k: 4 * k.t / k.R,
        optimizer=lambda k: 8 * k.t / k.R,
        working=lambda k: (
            4 * k.e + max(k.w + 16 * k.l + 4 * k.f, k.w + 8 * k.l + k.b * k.e_t, k.b * (2 * k.l_t + k.e_t))
        ),
        sent=lambda k: k.a * (8 * k.u + k.b * k.u_t + 4 * k.t),
    ),
    "zero3": Mode(
        teacher=lambda k: k.b * k.m / k.R,
        student=lambda k: 4 * k.n / k.R,
        gradients=lambda k: 4 * k.t / k.R,
        optimizer=lambda k: 12 * k.t / k.R,
        working=lambda k: k.w + _live(k) + _bucket(k),
        sent=lambda k: k.a * (8 * k.u + k.b * k.u_t + 4 * k.t),
    ),
    "zero3_offload": Mode(
        teacher=lambda k: 0,
        student=lambda k: 0,
        gradients=lambda k: 0,
        optimizer=lambda k: 0,
        working=lambda k: k.w + _live(k) + _bucket(k),
        sent=lambda k: k.a * (8 * k.u + k.b * k.u_t + 4 * k.t),
        on_host=lambda k: (k.b * k.m + 4 * k.n + 16 * k.t) / k.R,
    ),
    "layers": Mode(
        teacher=lambda k: k.b * k.m,
        student=lambda k: 4 * k.n,
        gradients=lambda k: 4 * k.t * k.s,
        optimizer=lambda k: 8 * k.t * k.s,
        working=lambda k: k.w,
        sent=lambda k: 0,
    ),
}


def _bucket(k: Numbers) -> float:
    return 4 * min(k.t, k.c)


def _live(k: Numbers) -> float:
    return 4 * min(k.u, 2 * k.c) + k.b * min(k.u_t, 2 * k.c_t)


def modes_for(stage: Stage, processes: int) -> list[str]:
    """What a stage can run under, the least communication first; `layers` last, whose teachers do all work R times.

    A stage with ``parallel: layers`` runs so under any engine.
    """
    if processes == 1:
        return ["one"]
    if isinstance(stage, LayerwiseTraining) and stage.parallel == "layers":
        return ["layers"]
    return [*ENGINES, *(["layers"] if isinstance(stage, LayerwiseTraining) else [])]


def sharing(mode: str, processes: int) -> int:
    """How many processes share a step's sequences: by layers none do, each reads them all."""
    return 1 if mode == "layers" else processes


def numbers(
    recipe: Recipe, stage: Stage, sizes: Sizes, student: PreTrainedModel, kept: Kept, *, passes: int, processes: int
) -> Numbers:
    """What the formulas need to know of one stage.

    Args:
        student: may be without weights, on the meta device; ``sizes`` are its.
        kept: of a micro-batch, as `distill.costs.kept_for_backward` returns it.
        passes: micro-batches a step.
    """
    of_student = sizes.student
    teacher = sizes.teacher if runs_teacher(stage) else dict.fromkeys(sizes.teacher, 0)
    mixers, n_mixers = of_student["mixer"], sizes.n_changed
    if isinstance(stage, MixingStage):  # which leaves windows alone
        mixers, n_mixers = mixers - sizes.window_weights, sizes.n_scanned
    mixer, mlp = mixers / max(1, n_mixers), of_student["mlp"] / sizes.n_layers
    whole = max(mixer, of_student["attention"] / max(1, sizes.n_kept)) + mlp
    of_teacher = (teacher["attention"] + teacher["mlp"]) / sizes.n_layers
    embedding = sizes.hidden * sizes.vocabulary
    if isinstance(stage, LogitsStage):
        layer = whole
        ran, ran_in_teacher = float(sum(of_student.values())), sum(teacher.values())
        if stage.hidden_weight:  # the layers with a mixer, and the teacher's, a second time
            ran, ran_in_teacher = ran + (mixer + mlp) * sizes.n_changed, 2 * ran_in_teacher - teacher["head"]
    else:
        layer = mixer + (mlp if isinstance(stage, HiddenStage) and stage.target == "block" else 0)
        ran, ran_in_teacher = layer * n_mixers, sum(teacher.values()) - teacher["head"]
    return Numbers(
        R=processes,
        n=sum(of_student.values()),
        t=sum(parameter.numel() for parameter in trained(student, stage).values()),
        m=sum(teacher.values()),
        b=DTYPES[recipe.teacher.dtype].itemsize,
        u=ran,
        u_t=ran_in_teacher,
        l=layer,
        l_t=of_teacher,
        c=max(whole, embedding),
        c_t=max(of_teacher, embedding),
        e=of_student["embeddings"] + of_student["head"],
        e_t=teacher["embeddings"] + teacher["head"],
        f=sum(of_student[role] for role in stage.train if role in ("embeddings", "head")) - kept.head // 4,
        w=kept.weights,
        g=kept.graph,
        q=kept.traces,
        K=n_mixers,
        a=passes,
        h=kept.beside,
    )


def memory(mode: str, k: Numbers) -> Memory:
    """Bytes on each process, part by part."""
    row = MODES[mode]
    gradients = ceil(row.gradients(k))
    replaced = gradients if mode == "fsdp2" and k.a == 1 else 0
    layerwise = mode in ("one", "layers")
    traces = ceil(k.q / max(1, k.K)) if layerwise else k.q + k.h
    return Memory(
        teacher=ceil(row.teacher(k)),
        student=ceil(row.student(k)),
        gradients=gradients,
        optimizer=ceil(row.optimizer(k)),
        activations=max(0, k.g + traces - replaced),
        working=ceil(row.working(k)),
    )


def bytes_sent(mode: str, k: Numbers) -> float:
    """Bytes that each process sends in a step, as rings do it."""
    return MODES[mode].sent(k) * (k.R - 1) / k.R
