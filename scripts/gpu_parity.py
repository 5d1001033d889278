"""What runs on this device computes what the fp64 references compute on the CPU: scan, losses, decoding, training.

    python -m scripts.gpu_parity --device cuda

Errors are the largest of output and gradients, each ‖got − expected‖ / ‖expected‖. The reference reads the very numbers
that the fast path reads, rounded to its dtype, so an error is that of computing alone. Exit code 1 if any row failed;
what is not installed is named and does not count.
"""

import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from distill.conversion import convert
from distill.errors import UserError
from distill.mixers import KINDS
from distill.objectives import attention_matrix, logit_loss, mixing_distance, streamed_mixing_distance
from distill.objectives.chunked import Head
from distill.objectives.through_head import logit_loss_through_heads
from distill.ssd import mixing_matrix, scan_reference
from distill.ssd.backends import CHOICE
from distill.ssd.factors import MatrixFactors
from scripts.bench_scan import contender
from scripts.measure import record, show

TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 3e-2}
"""bfloat16 has 8 bits of mantissa: a rounding is 4e-3 at most, and gradients add a few up."""
TF32 = 4e-3
"""What a kernel is allowed that multiplies fp32 in TF32, with 11 bits."""


@dataclass(frozen=True)
class Row:
    """One comparison; no error where it was not made."""

    what: str
    dtype: str
    error: float | None
    allowed: float
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None and not self.error <= self.allowed  # NaN fails


def scans(device: torch.device) -> Iterator[Row]:
    """Every backend of ours; mamba-ssm's through its wrapper, since it takes step and rate, which `scan` does not."""
    for dtype in TOLERANCES:
        inputs, weight = scan_inputs(dtype)
        expected = outputs_and_gradients(_recurrence, [x.double() for x in inputs], weight.double())
        for name, backend in (("distill", "torch"), ("distill", "fla"), ("mamba-ssm kernel", None)):
            what = f"scan: {name}" + (f" by {backend}" if backend else "")
            allowed = TOLERANCES[dtype] if backend == "torch" or dtype != torch.float32 else TF32
            try:
                if backend != "torch" and device.type != "cuda":
                    raise UserError(f"it needs a CUDA device, not the {device.type}")
                with _scanning_by(backend):
                    leaves = [x.to(device) for x in inputs]
                    got = outputs_and_gradients(contender(name, None), leaves, weight.to(device))
            except (ImportError, UserError) as problem:
                yield Row(what, str(dtype), None, allowed, f"not here: {str(problem).partition('. ')[0]}")
            except Exception as problem:  # whatever Triton raises: the others are to be compared all the same
                traceback.print_exc()
                yield Row(what, str(dtype), math.nan, allowed, type(problem).__name__)
            else:
                yield Row(what, str(dtype), error(got, expected), allowed)


def scan_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, step, A, B, C as `scripts.bench_scan` has them, 200 positions, and what y is weighted with."""
    torch.manual_seed(0)
    x, B, C, weight = (torch.randn(2, 200, 4, width).to(dtype) for width in (64, 32, 32, 64))
    step = F.softplus(torch.randn(2, 200, 4))
    return [x, step, -torch.logspace(-8, -2, 4, base=2), B, C], weight


def _recurrence(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return scan_reference(step * A, B, C, x * step[..., None])[0]


def mixing(device: torch.device) -> Iterator[Row]:
    """The streamed distance beside both matrices written out; grouped keys, padding and two documents."""
    for dtype in TOLERANCES:
        yield Row("mixing distance, streamed", str(dtype), _mixing_error(device, dtype), TOLERANCES[dtype])


def _mixing_error(device: torch.device, dtype: torch.dtype) -> float:
    torch.manual_seed(1)
    step = F.softplus(torch.randn(2, 150, 4))
    B, C = (torch.randn(2, 150, 4, 32).mul(32**-0.5).to(dtype) for _ in range(2))
    factors = [-step * torch.logspace(-2, -6, 4, base=2), B, C, step, torch.randn(4)]
    q, k = torch.randn(2, 4, 150, 32).to(dtype), torch.randn(2, 2, 150, 32).to(dtype)
    valid, document = torch.ones(2, 150, dtype=torch.bool), torch.zeros(2, 150, dtype=torch.long)
    valid[0, 140:], document[1, 70:] = False, 1

    def streamed(*leaves: Tensor) -> Tensor:
        constants = q.to(device), k.to(device), valid.to(device)
        return streamed_mixing_distance(
            MatrixFactors(*leaves), *constants, scaling=0.2, document_BT=document.to(device)
        )

    def written_out(*leaves: Tensor) -> Tensor:
        log_decay, B, C, step, skip = leaves
        starts = F.pad(document.diff() != 0, (1, 0), value=True)
        keys = k.double().repeat_interleave(2, dim=1)
        teacher = attention_matrix(q.double(), keys, scaling=0.2, document_BT=document)
        student = mixing_matrix(log_decay, B, C, resets_BT=starts) * step.mT[:, :, None]
        return mixing_distance(student + torch.diag_embed(skip[:, None].expand(-1, 150)), teacher, valid)

    expected = outputs_and_gradients(written_out, [x.double() for x in factors])
    return error(outputs_and_gradients(streamed, [x.to(device) for x in factors]), expected)


def logits(device: torch.device) -> Iterator[Row]:
    """The loss through the heads beside whole logits."""
    for dtype in TOLERANCES:
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            apart = _logits_error(device, dtype, divergence)
            yield Row(f"logit loss in chunks: {divergence}", str(dtype), apart, TOLERANCES[dtype])


def _logits_error(device: torch.device, dtype: torch.dtype, divergence: str) -> float:
    """As in training, the student's weights are fp32, under autocast, and the teacher's in ``dtype``."""
    torch.manual_seed(2)
    student, (teacher_ND, teacher_VD) = ((torch.randn(300, 64), torch.randn(3000, 64) * 64**-0.5) for _ in range(2))
    teacher_ND, teacher_VD = teacher_ND.to(dtype), teacher_VD.to(dtype)
    target_N = torch.randint(3000, (300,))
    options: dict[str, Any] = {"divergence": divergence, "reduction": "sum"}

    def through(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        constants = teacher_ND.to(device), Head(teacher_VD.to(device)), target_N.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return logit_loss_through_heads(hidden_ND, Head(weight_VD), *constants, **options)

    def whole(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        teacher_NV = teacher_ND.double() @ teacher_VD.double().T
        return logit_loss((hidden_ND @ weight_VD.T)[None], teacher_NV[None], **options)

    expected = outputs_and_gradients(whole, [x.double() for x in student])
    return error(outputs_and_gradients(through, [x.to(device) for x in student]), expected)


def mixers(device: torch.device) -> Iterator[Row]:
    """A student of every mixer, in training, on a padded batch: its logits, and in fp32 all gradients."""
    ids, mask = torch.arange(2 * 70).view(2, 70) % 300, torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    for kind in KINDS:
        student = convert(_teacher(), keep_attention=[1], mixer=kind)

        def outputs(model: Any) -> list[Tensor]:
            model.zero_grad()
            with torch.enable_grad():
                out = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits[mask.bool()]
                out.float().log_softmax(-1)[:, 7].mean().backward()
            return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

        expected = [x.clone() for x in outputs(student.double())]
        student.float().to(device)
        yield Row(f"a student: {kind}", str(torch.float32), error(outputs(student), expected), 1e-3)
        with torch.autocast(device.type, torch.bfloat16):
            got = outputs(student)[:1]
        yield Row(f"a student's logits: {kind}", str(torch.bfloat16), error(got, expected[:1]), 0.2)


def decoding(device: torch.device) -> Iterator[Row]:
    """Steps with a static cache, compiled (a CUDA graph on CUDA), beside the whole sequence at once."""
    student: Any = convert(_teacher(), keep_attention=[1])
    student.to(device)
    ids = torch.randint(300, (2, 24), device=device)
    ways: dict[str, Callable[..., Any]] = {"dynamic cache": student, "static cache": student}
    mode, backend = ("reduce-overhead", "inductor") if device.type == "cuda" else (None, "eager")
    ways["static cache, compiled"] = torch.compile(student.__call__, fullgraph=True, mode=mode, backend=backend)
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits[:, 8:].double().cpu()
        for way, forward in ways.items():
            static = way.startswith("static")
            cache = (
                StaticCache(config=student.config, max_cache_len=32) if static else DynamicCache(config=student.config)
            )
            student(ids[:, :8], past_key_values=cache)
            # Cloned, since a CUDA graph writes every step's logits to the same place.
            steps = [forward(ids[:, t : t + 1], past_key_values=cache).logits.clone() for t in range(8, 24)]
            got = torch.cat(steps, dim=1)
            yield Row(f"decoding: {way}", str(torch.float32), error([got], [expected]), TOLERANCES[torch.float32])


def _teacher() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: Iterable[Tensor], weight: Tensor | None = None
) -> list[Tensor]:
    """The output and the gradients of all inputs, of the output's sum, or of its product with ``weight``."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight)]


def error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative error of any."""
    errors = []
    for g, e in zip(got, expected, strict=True):
        g = g.double().cpu()
        errors.append(((g - e).norm() / e.norm()).nan_to_num(nan=torch.inf))
    return float(torch.stack(errors).max())


def compare(checks: Iterable[Callable[[torch.device], Iterable[Row]]], device: str, output: Path | None) -> NoReturn:
    """Make them, show a table, and end with code 1 if any failed.

    The figures are written row by row: who is ended while a kernel compiles leaves those that he has.
    """
    rows: list[Row] = []
    for row in (row for check in checks for row in _caught(check, torch.device(device))):
        rows.append(row)
        if output:
            figures = [asdict(row) | {"failed": row.failed} for row in rows]
            record(output, {"rows": figures, "failed": any(row.failed for row in rows)})
    show(f"parity on {device}", ("what", "dtype", "error", "allowed", ""), (shown(row) for row in rows))
    raise typer.Exit(int(any(row.failed for row in rows)))


def _caught(check: Callable[[torch.device], Iterable[Row]], device: torch.device) -> Iterator[Row]:
    """The rows of a check, and one that fails if it raised: the next check is to be made whatever the kernels did."""
    try:
        yield from check(device)
    except Exception as problem:
        traceback.print_exc()
        name = getattr(check, "func", check).__name__
        yield Row(f"{name}: all that follows", "", math.nan, 0.0, type(problem).__name__)


def shown(row: Row) -> tuple[str, ...]:
    values = ("", "") if row.error is None else (f"{row.error:.1e}", f"{row.allowed:.0e}")
    return row.what, row.dtype.removeprefix("torch."), *values, "FAILED " + row.note if row.failed else row.note


class _scanning_by:  # noqa: N801 (a context manager)
    """Inside, DISTILL_SCAN names this backend."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend

    def __enter__(self) -> None:
        self.before = os.environ.pop(CHOICE, None)
        if self.backend:
            os.environ[CHOICE] = self.backend

    def __exit__(self, *_: object) -> None:
        os.environ.pop(CHOICE, None)
        if self.before is not None:
            os.environ[CHOICE] = self.before


CHECKS: dict[str, Callable[[torch.device], Iterable[Row]]] = {
    "scans": scans,
    "mixing": mixing,
    "logits": logits,
    "mixers": mixers,
    "decoding": decoding,
}


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    check: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(CHECKS)}; all of them if not given.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Compare everything and print a table."""
    if unknown := set(check or ()) - set(CHECKS):
        raise typer.BadParameter(f"--check {', '.join(sorted(unknown))}: allowed are {', '.join(CHECKS)}")
    compare([CHECKS[name] for name in check or CHECKS], device, output)


if __name__ == "__main__":
    typer.run(main)
