"""Stage 3 with its teacher read from disk: in a whole run, after kills, and beside the same stage with its teacher."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.stages.conftest import VOCABULARY, write_recipe
from tests.stages.program import Program, fresh, require_refused, run
from tests.stages.run_folder import contents, metrics, require_same_run

pytestmark = pytest.mark.slow

OFFLINE = "stages.logits.offline_teacher.top_k=16"


@pytest.fixture(scope="module")
def offline(tmp_path_factory, saved_teacher, text) -> Path:
    """The folder of a whole run with an offline teacher that nothing interrupted."""
    folder = tmp_path_factory.mktemp("offline")
    ended = fresh("stages.run", write_recipe(folder, saved_teacher, text), OFFLINE)
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture
def before_logits(whole, recipe) -> Path:
    """A run that is through with everything but the logits stage."""
    folder = Path(shutil.copytree(whole[0], recipe.with_name("run")))
    shutil.rmtree(folder / "logits")
    shutil.rmtree(folder / "training" / "logits")
    return folder


def losses(stage: Path) -> list[float]:
    return [row["loss"] for row in metrics(stage) if row["kind"] == "train"]


def test_stages_before_it_are_the_same_and_the_loss_is_a_little_less(offline, whole):
    """Tokens outside the top k are one outcome, which hides some of the divergence and adds none."""
    for stage in ("convert", "mixing", "hidden"):
        assert (offline / stage / "model.safetensors").read_bytes() == (
            whole[0] / stage / "model.safetensors"
        ).read_bytes()
    cut, full = losses(offline / "logits"), losses(whole[0] / "logits")
    assert len(cut) == len(full)
    assert 0.3 * full[0] < cut[0] < full[0]


def test_with_almost_the_whole_vocabulary_it_trains_as_with_the_teacher(before_logits, recipe, whole):
    assert VOCABULARY == 300  # of which a record holds at most 255
    ended = run("stages.logits", recipe, "stages.logits.offline_teacher.top_k=255")
    assert ended.code == 0, ended.err
    cut, full = losses(before_logits / "logits"), losses(whole[0] / "logits")
    assert cut == pytest.approx(full, rel=0.03)


def test_the_cache_may_be_written_before(offline, before_logits, recipe):
    assert run("stages.cache", recipe, OFFLINE).code == 0
    ended = run("stages.logits", recipe, OFFLINE)
    assert ended.code == 0, ended.err
    assert "shards," not in ended.err
    assert metrics(before_logits / "logits") == metrics(offline / "logits")
    for name in ("logits/model.safetensors", "teacher/logits/shard-00000.topk"):
        assert (before_logits / name).read_bytes() == (offline / name).read_bytes()


def test_killed_while_it_trains_it_goes_on_the_same(recipe, offline):
    folder = recipe.with_name("run")
    log = folder / "training/logits/metrics.jsonl"
    for n_lines in (4, 15):
        program = Program("stages.run", recipe, OFFLINE)
        program.signal_when(signal.SIGKILL, lambda n=n_lines: log.is_file() and log.read_text().count("\n") >= n)
        assert program.wait().code == -signal.SIGKILL
    ended = run("stages.run", recipe, OFFLINE)
    assert ended.code == 0, ended.err
    require_same_run(folder, offline)
    assert contents(folder / "teacher/logits") == contents(offline / "teacher/logits")


def test_a_finished_stage_with_another_teacher_is_refused(offline, recipe):
    shutil.copytree(offline, recipe.with_name("run"))
    for change in (OFFLINE.replace("16", "8"), "stages.logits.offline_teacher=null"):
        require_refused(run("stages.run", recipe, OFFLINE, change), "logits was made with another recipe", "top_k: 16")
