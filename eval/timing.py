"""How speed is measured: calls that take turns, a prompt read into a cache, tokens decoded behind it.

    seconds({"teacher": f, "student": g})     medians of calls that take turns, so that a busy machine slows all alike
    prefill(model, ids_BT, cache)             reads a prompt; only the last token's logits are made
    decoding(step, token_B1, cache, 16)       a call that writes 16 tokens greedily, one forward each
    circumstances()                           what figures depend on besides the code

Figures of one run may be compared; those of different runs or machines only as ratios.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Call = Callable[[], object]


def seconds(contenders: Mapping[str, Call], repeats: int = 7, *, warmup: int = 1) -> dict[str, float]:
    """The median time of each contender's calls, in seconds; they take turns, ``warmup`` rounds uncounted.

    On CUDA a call ends when the device has done its work.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warmup + repeats):
        for name, call in contenders.items():
            times[name].append(_once(call))
    return {name: statistics.median(of_one[warmup:]) for name, of_one in times.items()}


def prefill(model: Any, ids_BT: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
    """Read a prompt into ``cache``, whole or ``chunk`` tokens a forward; the last token's logits (B, 1, V)."""
    for part_BT in ids_BT.split(chunk or ids_BT.shape[1], dim=1):
        logits_B1V = model(part_BT, past_key_values=cache, logits_to_keep=1).logits
    return logits_B1V


def decoding(step: Any, token_B1: Tensor, cache: Cache, n_tokens: int) -> Callable[[], Tensor]:
    """A call that writes ``n_tokens`` behind what ``cache`` holds, greedily, beginning with ``token_B1``.

    Args:
        step: a model, or its compiled call.
    """

    def generate() -> Tensor:
        token = token_B1
        for _ in range(n_tokens):
            token = step(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        return token

    return generate


def circumstances() -> dict[str, Any]:
    """The date, the machine, and the versions of what does the work."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "triton", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _once(call: Call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
