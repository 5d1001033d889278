"""The programs of this checkout as real processes that start at once.

``python -m stages.run`` spends its first seconds on imports. Here a process is forked from a server that has done
them and computed nothing, and from there on does what ``python -m MODULE ARGUMENTS`` does in the checkout's root.
``fresh`` runs that very command.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
"""Seconds after which a process is given up."""

# One thread: sums over several would differ from run to run. No GPU: every machine computes the same here.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["distill.run", "eval.stage", "eval.report", "stages.command"])


class Ended(NamedTuple):
    """What a process left behind; ``code`` is negative where a signal ended it."""

    code: int
    out: str
    err: str


class Program:
    """A process under way: ``python -m MODULE ARGUMENTS``."""

    def __init__(self, module: str, *arguments: object) -> None:
        self._said = tempfile.TemporaryDirectory()
        for name in ("out", "err"):
            Path(self._said.name, name).touch()
        self._process = _server.Process(target=_become, args=([module, *map(str, arguments)], self._said.name))
        self._process.start()

    def signal_when(self, number: signal.Signals, moment: Callable[[], bool]) -> None:
        """Send the signal as soon as ``moment`` has come; the process must not have ended before."""
        given_up = time.monotonic() + PATIENCE
        while not moment():
            assert self._process.is_alive(), f"ended before the signal came: {self.wait()}"
            assert time.monotonic() < given_up
            time.sleep(0.001)
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> Ended:
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"not done after {PATIENCE:.0f} s")
        with self._said:
            out, err = (Path(self._said.name, name).read_text() for name in ("out", "err"))
        return Ended(self._process.exitcode, out, err)


def run(module: str, *arguments: object) -> Ended:
    """Run a program to its end."""
    return Program(module, *arguments).wait()


def require_refused(ended: Ended, *said: str) -> None:
    """Exit code 2, and on stderr at most a screen that says all of this."""
    assert ended.code == 2, ended
    assert not [text for text in said if text not in ended.err], ended.err
    lines = ended.err.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 500
    assert "Traceback" not in ended.err


def fresh(module: str, *arguments: object, environment: Mapping[str, str] = {}) -> Ended:
    """``python -m MODULE ARGUMENTS`` as a user starts it, in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=CHECKOUT,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def _become(command: list[str], said: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(CHECKOUT)
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)  # the server, which imported torch, may have been started with another environment
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
