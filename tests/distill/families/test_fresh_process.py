"""A saved student in another interpreter, with this package and with nothing but its own folder."""

import subprocess
import sys

import pytest
import torch

from distill import convert
from tests.conftest import CHECKOUT
from tests.distill.families.models import tiny

PROGRAM = """
import sys
if sys.argv[1] == "alone":
    sys.modules["distill"] = None
else:
    import distill
    loaded = [name for name in sys.modules if ".models." in name and ".modeling_" in name and ".auto." not in name]
    assert not loaded, loaded
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sys.argv[1] == "alone")
    torch.save(model(torch.arange(20).view(2, 10)).logits, f"{folder}/logits-{sys.argv[1]}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["with this package", "alone"])
def test_a_fresh_interpreter_loads_students_and_no_model_file_before(how, tmp_path):
    """Families with a row and without; fast tests cannot see this, since their process has made the classes."""
    students = {
        tmp_path / case.strip(" *"): convert(tiny(case), keep_attention=[1]) for case in ("Falcon, new", "OLMo *")
    }
    for folder, student in students.items():
        student.save_pretrained(folder)
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", PROGRAM, how, *students]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, student in students.items():
        logits = torch.load(folder / f"logits-{how}.pt")
        torch.testing.assert_close(logits, student(torch.arange(20).view(2, 10)).logits, rtol=1e-5, atol=1e-5)
