"""Tasks in a recipe, in whole runs: they change no weight, survive a kill, and a stage that keeps its best goes on."""

import json
import signal

import pytest

from tests.stages.program import Program, run
from tests.stages.run_folder import metrics

pytestmark = pytest.mark.slow

TASKS = (
    "evaluation.tasks=[{task: copying, items: [1], samples: 2, every: 8},"
    " {task: parity, items: [2], samples: 2, after: [hidden, end]}]"
)


def test_tasks_change_no_weight_and_a_kill_loses_none(recipe, whole):
    """Beside a run without them, bit for bit; killed within a stage, and between measuring and handing on."""
    folder = recipe.with_name("run")
    for moment in (
        lambda: _lines(folder / "training" / "hidden" / "metrics.jsonl") >= 12,
        lambda: (folder / "evaluations" / "recall.json").exists(),
    ):
        program = Program("stages.run", recipe, TASKS)
        program.signal_when(signal.SIGKILL, moment)
        program.wait()
    assert run("stages.run", recipe, TASKS).code == 0
    for stage in ("convert", "mixing", "hidden", "logits"):
        ours, theirs = (base / stage / "model.safetensors" for base in (folder, whole[0]))
        assert ours.read_bytes() == theirs.read_bytes(), stage
    rows = [row for row in metrics(folder / "hidden") if "recall.copying.written" in row]
    assert [row["step"] for row in rows] == [0, 8, 16, 24]
    assert all("loss" in row for row in rows), "both fell due at the same steps, and are one line"
    found = json.loads((folder / "evaluations" / "recall.json").read_text())
    assert list(found["results"]["parity"]) == ["teacher", "hidden", "logits"]
    assert "Recall from the prompt" in (folder / "report.html").read_text()


def test_a_stage_hands_on_its_best(recipe):
    """A rate that grows without reason spoils ever more: the best step is not the last."""
    folder = recipe.with_name("run")
    rising = "{lr: 10.0, warmup: 0.9, keep_best: {metric: kl}, eval_every: 8, tokens: 3072, batch_size: 4}"
    ended = run("stages.run", recipe, "stages.mixing=null", "stages.hidden=null", f"stages.logits={rising}")
    assert ended.code == 0, ended.err
    kls = {row["step"]: row["kl"] for row in metrics(folder / "logits") if row["kind"] == "eval" and row["step"]}
    best = min(kls, key=kls.__getitem__)
    record = json.loads((folder / "logits" / "stage.json").read_text())
    assert best != max(kls)
    assert record["kept_step"] == best
    measured = json.loads((folder / "logits" / "evaluation.json").read_text())["metrics"]
    assert measured["kl"] == pytest.approx(kls[best], rel=1e-5)
    assert not list((folder / "training" / "logits" / "checkpoints").iterdir())


def _lines(path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0
