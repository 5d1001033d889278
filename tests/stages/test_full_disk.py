"""A disk that fills up on the way costs nothing: the message names what did not fit, and freed, the run goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.training import checkpoint
from tests.stages.conftest import STEPS
from tests.stages.program import Ended, require_refused, run
from tests.stages.run_folder import contents, metrics
from tests.stages.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, megabytes=2) as disk:
        yield disk


@pytest.fixture
def arguments(recipe, disk) -> tuple[Path, str]:
    """The recipe, with its run_dir on the small disk."""
    return recipe, f"run_dir={disk.run}"


@pytest.fixture
def converted(disk, arguments) -> dict[str, bytes | None]:
    """What stands in ``convert`` before the disk fills up."""
    assert run("stages.convert", *arguments).code == 0
    return contents(disk.run / "convert")


def require_full(ended: Ended, what: Path) -> None:
    require_refused(ended, f"{what}: the disk is full. Writing it needs", "free some space and run the same command")


def require_same_stage(got: Path, expected: Path) -> None:
    assert (got / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    if (expected / "metrics.jsonl").exists():
        assert metrics(got) == metrics(expected)


def test_while_the_text_is_prepared(disk, arguments):
    disk.leave(100_000)
    require_full(run("stages.run", *arguments), disk.run / "data")
    assert list(disk.mount.iterdir()) == [disk.filler]


def test_while_converting(disk, arguments, whole):
    disk.leave(350_000)
    require_full(run("stages.convert", *arguments), disk.run / "convert")
    assert {path.name for path in disk.run.iterdir()} == {"data", "recipe.yaml"}
    disk.free()
    assert run("stages.convert", *arguments).code == 0
    require_same_stage(disk.run / "convert", whole[0] / "convert")


@pytest.mark.parametrize("saved", [0, 2], ids=["the first", "a later one"])
def test_in_a_checkpoint(disk, arguments, whole, converted, saved):
    disk.leave(100_000 + saved * 260_000)
    command = "stages.mixing", *arguments, "stages.mixing.keep_checkpoints=9"
    folder = disk.run / "training/mixing/checkpoints"
    require_full(run(*command), folder / f"step-{6 * (saved + 1):08d}")
    assert contents(disk.run / "convert") == converted
    assert len(list(folder.iterdir())) == saved
    assert not [damage for damage in map(checkpoint.damage_of, folder.iterdir()) if damage]
    disk.free()
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert ("continuing from" in ended.err) == bool(saved)
    require_same_stage(disk.run / "mixing", whole[0] / "mixing")


def test_in_the_hand_over(disk, arguments, whole, converted):
    disk.leave(300_000)
    command = "stages.mixing", *arguments, "stages.mixing.checkpoint_every=999"
    require_full(run(*command), disk.run / "mixing")
    assert contents(disk.run / "convert") == converted
    assert {path.name for path in disk.run.iterdir()} == {"data", "recipe.yaml", "convert", "training"}
    disk.free()
    ended = run(*command)
    assert f"continuing from {disk.run}/training/mixing/checkpoints/step-{STEPS:08d}" in ended.err
    require_same_stage(disk.run / "mixing", whole[0] / "mixing")


def test_in_an_evaluation(disk, arguments, converted):
    recipe, run_dir = arguments
    assert run("eval.stage", recipe, "teacher", run_dir).code == 0
    disk.leave(8_192)
    require_full(run("eval.stage", recipe, "convert", run_dir), disk.run / "convert/matrices.npz")
    assert contents(disk.run / "convert") == converted
    disk.free()
    assert run("eval.stage", recipe, "convert", run_dir).code == 0


@pytest.mark.parametrize("program", ["stages.run", "stages.mixing", "eval.stage"])
def test_with_no_byte_left(disk, arguments, converted, program):
    disk.leave(0)
    before = contents(disk.run)
    recipe, *rest = arguments
    ended = run(program, recipe, *(["convert"] if program == "eval.stage" else []), *rest)
    require_refused(ended, "the disk is full")
    assert contents(disk.run) == before
