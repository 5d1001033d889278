"""The logit loss through the head, chunk by chunk, beside whole logits: time and memory of forward and backward.

    python -m scripts.bench_logits                                  # 2048 tokens, hidden 1024, vocabularies 32K to 256K
    python -m scripts.bench_logits --vocabulary 32K --repeats 3 --output figures.json
    python -m scripts.bench_logits --device cuda --dtype bfloat16

    naive   both models' logits of all tokens, log_softmax in fp32, forward KL, autograd
    whole   distill.objectives.logit_loss, which keeps both models' logits and recomputes its chunks: as stage 3 was
    ours    distill.objectives.through_head.logit_loss_through_heads
    liger   Liger-Kernel's LigerFusedLinearJSDLoss with beta = 0, where liger-kernel and triton are installed: it is
            written in torch and runs on a CPU too; uncompiled, 1024 tokens a chunk, as it comes

Student and teacher have a head of their own, of the same size. Times are wall time, the median of calls that take
turns; memory is what a call adds at its worst moment in a fresh process, the head's gradient (vocabulary × hidden,
fp32) included. The naive form takes five times the fp32 logits, 5 GiB at 128K tokens.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import linear

from distill.objectives import logit_loss
from distill.objectives.chunked import Head
from distill.objectives.through_head import logit_loss_through_heads
from distill.programs import report_user_errors
from distill.units import size
from scripts.measure import device_and_dtype, peak_memory, record, require_file, seconds, show

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Student's hidden states (N, D) and weight (V, D), teacher's, and the next tokens (N,)."""


def made(tokens: int, vocabulary: int, hidden: int, device: str, dtype: str) -> Inputs:
    """Random heads whose logits are of the size of 1; student weights in fp32, the teacher's in ``dtype``."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    student_ND, student_VD = normal(tokens, hidden), normal(vocabulary, hidden).mul_(hidden**-0.5)
    teacher_ND, teacher_VD = normal(tokens, hidden), normal(vocabulary, hidden).mul_(hidden**-0.5)
    target_N = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    constant = getattr(torch, dtype)
    return (
        student_ND.requires_grad_(),
        student_VD.requires_grad_(),
        teacher_ND.to(constant),
        teacher_VD.to(constant),
        target_N,
    )


def naive(student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, target_N: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_NV = linear(teacher_ND, teacher_VD).float().log_softmax(-1)
    student_NV = linear(student_ND, student_VD).float().log_softmax(-1)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum()


def checkpointed(
    student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, target_N: Tensor
) -> Tensor:
    with torch.no_grad():
        teacher_NV = linear(teacher_ND, teacher_VD)
    return logit_loss(linear(student_ND, student_VD)[None], teacher_NV[None], reduction="sum")


def ours(student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, target_N: Tensor) -> Tensor:
    heads = Head(student_VD), Head(teacher_VD)
    return logit_loss_through_heads(student_ND, heads[0], teacher_ND, heads[1], target_N, reduction="sum")


def liger(student_ND: Tensor, student_VD: Tensor, teacher_ND: Tensor, teacher_VD: Tensor, target_N: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    # A mean over tokens, half of it with a hard loss whose weight is 0.
    return loss(student_ND, student_VD, teacher_ND, teacher_VD, target_N) * len(target_N)


CONTENDERS: dict[str, Callable[..., Tensor]] = {"naive": naive, "whole": checkpointed, "ours": ours}
if find_spec("liger_kernel") and find_spec("triton"):
    CONTENDERS["liger"] = liger


def prepare(name: str, shape: tuple[int, int, int], device: str, dtype: str) -> Callable[[], object]:
    """A call of one contender; what a fresh process does before its memory is watched."""
    small = made(8, 64, 16, device, dtype)
    both_ways(CONTENDERS[name], small, device, dtype)  # libraries have loaded what they need
    return partial(both_ways, CONTENDERS[name], made(*shape, device, dtype), device, dtype)


def both_ways(contender: Callable[..., Tensor], inputs: Inputs, device: str, dtype: str) -> dict[str, Tensor]:
    """Loss and gradients."""
    student_ND, student_VD = inputs[:2]
    student_ND.grad = student_VD.grad = None
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False):
        loss = contender(*inputs)
    loss.backward()
    assert student_ND.grad is not None
    assert student_VD.grad is not None
    return {"loss": loss.detach(), "hidden": student_ND.grad, "weight": student_VD.grad}


def distance(name: str, inputs: Inputs, device: str, dtype: str) -> dict[str, float]:
    """How far a contender's loss and gradients are from the naive form's, relatively."""
    expected = both_ways(naive, inputs, device, dtype)
    got = both_ways(CONTENDERS[name], inputs, device, dtype)
    return {key: float((got[key] - x).abs().max() / x.abs().max()) for key, x in expected.items()}


def measured(shape: tuple[int, int, int], names: list[str], repeats: int, device: str, dtype: str) -> dict[str, Any]:
    memory = {name: peak_memory(prepare, name, shape, device, dtype, threads=torch.get_num_threads()) for name in names}
    inputs = made(*shape, device, dtype)
    took = seconds({name: partial(both_ways, CONTENDERS[name], inputs, device, dtype) for name in names}, repeats)
    return {
        name: {
            "seconds": took[name],
            "times_naive": took[name] / took["naive"],
            "bytes": memory[name],
            "bytes_less_than_naive": memory["naive"] / memory[name],
        }
        for name in names
    }


@report_user_errors()
def main(
    vocabulary: Annotated[str, typer.Option(help="Sizes in K, with commas.")] = "32K,64K,128K,256K",
    tokens: Annotated[int, typer.Option(help="Scored positions.")] = 2048,
    hidden: Annotated[int, typer.Option(help="Width of both models.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16: autocast, and a teacher in bfloat16.")] = "float32",
    without: Annotated[str, typer.Option(help="Contenders to leave out, with commas.")] = "",
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure and print a table."""
    require_file(output)
    device_and_dtype(device, dtype, ("float32", "bfloat16"))
    names = [name for name in CONTENDERS if name not in without.split(",")]
    small = made(256, 4096, 256, device, dtype)
    far = {name: distance(name, small, device, dtype) for name in names if name != "naive"}
    figures: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "device": device, "dtype": dtype, "distance": far}
    for each in vocabulary.split(","):
        figures[each] = measured((tokens, int(each.rstrip("K")) * 1024, hidden), names, repeats, device, dtype)
        show(
            f"{tokens} tokens × {each} × {hidden}, {dtype} on {device}",
            ["", "forward + backward", "× naive", "peak memory", "naive / this"],
            [
                [
                    name,
                    f"{row['seconds']:.2f} s",
                    f"{row['times_naive']:.2f}",
                    size(row["bytes"]),
                    f"{row['bytes_less_than_naive']:.1f}",
                ]
                for name, row in figures[each].items()
            ],
        )
    for name, of_one in far.items():
        apart = ", ".join(f"{key} {value:.0e}" for key, value in of_one.items())
        print(f"{name} is this far from naive, at 256 tokens × 4K × 256: {apart}")
    if "liger" not in CONTENDERS:
        print("liger-kernel or triton is not installed, so it is not in the table")
    if output:
        record(output, figures)


if __name__ == "__main__":
    typer.run(main)
