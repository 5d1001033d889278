"""scripts/multi_node.sh: two "machines" on this one find each other, and a signal to a script reaches its processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

SCRIPT = CHECKOUT / "scripts" / "multi_node.sh"
PATIENCE = 300.0

PROGRAM = """
import json, os, pathlib, signal, sys, time

from distill.engines import processes

processes.start("cpu")
place, rank = pathlib.Path(sys.argv[1]), processes.rank()
seen = {
    "rank": rank,
    "all": processes.gather(rank),
    "arguments": sys.argv[2:],
    "patience": os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
}
asked = []
if "wait for a signal" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
processes.wait()
(place / f"{rank}.up").write_text(json.dumps(seen))
if "wait for a signal" in sys.argv:
    while not any(processes.gather(bool(asked))):
        time.sleep(0.05)
    time.sleep(1)  # longer than a launcher that does not wait for its processes
    (place / f"{rank}.saved").touch()
    processes.wait()
    sys.exit(143)
processes.wait()
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def two_nodes(folder: Path, *arguments: str) -> list[subprocess.Popen]:
    (folder / "program.py").write_text(PROGRAM)
    shared = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{CHECKOUT}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NODES": "2",
        "MASTER": "127.0.0.1",
        "PORT": str(free_port()),
        "GPUS": "1",
        "LAUNCH": "recipes/launch/ddp.yaml",
        "PROGRAM": "program",
    }
    started = []
    for node in (0, 1):
        with open(folder / f"{node}.log", "w") as log:
            command = ["bash", str(SCRIPT), str(folder), *arguments]
            environment = os.environ | shared | {"NODE_RANK": str(node)}
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
    return started


def until(moment: Callable[[], bool], nodes: list[subprocess.Popen], folder: Path) -> None:
    given_up = time.monotonic() + PATIENCE
    while not moment():
        said = "\n".join((folder / f"{node}.log").read_text() for node in (0, 1))
        assert all(node.poll() is None for node in nodes), said
        assert time.monotonic() < given_up, said
        time.sleep(0.05)


def test_without_the_machines_it_says_how_it_is_used():
    ended = subprocess.run(["bash", str(SCRIPT), "recipe.yaml"], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 2
    assert "NODES=2 NODE_RANK=0 MASTER=host0 bash scripts/multi_node.sh RECIPE" in ended.stderr
    assert "#" not in ended.stderr


@pytest.mark.slow
def test_two_machines_become_one_run(tmp_path):
    nodes = two_nodes(tmp_path, "recipe.yaml", "data.source=a b")
    assert [node.wait(PATIENCE) for node in nodes] == [0, 0]
    seen = [json.loads((tmp_path / f"{rank}.up").read_text()) for rank in (0, 1)]
    assert seen == [
        {"rank": rank, "all": [0, 1], "arguments": ["recipe.yaml", "data.source=a b"], "patience": "600"}
        for rank in (0, 1)
    ]


@pytest.mark.slow
def test_a_signal_to_one_script_lets_both_save(tmp_path):
    nodes = two_nodes(tmp_path, "wait for a signal")
    until(lambda: all((tmp_path / f"{rank}.up").exists() for rank in (0, 1)), nodes, tmp_path)
    nodes[1].send_signal(signal.SIGTERM)
    assert [node.wait(PATIENCE) for node in nodes] == [1, 1]
    assert all((tmp_path / f"{rank}.saved").exists() for rank in (0, 1))
