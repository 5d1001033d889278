"""The stage programs as a user runs them: whole, one by one, again, after kills, and on what they must refuse."""

import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.lock import LOCK, alone_in
from tests.stages.conftest import STEPS, write_recipe
from tests.stages.program import Ended, Program, fresh, require_refused, run
from tests.stages.run_folder import STAGES, contents, flip_a_byte, metrics, require_same_run

pytestmark = pytest.mark.slow


def table_row(ended: Ended, heading: str) -> str:
    return next(line for line in ended.out.splitlines() if line.strip(" │").startswith(f"{heading} "))


def test_a_whole_run(whole):
    folder, ended = whole
    others = {"teacher", "training", "data", "recipe.yaml", "report.html", "report.json"}
    assert {path.name for path in folder.iterdir()} == {*STAGES, *others}
    for before, stage in itertools.pairwise(["teacher", *STAGES]):
        record = json.loads((folder / stage / "stage.json").read_text())
        assert (record["stage"], record["parent"]["stage"]) == (stage, before)
        assert record["steps"] == (0 if stage == "convert" else STEPS)
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", *STAGES]
    for row in rows:
        measured = json.loads((folder / row["name"] / "evaluation.json").read_text())["metrics"]
        assert (row["loss"], row["kl"]) == (measured["loss"], measured["kl"])
        line = table_row(ended, row["heading"])
        assert len(line) <= 80
        assert f"{row['loss']:.4f}" in line
        assert f"{row['agreement']:.1%}" in line
    assert "<html" in (folder / "report.html").read_text()
    assert f"distill generate {folder / 'logits'} 'def '" in ended.out
    left_of_training = [path for path in (folder / "training").rglob("*") if path.is_file()]
    assert {path.name for path in left_of_training} == {"metrics.jsonl"}


def test_a_second_run_skips_what_is_done_and_changes_nothing(whole):
    folder, _ = whole
    before, written = contents(folder), times(folder)
    ended = run("stages.run", folder.with_name("tiny.yaml"))
    assert ended.code == 0, ended.err
    assert [line for line in ended.out.splitlines() if "already done" in line] == [f"{s}: already done" for s in STAGES]
    assert table_row(ended, "after logits")
    assert contents(folder) == before
    assert times(folder) == written  # nor was anything measured, and written down, again


def times(folder: Path) -> dict[str, int]:
    """When each file of a stage was written."""
    return {str(path): path.stat().st_mtime_ns for stage in ("teacher", *STAGES) for path in (folder / stage).iterdir()}


def test_only_what_is_missing_is_made_again(whole):
    folder, _ = whole
    before = contents(folder)
    for name in ("report.html", "hidden/evaluation.json", "hidden/matrices.npz", "teacher/evaluation.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "data")
    assert run("stages.run", folder.with_name("tiny.yaml")).code == 0
    assert contents(folder) == before


def test_stages_run_one_by_one(recipe, whole):
    folder = recipe.with_name("run")
    for stage in STAGES:
        ended = run(f"stages.{stage}", recipe)
        assert ended.code == 0, ended.err
        assert {path.name for path in folder.iterdir()} >= {stage, "data", "recipe.yaml"}
    assert run("eval.stage", recipe, "hidden").code == 0
    assert run("stages.run", recipe).code == 0
    require_same_run(folder, whole[0])


def test_the_recipe_that_a_run_wrote_is_run_as_the_one_it_was_given(finished, whole):
    """Its defaults are written out, such as roles that this model, whose head is tied, has not."""
    for stage in (finished / "logits", finished / "training" / "logits"):
        shutil.rmtree(stage)
    ended = run("stages.run", finished / "recipe.yaml", f"run_dir={finished}")
    assert ended.code == 0, ended.err
    ours, theirs = (folder / "logits" / "model.safetensors" for folder in (finished, whole[0]))
    assert ours.read_bytes() == theirs.read_bytes()


PROGRAMS = (("stages.run",), ("stages.prepare",), ("stages.mixing",), ("eval.stage", "teacher"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_another_run_is_refused_even_before_there_is_a_folder(recipe, program):
    folder, (module, *arguments) = recipe.with_name("run"), program
    with alone_in(folder):
        require_refused(run(module, recipe, *arguments), f"another run is at work in {folder}")
        assert contents(folder).keys() == {LOCK}
    assert not folder.exists()


def test_what_a_killed_run_left_is_seen_to_by_the_next_and_by_nobody_who_reads(finished, recipe, whole):
    """A kill between the two renames of handing on; then another run is at work, which may be just there."""
    (finished / "hidden").rename(finished / ".hidden.replaced")
    with alone_in(finished):
        before = contents(finished)
        require_refused(run("stages.run", recipe), "another run is at work in")
        require_refused(run("eval.stage", recipe, "hidden"), "another run is at work in")
        assert run("distill.cli", "generate", finished / "logits", "def ", "--max-new-tokens", "4").code == 0
        assert contents(finished) == before
        assert run("eval.report", finished).code == 0
        assert (finished / ".hidden.replaced").exists()
    ended = run("stages.run", recipe)
    assert ended.code == 0, ended.err
    assert "hidden: already done" in ended.out
    require_same_run(finished, whole[0])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda run: shutil.rmtree(run / "mixing"), "mixing is missing: run the stage that writes it first"),
    "unfinished": (lambda run: (run / "mixing/stage.json").unlink(), "mixing is not empty and holds no stage.json"),
    "weights cut short": (lambda run: os.truncate(run / "mixing/model.safetensors", 999), "has 999 bytes instead of"),
    "config cut short": (lambda run: os.truncate(run / "mixing/config.json", 99), "config.json has 99 bytes instead"),
    "one byte": (lambda run: flip_a_byte(run / "mixing/model.safetensors"), "mixing/model.safetensors was changed"),
    "one byte before it": (
        lambda run: flip_a_byte(run / "convert/model.safetensors"),
        "convert/model.safetensors was changed",
    ),
    "another stage": (
        lambda run: shutil.copytree(run / "logits", run / "mixing", dirs_exist_ok=True),
        "mixing started from hidden",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stage_refuses_what_is_not_its_predecessor(finished, recipe, damage):
    harm, said = DAMAGES[damage]
    harm(finished)
    before = contents(finished)
    require_refused(run("stages.hidden", recipe), said)
    if damage != "missing":  # which a whole run makes again
        require_refused(run("stages.run", recipe), said)
    assert contents(finished) == before


def test_a_changed_recipe_is_refused(finished, recipe):
    before = contents(finished)
    changes = "stages.mixing.lr=0.5", "stages.logits.tokens=4096"
    for program in ("stages.hidden", "stages.run"):
        ended = run(program, recipe, *changes)
        require_refused(ended, "mixing was made with another recipe", "stages.mixing.lr: 0.001 → 0.5", "remove")
    assert contents(finished) == before


def test_what_changes_no_result_is_not_refused(finished, recipe, whole):
    assert run("stages.run", recipe, "stages.logits.checkpoint_every=5", "name=other").code == 0
    require_same_run(finished, whole[0])
    assert "name: other" in (finished / "recipe.yaml").read_text()


def test_another_evaluation_is_made_without_training(finished, recipe, whole):
    ended = run("stages.run", recipe, "evaluation.tokens=256")
    assert ended.code == 0, ended.err
    assert "running" not in ended.out
    assert json.loads((finished / "report.json").read_text())["scored_tokens"] == 248
    assert run("stages.run", recipe).code == 0
    require_same_run(finished, whole[0])


def test_a_teacher_that_changed_on_the_way_is_noticed(tmp_path, saved_teacher, text):
    teacher = Path(shutil.copytree(saved_teacher, tmp_path / "teacher"))
    recipe = write_recipe(tmp_path, teacher, text)
    assert run("stages.convert", recipe).code == 0
    flip_a_byte(teacher / "model.safetensors")
    before = contents(tmp_path)
    for program in ("stages.mixing", "stages.run"):
        require_refused(run(program, recipe), "convert started from teacher (", "not from teacher (")
    assert contents(tmp_path) == before


def test_a_stage_that_the_recipe_lacks_is_named(finished, recipe):
    before = contents(finished)
    ended = run("stages.mixing", recipe, "stages.mixing=null")
    require_refused(ended, "the recipe has no stage 'mixing'; it has hidden, logits")
    assert contents(finished) == before


def lines(folder: Path, stage: str) -> int:
    path = folder / "training" / stage / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the text is being prepared": lambda run: (run / ".data.parts").exists() or (run / "data").exists(),
    "the teacher was measured": lambda run: (run / "teacher/evaluation.json").exists(),
    "converted, not measured": lambda run: (run / "convert/stage.json").exists(),
    "before a checkpoint": lambda run: lines(run, "mixing") >= 3,
    "after a checkpoint": lambda run: lines(run, "mixing") >= 9,
    "a checkpoint half-written": lambda run: any((run / "training/hidden/checkpoints").glob(".*")),
    "handing over": lambda run: (run / ".hidden.partial").exists() or (run / "hidden").exists(),
    "the last stage": lambda run: lines(run, "logits") >= 20,
}


def test_killed_again_and_again(recipe, whole):
    folder = recipe.with_name("run")
    for moment in MOMENTS.values():
        program = Program("stages.run", recipe)
        program.signal_when(signal.SIGKILL, lambda moment=moment: moment(folder))
        assert program.wait().code == -signal.SIGKILL
    ended = run("stages.run", recipe)
    assert ended.code == 0, ended.err
    assert "continuing from" in ended.err
    require_same_run(folder, whole[0])


def test_killed_at_random_moments(recipe, whole):
    folder = recipe.with_name("run")
    for _ in range(4):
        stage, line = random.choice(STAGES[1:]), random.randint(1, STEPS)
        print(f"killed at line {line} of {stage}")
        program = Program("stages.run", recipe)
        program.signal_when(
            signal.SIGKILL, lambda s=stage, n=line: lines(folder, s) >= n or (folder / "report.json").exists()
        )
        program.wait()
    assert run("stages.run", recipe).code == 0
    require_same_run(folder, whole[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_goes_on_from_there(recipe, whole, number, code):
    folder = recipe.with_name("run")
    program = Program("stages.run", recipe)
    program.signal_when(number, lambda: lines(folder, "hidden") >= 3)
    ended = program.wait()
    assert ended.code == code, ended
    assert f"stopped by {number.name} after step" in ended.err
    steps = metrics(folder / "training/hidden")[-1]["step"]
    ended = run("stages.run", recipe)
    assert f"continuing from {folder}/training/hidden/checkpoints/step-{steps:08d}" in ended.err
    assert ended.code == 0
    require_same_run(folder, whole[0])


@pytest.fixture
def interrupted(recipe) -> Path:
    """A run that was stopped in its first training stage."""
    program = Program("stages.run", recipe)
    program.signal_when(signal.SIGTERM, lambda: lines(recipe.with_name("run"), "mixing") >= 3)
    assert program.wait().code == 143
    return recipe.with_name("run")


def test_a_checkpoint_of_another_start_is_not_continued(interrupted, recipe):
    """Other weights come in: those in the checkpoint are no longer what this stage would have made."""
    assert run("stages.convert", recipe, "seed=1").code == 0
    before = contents(interrupted)
    ended = run("stages.mixing", recipe, "seed=1")
    require_refused(ended, "checkpoints was made with other settings: the recipe, the stage before changed")
    assert contents(interrupted) == before


def test_a_checkpoint_of_another_text_is_not_continued(interrupted, recipe, text, tmp_path):
    edited = Path(shutil.copytree(text, tmp_path / "text"))
    recipe.write_text(recipe.read_text().replace(str(text), str(edited)))
    assert run("stages.convert", recipe).code == 0
    with (edited / "json-decoder.py").open("a") as file:
        file.write("# a line more\n")
    shutil.rmtree(interrupted / "training")
    program = Program("stages.mixing", recipe)
    program.signal_when(signal.SIGTERM, lambda: lines(interrupted, "mixing") >= 3)
    assert program.wait().code == 143
    (edited / "json-decoder.py").write_text((text / "json-decoder.py").read_text())
    require_refused(run("stages.mixing", recipe), "was made with other settings: the text changed")


def test_a_real_teacher_on_real_text(stories_teacher, stories_text, tmp_path):
    """Minutes of training stand in recipes/stories260k.yaml; seconds of it already close some of the gap."""
    (tmp_path / "stories.txt").write_text(stories_text.read_text()[:100_000])
    recipe = tmp_path / "stories.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path}/run\n"
        f"teacher: {{path: {stories_teacher}}}\n"
        "student: {keep_attention: [2]}\n"
        f'data: {{source: {tmp_path}/stories.txt, separator: "\\n\\n", block: 64, held_out: {{by: tail}}}}\n'
        "stages:\n"
        "  mixing: {tokens: 4K, batch_size: 4, lr: 3e-3}\n"
        "  hidden: {tokens: 8K, batch_size: 4, lr: 1e-2}\n"
        "  logits: {tokens: 8K, batch_size: 4, mixer_lr: 3e-3}\n"
        "evaluation: {tokens: 2K, prompts: [Once upon a time], new_tokens: 16}\n"
    )
    ended = fresh("stages.run", recipe)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "run/report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["samples"]["logits"][0]["teacher"].startswith(", there was a little girl named Lily.")
    kl = [rows[stage]["kl"] for stage in STAGES]
    print("KL to the teacher:", kl)
    assert kl[3] < kl[2] < kl[1]
    assert rows["logits"]["loss"] < rows["hidden"]["loss"] < rows["convert"]["loss"]
