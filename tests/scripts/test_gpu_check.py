"""scripts/gpu_check.sh at tiny sizes on the CPU: every section runs, and what goes wrong is said and counted."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import device, tensor

from scripts.gpu_check import Check
from scripts.gpu_parity import Row, _caught, error
from scripts.gpu_report import page
from scripts.gpu_sections import BENCHMARKS, PARITY, Section
from tests.conftest import CHECKOUT

ELSEWHERE = ("parity: mixing", "parity: logits", "parity: mixers", "parity: decoding")


def check(place: Path, seconds: float = 60.0) -> Check:
    return Check("cpu", "float32", True, place, time.monotonic() + seconds)


def program(place: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Section:
    """A section that runs this source."""
    (place / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(place))
    return Section(name, name, "", "--flag 1", 30)


def test_a_section_gets_its_options_and_hands_back_its_figures(tmp_path, monkeypatch):
    source = "import json, sys; json.dump(sys.argv[1:-1], open(sys.argv[-1], 'w'))"
    outcome = check(tmp_path).run(program(tmp_path, "told", source, monkeypatch))
    assert outcome.figures == ["--flag", "1", "--device", "cpu", "--dtype", "float32", "--output"]
    assert (outcome.said, outcome.failed) == ("done", False)


def test_a_section_that_fails_is_told_with_its_reason(tmp_path, monkeypatch, capsys):
    outcome = check(tmp_path).run(program(tmp_path, "broken", "raise SystemExit('no such kernel')", monkeypatch))
    assert (outcome.said, outcome.failed, outcome.figures) == ("failed with code 1", True, None)
    assert "no such kernel" in capsys.readouterr().out


def test_a_section_that_hangs_is_ended_and_its_children_too(tmp_path, monkeypatch):
    source = f"""\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(300)
"""
    outcome = check(tmp_path, 8.0).run(program(tmp_path, "hanging", source, monkeypatch))
    assert outcome.failed
    assert outcome.said.startswith("ended after its")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.1)
    assert not _runs(child)


def test_nothing_starts_when_everybodys_time_is_up(tmp_path, monkeypatch):
    source = f"open({str(tmp_path / 'ran')!r}, 'w')"
    outcome = check(tmp_path, 1.0).run(program(tmp_path, "late", source, monkeypatch))
    assert (outcome.said, outcome.failed) == ("no time was left", True)
    assert not (tmp_path / "ran").exists()


def test_the_page_puts_figures_beside_the_ceilings():
    rows = [{"length": 64, "contender": "distill", "seconds": 1e-3, "peak_bytes": None}]
    shape = {"batch": 1, "heads": 1, "head_dim": 16, "state_dim": 16}
    figures = {
        "ceilings": {"flops": 2e9, "bytes_per_second": 1e9},
        "scan 1B": {"shape": shape, "rows": rows},
        "parity: scans": {"failed": True, "rows": [_parity_row(failed=True)]},
    }
    text = page("cpu", "float32", False, [("scan 1B", "done", 3.0), ("mixing", "failed with code 1", 1.0)], figures)
    # 3 · 64 (64·32 + 4·256) operations and 64 (5·16 + 6·16) numbers of 4 bytes, in a millisecond.
    assert "| 64 | distill | 1.00 | 0.00 (29%) | 0.05 (5%) |" in text
    assert "| scan | float32 | 1.0e+00 | 5e-05 | **FAILED** wrong |" in text
    assert "Something computes" in text
    assert "| mixing | failed with code 1 | 1 |" in text
    assert "mean nothing" not in text


def test_what_was_ended_early_leaves_its_rows_and_no_verdict():
    figures = {"parity: scans": {"failed": False, "rows": [_parity_row(failed=False)]}}
    text = page("cpu", "float32", False, [("parity: scans", "ended after its 200 s", 200.0)], figures)
    assert "Not established, not everything finished: kernels, parity: scans, parity: mixing" in text
    assert "| scan | float32 |" in text
    done = [(section.name, "done", 1.0) for section in PARITY]
    assert "All within what is allowed." in page("cpu", "float32", False, done, figures)


def test_without_parity_the_page_says_so():
    text = page("cpu", "float32", True, [("parity", "ended after its 100 s", 100.0)], {})
    assert "Not established" in text
    assert "not measured" in text
    assert "mean nothing" in text


def test_what_is_wrong_fails():
    assert Row("scan", "float32", float("nan"), 1.0).failed
    assert Row("scan", "float32", 2.0, 1.0).failed
    assert not Row("scan", "float32", 1.0, 1.0).failed
    assert not Row("scan", "float32", None, 1.0).failed
    assert error([tensor([1.0, 1.0]), tensor([3.0])], [tensor([1.0, 1.0]), tensor([2.0])]) == 0.5
    assert error([tensor([float("nan")]), tensor([1.0])], [tensor([1.0]), tensor([1.0])]) == float("inf")


def test_a_check_that_raises_is_a_row_that_fails():
    def broken(device):
        yield Row("first", "float32", 0.0, 1.0)
        raise RuntimeError("an illegal memory access")

    first, last = _caught(broken, device("cpu"))
    assert not first.failed
    assert last.failed
    assert (last.what, last.note) == ("broken: all that follows", "RuntimeError")


@pytest.mark.slow
def test_all_of_it_at_tiny_sizes(tmp_path):
    command = ["bash", str(CHECKOUT / "scripts/gpu_check.sh"), "--device", "cpu", "--small", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # What other tests compare on a CPU, and more cheaply, is left out here.
    chosen = [section for section in (*PARITY, *BENCHMARKS) if section.name not in ELSEWHERE]
    only = [option for section in chosen for option in ("--only", section.name)]
    done = subprocess.run([*command, "--minutes", "20", *only], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "cpu-small.md").read_text()
    for section in chosen:
        ended = "left out: no small form" if section.small is None else "done"
        assert f"| {section.name} | {ended} |" in text, done.stdout
    for said in (
        "Not established, not everything finished: parity: mixing, parity: logits, parity: mixers, parity: decoding.",
        "mean nothing",
        "## Scan 1B",
        "## Steps 1B",
        "## Decoding 1B",
    ):
        assert said in text


@pytest.mark.slow
def test_the_script_names_all_that_is_missing(tmp_path):
    python = tmp_path / "python"
    # Without site-packages: an interpreter that has nothing.
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh"], capture_output=True, text=True, cwd=CHECKOUT, env=environment
    )
    assert done.returncode == 1
    assert "has no torch, transformers, accelerate" in done.stderr


def _parity_row(*, failed: bool) -> dict[str, object]:
    return {"what": "scan", "dtype": "torch.float32", "error": 1.0, "allowed": 5e-5, "note": "wrong", "failed": failed}


def _runs(pid: int) -> bool:
    """A process that ended but was not yet asked about by its parent does not run."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
