"""A training step of each stage beside the floor of its parts: what the loop, the capture and the losses add.

    python -m scripts.bench_steps                                              # about three minutes on two cores
    python -m scripts.bench_steps --stage logits --parts
    python -m scripts.bench_steps --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --heads 32 --kv-heads 8 \
        --intermediate 8192 --vocab 128256 --length 4096

A *step* is what the training loop does with one micro-batch: `Gradients.backward` of the stage's own objective, with
everything it checks, and the engine's step with clipping. Its *floor* is what no way of training could leave out, done
bare: the forward passes without the objective's bookkeeping, a loss that costs nothing (a sum), no clipping, no check.

    mixing   holds      the teacher's layers up to the last converted one; per converted layer the rotated queries and
                        keys, the mixer's factors forward and backward, and the streamed distance forward and backward
                        on factors of the same shapes and dtypes; AdamW
             leaves out hooks, casts of the hidden states, documents, scaling of the loss, clipping
    hidden   holds      the teacher's layers up to the last converted one; each mixer forward and backward; AdamW
             leaves out hooks, casts, the distance to the teacher's output, clipping
    logits   holds      the teacher with its head; the student forward and backward, head included; AdamW
             leaves out the divergence (softmaxes over the vocabulary, and its gradient), clipping

So a floor is not reachable, but a step near it spends its time where the models are. Random weights, one document a
sequence, every layer but one in ``--keep-every`` converted. Steps and floors take turns on the same weights and the
same optimizer; medians. ``--parts`` times the floor's parts one by one. ``TFLOP/s`` counts the step's matrix products
as torch sees them, so not those inside another library's kernels.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaForCausalLM, PreTrainedModel

from distill.attention import views
from distill.conversion import convert
from distill.engines.plain import PlainEngine
from distill.mixers import is_mixer
from distill.objective import Batch, Objective
from distill.objectives import streamed_mixing_distance
from distill.programs import report_user_errors
from distill.reach import reached
from distill.recipe import HiddenStage, LogitsStage, MixingStage, Stage
from distill.roles import roles
from distill.ssd.factors import MatrixFactors
from distill.student import mixers_of
from distill.training import parameter_groups
from distill.training.gradients import Gradients
from scripts.llama_shape import LlamaShape
from scripts.measure import Call, device_and_dtype, record, require_file, require_one_of, seconds, show
from stages.hidden import HiddenObjective
from stages.logits import LogitObjective
from stages.mixing import MixingObjective

TARGETS = {"mixing": 1.25, "hidden": 1.25, "logits": 1.10}
"""The most that a step may take, as a multiple of its floor."""
OBJECTIVES: dict[str, tuple[Any, Callable[..., Objective]]] = {
    "mixing": (MixingStage, MixingObjective),
    "hidden": (HiddenStage, HiddenObjective),
    "logits": (LogitsStage, LogitObjective),
}
TOKENS = 1  # a recipe's stage must say how many; nothing here reads it


@dataclass(frozen=True)
class Size:
    """The teacher's, which of its layers keep attention, and a batch's."""

    teacher: LlamaShape
    keep_every: int
    length: int
    batch: int


@dataclass(frozen=True)
class Setting:
    """What a step and its floor share: the same weights, the same optimizer, the same batch."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    engine: PlainEngine
    batch: Batch
    precision: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.batch["input_ids"].device

    def autocast(self) -> torch.autocast:
        """As the training loop's."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled, cache_enabled=False)


@report_user_errors()
def main(
    stage: Annotated[list[str] | None, typer.Option(help="mixing, hidden or logits; may be given again.")] = None,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 512,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 8,
    heads: Annotated[int, typer.Option(help="Query heads of the teacher.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads of the teacher.")] = 8,
    intermediate: Annotated[int, typer.Option(help="Width of the MLPs.")] = 1408,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32000,
    keep_every: Annotated[int, typer.Option(help="One layer in so many keeps attention.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16: autocast, and a teacher in bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="torch's threads; its default if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps and floors.")] = 5,
    parts: Annotated[bool, typer.Option("--parts", help="Time the floors' parts one by one, too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure every stage and print a table."""
    require_file(output)
    _, precision = device_and_dtype(device, dtype, ("float32", "bfloat16"))
    for name in stage or ():
        require_one_of("--stage", name, list(OBJECTIVES))
    if threads:
        torch.set_num_threads(threads)
    size = Size(LlamaShape(hidden, layers, heads, kv_heads, intermediate, vocab), keep_every, length, batch)
    rows = [measure(name, size, device, precision, repeats, parts) for name in stage or list(OBJECTIVES)]
    title = f"{layers} layers × {hidden}, vocabulary {vocab}, {batch} × {length} tokens, {dtype} on {device}"
    head = ("stage", "step, ms", "floor, ms", "step / floor", "at most", "tokens/s", "TFLOP/s")
    show(title, head, (_shown(row, batch * length) for row in rows))
    if parts:
        lines = [(row["stage"], name, f"{took * 1e3:.1f}") for row in rows for name, took in row["parts"].items()]
        show("parts of the floors", ("stage", "part", "ms"), lines)
    if output:
        record(output, {"size": asdict(size), "device": device, "dtype": dtype, "rows": rows})


def measure(name: str, size: Size, device: str, dtype: torch.dtype, repeats: int, with_parts: bool) -> dict[str, Any]:
    """One row; the models are made anew, so that one stage's optimizer is gone when the next begins."""
    make_settings, make_objective = OBJECTIVES[name]
    settings = make_settings.model_validate({"tokens": TOKENS})
    setting = made(size, settings, torch.device(device), dtype)
    objective = make_objective(setting.teacher, setting.student, settings)
    parts = FLOORS[name](setting)
    trains = step(setting, objective, settings)
    with FlopCounterMode(display=False, custom_mapping=_grouped_attention()) as counted:
        trains()
    times = seconds({"step": trains, "floor": partial(in_order, parts)}, repeats)
    row = {
        "stage": name,
        **times,
        "ratio": times["step"] / times["floor"],
        "target": TARGETS[name],
        "flops": counted.get_total_flops() / times["step"],
    }
    # They take turns, so that AdamW always finds the gradients that the mixers have just made.
    return row | ({"parts": seconds(parts, max(1, repeats // 2), warmup=0)} if with_parts else {})


def _grouped_attention() -> dict[Any, Callable[..., int]]:
    """How torch's fused attention counts, with keys and values of fewer heads, which torch's own formulas refuse."""

    def forward(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **named: Any) -> int:
        return sdpa_flop_count(q, [*q[:2], *k[2:]], [*q[:2], *v[2:]])

    def backward(
        y: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **named: Any
    ) -> int:
        return sdpa_backward_flop_count(y, q, [*q[:2], *k[2:]], [*q[:2], *v[2:]])

    attentions = [operation for operation in flop_registry if "scaled_dot_product" in str(operation)]
    return {operation: backward if "backward" in str(operation) else forward for operation in attentions}


def made(size: Size, settings: Stage, device: torch.device, dtype: torch.dtype) -> Setting:
    """A random teacher in ``dtype``, its seeded student in fp32, and the optimizer of what the stage trains."""
    gc.collect()  # the stage before may still hold its optimizer
    torch.manual_seed(0)
    with device:
        teacher = LlamaForCausalLM(size.teacher.config()).eval().requires_grad_(False)
    kept = [index for index in range(size.teacher.layers) if index % size.keep_every == size.keep_every // 2]
    student = convert(teacher, keep_attention=kept).float().to(device).train()
    groups = parameter_groups(
        student,
        roles(student).__getitem__,
        settings.train,
        lr=1e-6,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        asked=False,
        reached=reached(student, settings),
    )
    ids_BT = torch.randint(size.teacher.vocab, (size.batch, size.length), device=device)
    batch = {
        "input_ids": ids_BT,
        "labels": ids_BT,
        "position_ids": torch.arange(size.length, device=device).expand_as(ids_BT),
        "valid": torch.ones_like(ids_BT, dtype=torch.bool),
    }
    return Setting(teacher.to(dtype), student, PlainEngine(student, groups), batch, dtype)


def step(setting: Setting, objective: Objective, settings: Stage) -> Call:
    """What the training loop does between two lines of its log."""
    gradients = Gradients(objective, setting.engine, setting.device, setting.precision)

    def call() -> None:
        gradients.backward([setting.batch], lambda: False)
        setting.engine.step(settings.clip)

    return call


def in_order(parts: dict[str, Call]) -> None:
    for part in parts.values():
        part()


def mixing_floor(setting: Setting) -> dict[str, Call]:
    """Teacher, queries and keys, factors, distance, AdamW."""
    mixers = {index: slot for index, slot in mixers_of(setting.student).items() if is_mixer(slot)}
    attention = views(setting.teacher, mixers)
    u_BTD = hidden_states(setting)
    teacher_BTD = u_BTD.to(setting.teacher.dtype)
    rotary = setting.teacher.get_decoder().rotary_emb(teacher_BTD, setting.batch["position_ids"])

    @torch.no_grad()
    def queries_and_keys() -> tuple[Tensor, Tensor]:
        with setting.autocast():
            return [attention[index].queries_and_shared_keys(teacher_BTD, rotary) for index in mixers][-1]

    def factors() -> MatrixFactors:
        for mixer in mixers.values():
            with setting.autocast():
                made = mixer.matrix_factors(u_BTD)
                sums = [tensor.sum(dtype=torch.float32) for tensor in made.tensors() if tensor is not None]
            torch.stack(sums).sum().backward()
        return made

    q_BHTP, k_BKTP = queries_and_keys()
    made_once: list[Any] = [None if x is None else x.detach().requires_grad_() for x in factors().tensors()]
    leaves = MatrixFactors(*made_once)
    setting.engine.forget()

    def distance() -> None:
        for index in mixers:
            loss = streamed_mixing_distance(leaves, q_BHTP, k_BKTP, scaling=attention[index].scaling)
            torch.autograd.grad(loss, [tensor for tensor in leaves.tensors() if tensor is not None])

    return {
        "teacher's layers": partial(teacher_layers, setting),
        "queries and keys": queries_and_keys,
        "factors": factors,
        "distance": distance,
        "AdamW": partial(adamw, setting),
    }


def hidden_floor(setting: Setting) -> dict[str, Call]:
    """Teacher, mixers, AdamW."""
    u_BTD = hidden_states(setting)

    def mixers() -> None:
        for mixer in mixers_of(setting.student).values():
            with setting.autocast():
                total = mixer(u_BTD)[0].sum(dtype=torch.float32)
            total.backward()

    return {
        "teacher's layers": partial(teacher_layers, setting),
        "mixers": mixers,
        "AdamW": partial(adamw, setting),
    }


def logits_floor(setting: Setting) -> dict[str, Call]:
    """Teacher, student, AdamW."""
    inputs = {name: setting.batch[name] for name in ("input_ids", "position_ids")}

    @torch.no_grad()
    def teacher() -> None:
        with setting.autocast():
            setting.teacher(**inputs, use_cache=False)

    def student() -> None:
        with setting.autocast():
            total = setting.student(**inputs, use_cache=False).logits.sum(dtype=torch.float32)
        total.backward()

    return {"teacher": teacher, "student": student, "AdamW": partial(adamw, setting)}


FLOORS: dict[str, Callable[[Setting], dict[str, Call]]] = {
    "mixing": mixing_floor,
    "hidden": hidden_floor,
    "logits": logits_floor,
}


@torch.no_grad()
def teacher_layers(setting: Setting) -> None:
    """The teacher's decoder as it stands, without the layers above the last converted one."""
    decoder: Any = setting.teacher.get_decoder()
    layers = decoder.layers
    decoder.layers = layers[: max(mixers_of(setting.student)) + 1]
    try:
        with setting.autocast():
            decoder(input_ids=setting.batch["input_ids"], position_ids=setting.batch["position_ids"], use_cache=False)
    finally:
        decoder.layers = layers


def adamw(setting: Setting) -> None:
    setting.engine.optimizer.step()
    setting.engine.optimizer.zero_grad()


def hidden_states(setting: Setting) -> Tensor:
    """What a mixer reads, of the size of a normalised hidden state: the cost does not depend on the values."""
    return torch.randn(
        *setting.batch["input_ids"].shape, setting.student.config.get_text_config().hidden_size, device=setting.device
    )


def _shown(row: dict[str, Any], tokens: int) -> tuple[str, ...]:
    within = "" if row["ratio"] <= row["target"] else ", missed"
    return (
        row["stage"],
        f"{row['step'] * 1e3:.1f}",
        f"{row['floor'] * 1e3:.1f}",
        f"{row['ratio']:.3f}",
        f"{row['target']:.2f}{within}",
        f"{tokens / row['step']:,.0f}",
        f"{row['flops'] / 1e12:.2f}",
    )


if __name__ == "__main__":
    typer.run(main)
