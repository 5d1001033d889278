"""What happens to a run of several processes when something breaks, phase by phase, and that nothing is lost.

docs/faults.md has a row for each of these.
"""

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

    left = Launch(*command).wait()
    require_done(left)
    assert "logits/checkpoints/step-00000012" in left.log
    require_same_run(folder, expected)
