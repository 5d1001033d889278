"""The program that writes the teacher's predictions: as a user starts it, after a kill, and on what it must refuse."""

import json
import signal
from pathlib import Path

import pytest

from tests.stages.program import Program, fresh, require_refused, run
from tests.stages.run_folder import contents, flip_a_byte

pytestmark = pytest.mark.slow

OFFLINE = "stages.logits.offline_teacher.top_k=16"


@pytest.fixture
def folder(recipe) -> Path:
    return recipe.with_name("run") / "teacher" / "logits"


@pytest.fixture(scope="session")
def written(tmp_path_factory, saved_teacher, text) -> tuple[dict[str, bytes | None], str]:
    """What it wrote when nothing interrupted it, and what it said."""
    from tests.stages.conftest import write_recipe

    place = tmp_path_factory.mktemp("cache")
    ended = fresh("stages.cache", write_recipe(place, saved_teacher, text), OFFLINE)
    assert ended.code == 0, ended.err
    return contents(place / "run/teacher/logits"), ended.out


def test_it_says_what_it_wrote(written):
    files, said = written
    assert files.keys() == {"cache.json", "shard-00000.topk"}
    assert json.loads(files["cache.json"])["top_k"] == 16
    # 3072 tokens of 3 · 16 + 4 bytes, and the end of the shard
    assert len(files["shard-00000.topk"]) == 3072 * 52 + 40
    assert "3,072 tokens, 156 KiB in 1 shards, 52.0 bytes a token" in said
    assert "the top 16 of 300 tokens hold" in said


def test_a_second_time_nothing_is_written(recipe, folder, written):
    assert run("stages.cache", recipe, OFFLINE).code == 0
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    ended = run("stages.cache", recipe, OFFLINE)
    assert ended.code == 0
    assert "shards" not in ended.err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert contents(folder) == written[0]


def test_killed_it_goes_on(recipe, folder, written):
    program = Program("stages.cache", recipe, OFFLINE)
    program.signal_when(signal.SIGKILL, lambda: (folder / "cache.json").exists())
    assert program.wait().code == -signal.SIGKILL
    assert not list(folder.glob("*.topk"))
    assert run("stages.cache", recipe, OFFLINE).code == 0
    assert contents(folder) == written[0]


def test_a_damaged_shard_is_named_and_made_again(recipe, folder, written):
    assert run("stages.cache", recipe, OFFLINE).code == 0
    flip_a_byte(folder / "shard-00000.topk")
    ended = run("stages.cache", recipe, OFFLINE)
    assert ended.code == 0
    assert f"{folder}/shard-00000.topk is not what was written (its SHA-256 differs): it is written again" in ended.err
    assert contents(folder) == written[0]


def test_what_another_teacher_or_text_left_is_refused(recipe, folder):
    assert run("stages.cache", recipe, OFFLINE).code == 0
    before = contents(folder)
    for change, said in {
        "teacher.dtype=bfloat16": "teacher_dtype: float32 → bfloat16",
        "data.block=16": "block: 32 → 16",
        "seed=1": "order: 3 → 4",
        "stages.logits.offline_teacher.top_k=8": "top_k: 16 → 8",
        "data.bos=false": "text: ",
    }.items():
        require_refused(run("stages.cache", recipe, OFFLINE, change), "are not this recipe's", said)
        assert contents(folder) == before


def test_what_does_not_change_the_predictions_is_not_refused(recipe, folder):
    assert run("stages.cache", recipe, OFFLINE).code == 0
    before = contents(folder)
    for change in (
        "stages.logits.lr=1",
        "stages.logits.tokens=1024",
        "student.state_dim=4",
        "stages.logits.batch_size=2",
    ):
        assert run("stages.cache", recipe, OFFLINE, change).code == 0
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stages.logits.offline_teacher=null", "give it offline_teacher: {top_k: 64}"),
        ("stages.logits=null", "the recipe's logits stage reads no teacher from disk"),
        ("stages.logits.temperature=2", "offline_teacher needs temperature: 1, not 2"),
        ("stages.logits.offline_teacher.top_k=256", "must be less than or equal to 255, not 256"),
    ],
)
def test_what_it_cannot_do_it_refuses(recipe, folder, change, said):
    require_refused(run("stages.cache", recipe, OFFLINE, change), said)
    assert not folder.exists()
