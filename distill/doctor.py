"""What this machine and this environment can do: the first thing to look at when something does not work."""

import os
import platform
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from distill.errors import UserError
from distill.threads import cores

_REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "pydantic",
    "typer",
    "rich",
)
# What can be added: the module that is imported, the name to install, what it is for.
_OPTIONAL = {
    "tensorboard": ("tensorboard", "trackers: [tensorboard]"),
    "mamba_ssm": (
        "mamba-ssm causal-conv1d --no-build-isolation",
        "the scan's kernels for mamba2 and for students of a native class, on NVIDIA GPUs",
    ),
    "fla": ("flash-linear-attention", "the scan's kernels on GPUs, in Triton"),
    "deepspeed": ("deepspeed", "ZeRO across GPUs"),
    "peft": ("peft", "LoRA on a finished student"),
    "trl": ("trl", "fine-tuning and preference training"),
    "lm_eval": ("lm-eval", "the standard benchmarks"),
}
# The mixers that scan, and whether they have the step and the rate that one of the scan's backends wants.
_STEPPED = {"mamba2": True, "discrete_mamba2": False, "based": False, "hedgehog": False}
_UNSCANNED = {
    "gated_deltanet": "the delta rule instead of a scan: chunked matmuls in plain PyTorch, on every device",
    "sliding_window": "the teacher's attention behind a mask, bounded in a DynamicCache, not in a StaticCache",
}


def diagnose() -> dict[str, Any]:
    """Everything `distill doctor` shows, as plain data; nothing here raises for a broken environment."""
    devices = _devices()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _REQUIRED}},
        "platform": platform.platform(),
        "interpreter": sys.executable,
        "cpu": {"cores": cores(), "memory_bytes": _memory_bytes()},
        "torch": devices,
        "scan": _scan_backends(devices),
        "without_scan": _UNSCANNED,
        "optional": {
            module: {"installed": _installed(module), "adds": adds, "install": f"pip install {package}"}
            for module, (package, adds) in _OPTIONAL.items()
        },
        "disk": {str(path): shutil.disk_usage(path).free for path in _places()},
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """The same for people, on one screen."""
    cpu, torch = facts["cpu"], facts["torch"]
    memory = gibibytes(cpu["memory_bytes"])
    sections = {
        "versions": [", ".join(f"{name} {found or 'missing'}" for name, found in facts["versions"].items())],
        "python": [f"{facts['interpreter']} on {facts['platform']}"],
        "cpu": [f"{cpu['cores']} cores, {memory} memory, torch threads: {torch['threads']}"],
        "gpu": [_gpu_line(gpu) for gpu in torch["gpus"]] or [torch["problem"]],
        "scan": [f"{_dot(backend['used'])} {name}: {backend['why']}" for name, backend in facts["scan"].items()],
        "no scan": [f"{_dot(True)} {mixer}: {how}" for mixer, how in facts["without_scan"].items()],
        "optional": [_extra_line(module, extra) for module, extra in facts["optional"].items()],
        "disk": [f"{gibibytes(free)} free at {path}" for path, free in facts["disk"].items()],
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, lines in sections.items():
        grid.add_row(name, Text("\n".join(lines)))
    return grid


def _dot(filled: object) -> str:
    return "●" if filled else "○"


def _extra_line(module: str, extra: dict[str, Any]) -> str:
    state = extra["installed"] or f"not installed; {extra['install']}"
    return f"{_dot(extra['installed'])} {module} ({extra['adds']}): {state}"


def gibibytes(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _installed(module: str) -> str | None:
    """The version, or "yes" for a module without one; None if it is not there."""
    return (_version(module.replace("_", "-")) or "yes") if find_spec(module) else None


def _memory_bytes() -> int | None:
    """The memory of the machine, or what a container leaves of it."""
    found = []
    with suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):  # the file says "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def _devices() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever its libraries raise
        return {"threads": None, "gpus": [], "problem": f"torch does not import: {error}"}
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bfloat16": torch.cuda.is_bf16_supported(),
            }
        )
    built_for = torch.version.cuda or torch.version.hip
    problem = None if gpus else f"none visible to torch, which is built for {built_for or 'the CPU alone'}"
    return {"threads": torch.get_num_threads(), "gpus": gpus, "problem": problem}


def _gpu_line(gpu: dict[str, Any]) -> str:
    bfloat16 = "with" if gpu["bfloat16"] else "without"
    return f"{gpu['name']}, {gibibytes(gpu['memory_bytes'])}, capability {gpu['capability']}, {bfloat16} bfloat16"


def _scan_backends(devices: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Which implementation of the state-space scan runs here, and why the others do not: what the scan itself asks."""
    try:
        import torch

        from distill.ssd import backends
    except Exception as error:
        return {"none": {"used": False, "why": f"distill.ssd does not import: {error}"}}
    device, dtype = torch.device("cpu"), torch.float32
    if devices["gpus"]:
        device, dtype = torch.device("cuda"), torch.bfloat16 if devices["gpus"][0]["bfloat16"] else torch.float16
    served: dict[str, list[str]] = {}
    refused: dict[str, str] = {}
    for mixer, stepped in _STEPPED.items():
        try:
            served.setdefault(backends.backend(device, dtype, stepped=stepped), []).append(mixer)
        except UserError as error:
            refused[mixer] = str(error)
    if not served:
        return {"none": {"used": False, "why": next(iter(refused.values()))}}
    asked = os.environ.get(backends.CHOICE)
    passed_over = (
        f"{backends.CHOICE}={asked} asks for another"
        if asked
        else f"{next(iter(served))} comes first, for every mixer that scans"
    )
    told: dict[str, dict[str, Any]] = {}
    for name, what in backends.BACKENDS.items():
        if name in served:
            only = "" if len(served[name]) == len(_STEPPED) else f"; runs {', '.join(served[name])} here"
            chosen = f"; {backends.CHOICE}={name} asks for it" if asked else ""
            told[name] = {"used": True, "why": f"{what}{only}{chosen}"}
        else:
            why = backends.obstacle(name, device, dtype, stepped=True) or passed_over
            told[name] = {"used": False, "why": f"not used: {why}"}
    return told | {mixer: {"used": False, "why": why} for mixer, why in refused.items()}


def _places() -> list[Path]:
    """Where runs and downloads go, each file system once."""
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    while not hub.exists():
        hub = hub.parent
    places = [Path.cwd(), hub]
    return places if places[0].stat().st_dev != places[1].stat().st_dev else places[:1]
