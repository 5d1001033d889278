"""The short depthwise convolution, forward and backward on CPU: shifted products against ``nn.functional.conv1d``.

    python -m scripts.bench_convolution

Medians of interleaved repeats, so that a busy machine slows both alike.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.ssd import causal_convolution

SHAPES = [(2, 1024, 3072), (16, 256, 384), (8, 512, 1536)]  # batch, tokens, channels
TAPS, REPEATS = 4, 15


def by_conv1d(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    padded_BCT = F.pad(x_BTC.mT, (TAPS - 1, 0))
    return F.conv1d(padded_BCT, weight_CK[:, None], bias_C, groups=x_BTC.shape[-1]).mT


def seconds(convolution: Callable[..., Tensor], *leaves: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(convolution(*leaves).sum(), leaves)
    return time.perf_counter() - start


def main() -> None:
    print(f"{'batch × tokens × channels':>28} {'conv1d':>9} {'shifted':>9} {'ratio':>6}")
    for batch, tokens, channels in SHAPES:
        shapes = ((batch, tokens, channels), (channels, TAPS), (channels,))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        pairs = [(seconds(by_conv1d, *leaves), seconds(causal_convolution, *leaves)) for _ in range(REPEATS + 2)][2:]
        library, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        name = f"{batch} × {tokens} × {channels}"
        print(f"{name:>28} {library * 1e3:7.1f}ms {ours * 1e3:7.1f}ms {library / ours:5.1f}×")


if __name__ == "__main__":
    main()
