"""Models of transformers' native classes on the CPU, whatever kernels are installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import hub_kernels


@contextmanager
def in_plain_torch() -> Iterator[None]:
    """While it lasts, transformers scans and convolves in PyTorch.

    Otherwise it takes mamba-ssm's and causal-conv1d's kernels wherever these can be imported, also for tensors on the
    CPU, which the kernels refuse. It goes past them for ``torch.export`` alone, so it is told that this is one.
    """
    is_exporting = hub_kernels.is_torchdynamo_exporting
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = is_exporting
