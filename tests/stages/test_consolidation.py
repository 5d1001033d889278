"""A checkpoint from the middle of a stage becomes an ordinary folder; what is no intact checkpoint is refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.data import Blocks, evaluation_batches
from distill.evaluation import evaluate
from tests.stages.program import Program, require_refused, run
from tests.stages.run_folder import contents

pytestmark = pytest.mark.slow

EVERY = 8  # the recipe measures the hidden stage so often


@pytest.fixture(scope="module")
def stopped(saved_teacher, text, tmp_path_factory) -> Path:
    """A run that was stopped in its hidden stage, some steps after the checkpoint of step 16."""
    from tests.stages.conftest import write_recipe

    recipe = write_recipe(tmp_path_factory.mktemp("stopped"), saved_teacher, text)
    folder = recipe.parent / "run"
    metrics = folder / "training/hidden/metrics.jsonl"
    program = Program("stages.run", recipe, f"stages.hidden.checkpoint_every={EVERY}")
    program.signal_when(signal.SIGTERM, lambda: metrics.is_file() and metrics.read_text().count('"train"') > 2 * EVERY)
    assert program.wait().code == 143
    return folder


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "training/hidden/checkpoints").iterdir())


def test_a_checkpoint_becomes_the_student_that_was_measured_there(stopped, tmp_path):
    step = stopped / f"training/hidden/checkpoints/step-{2 * EVERY:08d}"
    before = contents(stopped)
    ended = run("distill.cli", "consolidate", step, tmp_path / "student")
    assert ended.code == 0, ended.err
    assert contents(stopped) == before

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    lines = [json.loads(line) for line in (stopped / "training/hidden/metrics.jsonl").open()]
    (measured,) = (line["loss"] for line in lines if line["kind"] == "eval" and line["step"] == 2 * EVERY)
    held_out = evaluation_batches(Blocks(stopped / "data", "held_out", 32), 16, 512)
    assert evaluate(student, None, held_out).loss == measured

    assert AutoTokenizer.from_pretrained(tmp_path / "student")("def ")["input_ids"]
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert not names & {"stage.json", "conversion.json", "evaluation.json", "matrices.npz"}
    weights, started = (load_file(at / "model.safetensors") for at in (tmp_path / "student", stopped / "mixing"))
    changed = {name for name in weights if not torch.equal(weights[name], started[name])}
    assert changed == {name for name in weights if ".0.self_attn." in name or ".2.self_attn." in name}


def test_killed_while_it_writes_leaves_nothing_that_looks_whole(stopped, tmp_path):
    step = checkpoints(stopped)[-1]
    program = Program("distill.cli", "consolidate", step, tmp_path / "student")
    program.signal_when(signal.SIGKILL, (tmp_path / ".student.partial").exists)
    assert program.wait().code == -signal.SIGKILL
    assert not (tmp_path / "student").exists()
    assert run("distill.cli", "consolidate", step, tmp_path / "student").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_offered(stopped, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(stopped, copied)
    good, damaged = checkpoints(copied)[-2:]
    shard = next(path for path in sorted((damaged / "state").iterdir()) if path.stat().st_size > 1000)
    os.truncate(shard, shard.stat().st_size // 2)
    ended = run("distill.cli", "consolidate", damaged, tmp_path / "student")
    require_refused(ended, str(shard), "instead of", f"the one before it is {good}")
    assert run("distill.cli", "consolidate", good, tmp_path / "student").code == 0


def test_what_is_no_checkpoint_or_not_this_runs_is_refused(stopped, tmp_path):
    step = checkpoints(stopped)[-1]
    require_refused(run("distill.cli", "consolidate", stopped, tmp_path / "student"), "is no checkpoint", str(step))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    require_refused(run("distill.cli", "consolidate", step, tmp_path / "taken"), "is there already")
    copied = tmp_path / "run"
    shutil.copytree(stopped, copied)
    shutil.rmtree(copied / "mixing")
    shutil.copytree(copied / "convert", copied / "mixing")
    moved = copied / step.relative_to(stopped)
    require_refused(run("distill.cli", "consolidate", moved, tmp_path / "student"), "started from another student")
    assert not (tmp_path / "student").exists()
