"""How many cores there are for this process, and work that may use them all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def cores() -> int:
    """Those this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def every_core() -> Iterator[None]:
    """Let torch use all of them in the block: for a process that works while the others on its machine wait.

    ``accelerate launch`` gives each process one thread. Sums over another number of threads differ in their last bits;
    the same number makes the same ones.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
