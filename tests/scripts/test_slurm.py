"""scripts/slurm.sh against a pretended Slurm: the commands it gives, and when it queues again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import CHECKOUT

SCRIPT = CHECKOUT / "scripts" / "slurm.sh"
MULTI_NODE = CHECKOUT / "scripts" / "multi_node.sh"
PATIENCE = 60.0

# What the pretended commands do; each notes its words in `said`, and `here` is the test's folder.
RUNS_ITS_COMMAND = 'shift; SLURM_NODEID=1 "$@"'
ENDS_WITH = "exit {}"
STOPS_WHEN_ASKED = 'touch "$here/up"; until [ -e "$here/asked" ]; do sleep 0.05; done; exit {}'
PRETENDED = {
    "scontrol": '[ "$1" = requeue ] || printf "node7\\nnode8\\n"',
    "scancel": 'touch "$here/asked"',
    "accelerate": 'env | grep -E "^(TORCH_ELASTIC|SRUN_)" | sort >"$here/environment"',
}


class Ended(NamedTuple):
    code: int
    said: list[str]


def job(folder: Path, srun: str, *, signalled: bool = False) -> Ended:
    """The script as the batch shell of job 123 on two machines of eight GPUs."""
    commands = folder / "bin"
    commands.mkdir()
    for name, body in (PRETENDED | {"srun": srun}).items():
        (commands / name).write_text(f'#!/usr/bin/env bash\nhere={folder}\necho "{name} $*" >>"$here/said"\n{body}\n')
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    batch = subprocess.Popen(
        ["bash", str(SCRIPT), "recipes/mine.yaml", "name=a b"], env=os.environ | slurm, cwd=CHECKOUT
    )
    if signalled:
        given_up = time.monotonic() + PATIENCE
        while not (folder / "up").exists():
            assert batch.poll() is None
            assert time.monotonic() < given_up
            time.sleep(0.01)
        batch.send_signal(signal.SIGUSR1)
    code = batch.wait(PATIENCE)
    return Ended(code, (folder / "said").read_text().splitlines())


def test_each_machine_gets_a_launcher_that_knows_its_place(tmp_path):
    ended = job(tmp_path, RUNS_ITS_COMMAND)
    assert ended.code == 0
    assert ended.said[0] == "scontrol show hostnames node[7-8]"
    assert ended.said[1].startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert ended.said[2:] == [
        "accelerate launch --config_file recipes/launch/multi_node.yaml --num_machines 2 --machine_rank 1"
        " --num_processes 16 --main_process_ip node7 --main_process_port 20123 -m stages.run recipes/mine.yaml name=a b"
    ]
    environment = (tmp_path / "environment").read_text()
    assert environment == "SRUN_CPUS_PER_TASK=32\nTORCH_ELASTIC_SHUTDOWN_TIMEOUT=600\n"


@pytest.mark.parametrize("code", [0, 1, 137])
def test_what_ends_by_itself_is_not_queued_again(tmp_path, code):
    ended = job(tmp_path, ENDS_WITH.format(code))
    assert ended.code == code
    assert not [line for line in ended.said if "requeue" in line or line.startswith("scancel")]


@pytest.mark.parametrize("code", [1, 143])
def test_what_was_asked_to_stop_is_queued_again_once_it_has_stopped(tmp_path, code):
    ended = job(tmp_path, STOPS_WHEN_ASKED.format(code), signalled=True)
    assert ended.code == 0
    assert ended.said[-2:] == ["scancel --signal=TERM 123", "scontrol requeue 123"]


def test_what_finished_although_asked_to_stop_is_done(tmp_path):
    ended = job(tmp_path, STOPS_WHEN_ASKED.format(0), signalled=True)
    assert ended.code == 0
    assert ended.said[-1] == "scancel --signal=TERM 123"


def test_saving_may_take_less_time_than_slurm_leaves():
    leaves = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    takes = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)}", MULTI_NODE.read_text())
    assert leaves is not None
    assert takes is not None
    assert int(takes[1]) + 60 < int(leaves[1])
