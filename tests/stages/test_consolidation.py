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

from distill import handover
from distill.atomic import sha256_of
from distill.consolidation import consolidate
from distill.data import Blocks, evaluation_batches
from distill.evaluation import evaluate
from distill.lock import alone_in
from distill.student import load_student
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
    with alone_in(stopped):  # a run that goes on does not hold it up, nor is it disturbed
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


def rewrite(folder: Path, file: str, content: str) -> None:
    """Change a file of a checkpoint, manifest included."""
    (folder / file).write_text(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"bytes": (folder / file).stat().st_size, "sha256": sha256_of(folder / file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def split_weights(run: Path, stage: str, step: Path) -> None:
    """Let the stage before a checkpoint stand in several weight files, as a large student's does."""
    student, tokenizer = load_student(run / stage), AutoTokenizer.from_pretrained(run / stage)

    def save(folder: Path) -> None:
        student.save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        shutil.copy(run / stage / "recipe.yaml", folder)

    parent = handover.write(run / stage, save, handover.read(run / stage)).as_parent()
    loop = json.loads((step / "loop.json").read_text())
    loop["call"]["the stage before"] = parent.sha256
    rewrite(step, "loop.json", json.dumps(loop))


def test_weights_in_several_files_do_not_stay_beside_the_new_ones(stopped, tmp_path):
    copied = Path(shutil.copytree(stopped, tmp_path / "run"))
    step = copied / f"training/hidden/checkpoints/step-{2 * EVERY:08d}"
    split_weights(copied, "mixing", step)
    assert len(list((copied / "mixing").glob("model-*.safetensors"))) > 1
    consolidate(step, tmp_path / "student")
    consolidate(stopped / step.relative_to(copied), tmp_path / "expected")
    got, expected = (contents(tmp_path / name) for name in ("student", "expected"))
    assert got.keys() == expected.keys()
    assert [name for name in got if "safetensors" in name] == ["model.safetensors"]
    assert got["model.safetensors"] == expected["model.safetensors"]


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
