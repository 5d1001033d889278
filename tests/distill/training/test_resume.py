"""kill -9 at any moment, then the same call: bitwise the run that was never interrupted. Real processes."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import CADENCE, STEPS, metrics, run

from distill.engines import training_state
from distill.training import checkpoint

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parents[3]


def start(folder: Path, *how: str, under: tuple[str, ...] = ()) -> tuple[list[int], str]:
    """The wait statuses of processes run one after another in ``folder``, and what they said.

    Args:
        under: a command that runs the command that follows it.
    """
    script = Path(__file__).with_name("tiny_run.py")
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    command = [*under, sys.executable, str(script), str(folder), *how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert start(folder, "finish")[0] == [0]
    assert len(metrics(folder)) == STEPS + 5
    return folder


def require_same(folder: Path, expected: Path) -> None:
    assert metrics(folder) == metrics(expected)
    got, wanted = (checkpoint.newest(each / "checkpoints") for each in (folder, expected))
    assert got.step == wanted.step == STEPS
    weights = training_state.read_weights(got.folder / "state")
    for name, weight in training_state.read_weights(wanted.folder / "state").items():
        assert torch.equal(weights[name], weight), name
    assert not list((folder / "checkpoints").glob(".*"))


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_random_steps(tmp_path, uninterrupted):
    kills = [f"step:{random.randint(1, 7)}" for _ in range(3)]
    print("kills:", kills)
    statuses, _ = start(tmp_path, *kills, "finish")
    assert killed(statuses[0])
    assert statuses[-1] == 0
    require_same(tmp_path, uninterrupted)


def test_killed_at_random_moments(tmp_path, uninterrupted):
    kills = [f"after:{random.uniform(0.05, 1.0):.3f}" for _ in range(6)]
    print("kills:", kills)
    statuses, _ = start(tmp_path, *kills, "finish")
    assert statuses[-1] == 0
    require_same(tmp_path, uninterrupted)


def test_killed_while_a_checkpoint_is_half_written(tmp_path, uninterrupted):
    statuses, _ = start(tmp_path, "partial:1", "partial:2", "partial:1", "finish")
    assert any(map(killed, statuses)), "every checkpoint was written before the kill came"
    assert statuses[-1] == 0
    require_same(tmp_path, uninterrupted)


@pytest.fixture
def flushes(tmp_path, monkeypatch) -> int:
    """How many times one save flushes to disk."""
    calls, fsync = [], os.fsync
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: (calls.append(handle), fsync(handle)))
        run(tmp_path / "counted", cadence=replace(CADENCE, checkpoint_every=STEPS))
    return len(calls)


def test_killed_at_every_flush_of_a_checkpoint(tmp_path, uninterrupted, flushes):
    """The last two kills come in the second save of a process."""
    assert flushes >= 9  # metrics, state with two files, generators, loop, manifest, the folder, its parent
    folder = tmp_path / "killed"
    statuses, _ = start(folder, *(f"fsync:{number}" for number in range(1, flushes + 3)), "finish")
    assert all(map(killed, statuses[:flushes]))
    assert statuses[-1] == 0
    require_same(folder, uninterrupted)


def test_a_damaged_checkpoint_on_the_way_changes_nothing(tmp_path, uninterrupted):
    start(tmp_path, "step:11")
    (weights,) = (tmp_path / "checkpoints/step-00000008/state").glob("*.distcp")
    os.truncate(weights, weights.stat().st_size // 2)
    statuses, said = start(tmp_path, "finish")
    assert statuses == [0]
    assert f"refused a damaged checkpoint: {weights} has" in said
    assert "; trying the one before it" in said
    assert f"continuing from {tmp_path / 'checkpoints/step-00000004'}" in said
    require_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("how", ["term", "terms"], ids=["once", "and again while it saves"])
def test_sigterm_saves_and_exits_with_143(tmp_path, uninterrupted, how):
    statuses, said = start(tmp_path, f"{how}:6", "finish")
    assert os.waitstatus_to_exitcode(statuses[0]) == 143
    assert f"stopped by SIGTERM after step 6 of {STEPS}; the same command goes on from there" in said
    assert f"continuing from {tmp_path / 'checkpoints/step-00000006'}" in said
    assert statuses[1] == 0
    require_same(tmp_path, uninterrupted)


def test_nohup_shields_a_run(tmp_path, uninterrupted):
    """And without it the same signal stops the run."""
    statuses, said = start(tmp_path / "shielded", "hup:6", under=("nohup",))
    assert statuses == [0]
    assert "stopped by" not in said
    require_same(tmp_path / "shielded", uninterrupted)
    statuses, said = start(tmp_path / "bare", "hup:6")
    assert os.waitstatus_to_exitcode(statuses[0]) == 129
