"""What runs on this device computes what the fp64 references compute on the CPU: scan, losses, decoding, training.

    python -m scripts.gpu_parity --device cuda

Errors are the largest of output and gradients, each ‖got − expected‖ / ‖expected‖. The reference reads the very numbers
that the fast path reads, rounded to its dtype, so an error is that of computing alone. Exit code 1 if any row failed;
what is not installed is named and does not count.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from distill.conversion import convert
from distill.errors import UserError
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

RECIPE = """\
name: gpu
run_dir: {folder}/run
device: {device}
dtype: {dtype}
teacher: {{path: teachers/stdlib-1m}}
student: {{keep_attention: [1]}}
data: {{source: {folder}/text, block: 128, held_out: {{fraction: 0.1, by: tail}}}}
stages:
  mixing: {{tokens: 16K, batch_size: 8}}
  hidden: {{tokens: 16K, batch_size: 8, lr: 1.0e-2}}
  logits: {{tokens: 16K, batch_size: 8}}
evaluation: {{tokens: 2K, batch_size: 8, prompts: ["def main("], new_tokens: 16}}
"""


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


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    training: Annotated[bool, typer.Option(help="Run the three stages of a tiny recipe, too.")] = True,
    output: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Compare everything and print a table."""
    checks: list[Callable[[torch.device], Iterable[Row]]] = [scans, mixing, logits, decoding]
    rows = [row for check in checks for row in _caught(check, torch.device(device))]
    if training:
        rows += trained(device)
    head = ("what", "dtype", "error", "allowed", "")
    show(f"parity on {device}", head, (shown(row) for row in rows))
    failed = any(row.failed for row in rows)
    if output:
        record(output, {"rows": [asdict(row) | {"failed": row.failed} for row in rows], "failed": failed})
    raise typer.Exit(int(failed))


def scans(device: torch.device) -> Iterator[Row]:
    """Every backend of ours; mamba-ssm's through its wrapper, since it takes step and rate, which `scan` does not."""
    for dtype in TOLERANCES:
        inputs, weight = scan_inputs(dtype)
        expected = outputs_and_gradients(_recurrence, [x.double() for x in inputs], weight.double())
        for name, backend in (("distill", "torch"), ("distill", "fla"), ("mamba-ssm kernel", None)):
            what = f"scan: {name}" + (f" by {backend}" if backend else "")
            allowed = TOLERANCES[dtype] if backend == "torch" or dtype != torch.float32 else TF32
            try:
                with _scanning_by(backend):
                    leaves = [x.to(device) for x in inputs]
                    got = outputs_and_gradients(contender(name, None), leaves, weight.to(device))
            except (ImportError, UserError) as problem:
                yield Row(what, str(dtype), None, allowed, f"not here: {str(problem).partition('. ')[0]}")
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


def decoding(device: torch.device) -> Iterator[Row]:
    """Steps with a static cache, compiled (a CUDA graph on CUDA), beside the whole sequence at once."""
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
    student: Any = convert(LlamaForCausalLM(config).eval(), keep_attention=[1])
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


def trained(device: str) -> Iterator[Row]:
    """The three stages of a tiny recipe from the shipped teacher: they finish, and no loss is higher at its end."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text").mkdir()
        for path in Path(sysconfig.get_path("stdlib"), "email").glob("*.py"):
            shutil.copy(path, folder / "text")
        recipe = folder / "gpu.yaml"
        recipe.write_text(RECIPE.format(folder=folder, device=device, dtype=dtype))
        done = subprocess.run([sys.executable, "-m", "stages.run", str(recipe)], capture_output=True, text=True)
        for stage in ("mixing", "hidden", "logits"):
            what = f"stage {stage}: loss at its end / at its start"
            told = folder / "run" / stage / "stage.json"
            if not told.exists():
                yield Row(what, dtype, math.nan, 1.0, done.stderr.strip().splitlines()[-1] if done.stderr else "")
                return
            losses = json.loads(told.read_text())
            yield Row(what, dtype, losses["loss_end"] / losses["loss_start"], 1.0)
    yield Row("stages.run: exit code", dtype, float(done.returncode), 0.0)


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


def _caught(check: Callable[[torch.device], Iterable[Row]], device: torch.device) -> Iterator[Row]:
    """The rows of a check, and one that fails if it raised: the next check is to be made whatever the kernels did."""
    try:
        yield from check(device)
    except Exception as problem:
        traceback.print_exc()
        yield Row(f"{check.__name__}: all that follows", "", math.nan, 0.0, type(problem).__name__)


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


if __name__ == "__main__":
    typer.run(main)
