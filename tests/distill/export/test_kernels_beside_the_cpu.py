"""Kernels that are installed and cannot run: transformers takes them by import, the export works on the CPU."""

import os
import subprocess
import sys

import pytest

from distill import convert
from tests.conftest import CHECKOUT, tiny

STUBS = {
    "causal_conv1d.py": ("causal_conv1d_fn", "causal_conv1d_update"),
    "mamba_ssm/__init__.py": (),
    "mamba_ssm/ops/__init__.py": (),
    "mamba_ssm/ops/triton/__init__.py": (),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
}
KERNEL = """\
def {name}(*args, **kwargs):
    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
"""
PROGRAM = """\
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from distill.export import native
from distill.export.formats import Options

folder = Path(sys.argv[1])
for to in sys.argv[2:]:
    (folder / to).mkdir()
    try:
        print(to, *getattr(native, f"write_{to}")(folder / "student", folder / to, Options()))
        AutoModelForCausalLM.from_pretrained(folder / to)(torch.tensor([[3, 4, 5]]))
    except ValueError as error:
        print(to, error)
"""
TO = ["granite", "bamba"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> str:
    """By a process that can import both libraries, whose kernels refuse what lies on the CPU: one, since it is slow."""
    folder = tmp_path_factory.mktemp("exported")
    convert(tiny("llama"), keep_attention=[1]).save_pretrained(folder / "student")
    for file, kernels in STUBS.items():
        path = folder / "stubs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(KERNEL.format(name=name) for name in kernels))
    environment = {**os.environ, "PYTHONPATH": f"{folder / 'stubs'}{os.pathsep}{CHECKOUT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), *TO]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("to", TO)
def test_the_export_is_verified_without_them(told: str, to: str) -> None:
    assert f"{to} the student has no tokenizer, so neither has this folder verified in fp32" in told
    assert f"{to} Pointer argument" in told, "transformers does not take the kernels: nothing is tested here"
