"""The short depthwise convolution, forward and backward on CPU: shifted products against ``nn.functional.conv1d``.

    python -m scripts.bench_convolution

Medians of interleaved repeats, so that a busy machine slows both alike.
"""

from collections.abc import Callable
from functools import partial

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from distill.ssd import causal_convolution
from scripts.measure import seconds, show

SHAPES = [(2, 1024, 3072), (16, 256, 384), (8, 512, 1536)]  # batch, tokens, channels
TAPS, REPEATS = 4, 15


def by_conv1d(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    padded_BCT = F.pad(x_BTC.mT, (TAPS - 1, 0))
    return F.conv1d(padded_BCT, weight_CK[:, None], bias_C, groups=x_BTC.shape[-1]).mT


def both_ways(convolution: Callable[..., Tensor], *leaves: Tensor) -> None:
    torch.autograd.grad(convolution(*leaves).sum(), leaves)


def main() -> None:
    """Time both of them at three shapes, and print the ratio."""
    rows = []
    for batch, tokens, channels in SHAPES:
        shapes = ((batch, tokens, channels), (channels, TAPS), (channels,))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        contenders = {"conv1d": by_conv1d, "shifted": causal_convolution}
        took = seconds({name: partial(both_ways, f, *leaves) for name, f in contenders.items()}, REPEATS, warmup=2)
        times = [f"{took[name] * 1e3:.1f} ms" for name in contenders]
        rows.append([f"{batch} × {tokens} × {channels}", *times, f"{took['conv1d'] / took['shifted']:.1f}×"])
    show("Short convolution", ["batch × tokens × channels", "conv1d", "shifted", "ratio"], rows)


if __name__ == "__main__":
    typer.run(main)
