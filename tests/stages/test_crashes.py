"""What happens to a run of several processes when something breaks, phase by phase, and that nothing is lost.

docs/faults.md has a row for each of these.
"""

import functools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stages.conftest import CALM, STEPS, write_recipe
from tests.stages.launch import Launch, Left, Ranks
from tests.stages.program import require_refused, run
from tests.stages.run_folder import STAGES, contents, metrics, require_same_run
from tests.stages.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def unfinished(run: Path, to: Path, *stages: str) -> Path:
    """A copy of a whole run in which the last ``stages`` are still to be made."""
    copy = Path(shutil.copytree(run, to))
    for stage in stages:
        shutil.rmtree(copy / stage)
        shutil.rmtree(copy / "training" / stage)
    return copy


def made(folder: Path, stage: str, steps: int) -> Callable[[], bool]:
    """Whether the stage has come so far."""
    path = folder / "training" / stage / "metrics.jsonl"
    return lambda: path.is_file() and path.read_text().count('"train"') >= steps


def require_done(left: Left) -> None:
    assert not any(left.codes), left.log


@pytest.mark.parametrize("config", ENGINES)
def test_a_rank_killed_mid_stage(uninterrupted, recipe, config):
    """Under the launcher: it ends, says why, and the same command makes what an uninterrupted run makes, bit for bit.

    That holds under every engine: sums over two processes have one order, and two processes draw no number that a
    checkpoint does not hold.
    """
    expected = uninterrupted(config)
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = config, "stages.run", recipe, *CALM
    launch = Launch(*command)
    launch.signal_when(signal.SIGKILL, made(folder, "hidden", 9), rank=1)
    left = launch.wait()
    assert left.codes == (1,)
    assert "exitcode  : -9" in left.log
    assert "Signal 9 (SIGKILL) received" in left.log
    assert [path.name for path in (folder / "training/hidden/checkpoints").glob("step-*")] == ["step-00000006"]

    ranks = Ranks(*command)
    ranks.signal_when(signal.SIGKILL, made(folder, "logits", 14), rank=0)
    left = ranks.wait()
    assert left.codes[0] == -signal.SIGKILL
    assert left.codes[1] not in (0, -signal.SIGKILL)
    assert "hidden/checkpoints/step-00000006" in left.log

    left = Ranks(*command).wait()
    require_done(left)
    assert "logits/checkpoints/step-00000012" in left.log
    require_same_run(folder, expected)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_the_launcher_is_asked_to_stop(uninterrupted, recipe, times):
    """All processes finish the step and save, however often they are asked; the same command goes on from there."""
    expected = uninterrupted("fsdp2")
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = "fsdp2", "stages.run", recipe, *CALM
    launch = Launch(*command)
    launch.signal_when(signal.SIGTERM, made(folder, "hidden", 8))
    if times == 2:  # which the launcher does not wait for, but its processes do
        launch.signal_when(signal.SIGTERM, lambda: "closing signal SIGTERM" in launch.log())
    left = launch.wait()
    assert left.codes == (1,)
    step = metrics(folder / "training/hidden")[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of {STEPS}; the same command goes on from there" in left.log
    left = Launch(*command).wait()
    require_done(left)
    assert f"continuing from {folder}/training/hidden/checkpoints/step-{step:08d}" in left.log
    require_same_run(folder, expected)


@pytest.fixture(scope="module")
def killed(uninterrupted, tmp_path_factory, saved_teacher, text) -> Callable[[str], Path]:
    """A run under a config of which a process was killed in stage 2, after two checkpoints; killed once."""

    @functools.cache
    def killed_once(config: str) -> Path:
        expected, folder = uninterrupted(config), tmp_path_factory.mktemp("killed")
        stopped = unfinished(expected, folder / "run", "hidden", "logits")
        ranks = Ranks(config, "stages.run", write_recipe(folder, saved_teacher, text), *CALM)
        ranks.signal_when(signal.SIGKILL, made(stopped, "hidden", 14), rank=1)
        assert ranks.wait().codes[1] == -signal.SIGKILL
        return stopped

    return killed_once


@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [("fsdp2", "one", 1), ("fsdp2", "ddp", 2), ("fsdp2", "fsdp2", 4), ("one", "fsdp2", 2), ("ddp", "one", 1)],
)
def test_going_on_with_other_processes(uninterrupted, killed, recipe, before, after, ranks):
    """The losses that follow are one process's; a tolerance as for any other number of processes."""
    folder = Path(shutil.copytree(killed(before), recipe.with_name("run")))
    left = run("stages.run", recipe, *CALM) if after == "one" else Ranks(after, "stages.run", recipe, *CALM, ranks=ranks).wait()


@pytest.mark.parametrize(
    ("before", "after", "ranks", "said"),
    [
        ("zero2", "zero2", 4, "was written by DeepSpeed on 2 processes and this run has 4; launch as many as before"),
        ("zero2", "fsdp2", 2, "was written by DeepSpeed"),
        ("zero2", "one", 1, "was written by DeepSpeed"),
        ("zero3", "zero2", 2, "was written by"),
        ("fsdp2", "zero3", 2, "was not written by DeepSpeed"),
    ],
)
def test_deepspeed_goes_on_as_it_was_only(killed, recipe, before, after, ranks, said):
    folder = Path(shutil.copytree(killed(before), recipe.with_name("run")))
    saved = contents(folder)
    command = "stages.run", recipe, *CALM
    if after == "one":
        require_refused(run(*command), said)
    else:
        left = Ranks(after, *command, ranks=ranks).wait()
        assert left.codes == (2,) * ranks, left.log
        assert left.log.count(said) == 1, left.log
        assert "Traceback" not in left.log
    assert contents(folder) == saved
