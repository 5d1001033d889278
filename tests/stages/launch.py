"""Programs on several processes: started by the real ``accelerate launch``, or at once and without it.

``Launch`` is the command as a user types it; its launcher and every process spend seconds on imports. ``Ranks`` are
the same processes without a launcher, forked from the server of ``tests.stages.program``: each calls accelerate's
launcher on the same config and, where that would start processes, becomes one of them. So they know what the launcher
tells them, and nobody ends them but they themselves.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from uuid import uuid4

from tests.stages import program
from tests.stages.program import CHECKOUT, ENVIRONMENT, PATIENCE

CONFIGS = CHECKOUT / "recipes" / "launch"
MARK = "LAUNCHED_BY_TEST"
"""An environment variable that all processes of one launch have alike."""


class Left(NamedTuple):
    """What processes left behind.

    Attributes:
        codes: exit codes, negative where a signal ended a process: the launcher's, or every rank's.
        log: all that all of them said.
    """

    codes: tuple[int, ...]
    log: str


class Launch:
    """``accelerate launch --config_file recipes/launch/CONFIG.yaml -m MODULE ARGUMENTS`` under way.

    Args:
        config: such as "ddp".
        module: a program of the checkout, or of ``path``.
        arguments: the program's.
        ranks: how many processes.
        path: a folder with more modules.
    """

    def __init__(self, config: str, module: str, *arguments: object, ranks: int = 2, path: Path = CHECKOUT) -> None:
        self._mark, self._said = uuid4().hex, tempfile.TemporaryDirectory()
        self._log = Path(self._said.name, "log")
        here = {MARK: self._mark, "PYTHONPATH": f"{path}:{CHECKOUT}", "DS_ACCELERATOR": "cpu"}
        with self._log.open("w") as log:
            self._launcher = subprocess.Popen(
                [sys.executable, "-m", *_launcher(config, ranks, module, arguments)],
                cwd=CHECKOUT,
                env={**os.environ, **ENVIRONMENT, **here},
                stdout=log,
                stderr=log,
            )

    def signal_when(self, number: signal.Signals, moment: Callable[[], bool], rank: int | None = None) -> None:
        """Send the signal, to the launcher or to a rank, as soon as ``moment`` has come."""
        _until(moment, lambda: self._launcher.poll() is None, self.log)
        os.kill(self._launcher.pid if rank is None else self.processes()[rank], number)

    def wait(self) -> Left:
        """Return when the launcher and all that it started have ended."""
        given_up = time.monotonic() + PATIENCE
        try:
            code = self._launcher.wait(PATIENCE)
            while self.processes():
                assert time.monotonic() < given_up, f"a process outlives its launcher:\n{self.log()}"
                time.sleep(0.01)
        finally:
            self._launcher.kill()
            for process in self.processes().values():
                os.kill(process, signal.SIGKILL)
        with self._said:
            return Left((code,), self.log())

    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> dict[int, int]:
        """The process id of every rank that lives; of its own children, which have its environment, none."""
        ranks = {
            process: int(environment["RANK"])
            for process, environment in _environments()
            if environment.get(MARK) == self._mark and "RANK" in environment
        }
        return {rank: process for process, rank in ranks.items() if _parent(process) not in ranks}


class Ranks:
    """What ``Launch`` starts, without the launcher.

    Args:
        before: called in every process with its rank, before the program; a function of a module.
    """

    def __init__(
        self,
        config: str,
        module: str,
        *arguments: object,
        ranks: int = 2,
        before: Callable[[int], object] | None = None,
    ) -> None:
        self._said = tempfile.TemporaryDirectory()
        for name in ("out", "err"):
            Path(self._said.name, name).touch()
        command, port = [module, *map(str, arguments)], _free_port()
        self._processes = [
            program._server.Process(
                target=_become, args=(config, rank, ranks, port, command, self._said.name, before), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def signal_when(self, number: signal.Signals, moment: Callable[[], bool], rank: int) -> None:
        """Send the signal to a rank as soon as ``moment`` has come."""
        _until(moment, lambda: all(process.is_alive() for process in self._processes), self.log)
        process = self._processes[rank].pid
        assert process is not None
        os.kill(process, number)

    def wait(self) -> Left:
        """Return when all have ended."""
        given_up = time.monotonic() + PATIENCE
        for process in self._processes:
            process.join(max(0.0, given_up - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
        with self._said:
            log = self.log()
        assert None not in codes, f"a process did not end: {codes}\n{log}"
        return Left(tuple(code for code in codes if code is not None), log)

    def log(self) -> str:
        return "".join(Path(self._said.name, name).read_text() for name in ("out", "err"))


def _launcher(config: str, ranks: int, module: str, arguments: tuple[object, ...]) -> list[str]:
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(ranks)]
    return ["accelerate.commands.launch", *options, "-m", module, *map(str, arguments)]


def _become(
    config: str,
    rank: int,
    ranks: int,
    port: int,
    command: list[str],
    said: str,
    before: Callable[[int], object] | None,
) -> None:
    """Go through accelerate's launcher and, where it would start processes, become one."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    def as_rank(_options: Any) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        if before is not None:
            before(rank)
        program._become(command, said)

    gc.freeze()  # what the server has imported stays; to look through it takes longer than most of what is tested
    os.environ["DS_ACCELERATOR"] = "cpu"
    arguments = launch_command_parser().parse_args(_launcher(config, ranks, command[0], tuple(command[1:]))[1:])
    with mock.patch("torch.distributed.run.run", as_rank):
        launch_command(arguments)


def _until(moment: Callable[[], bool], is_alive: Callable[[], bool], log: Callable[[], str]) -> None:
    given_up = time.monotonic() + PATIENCE
    while not moment():
        assert is_alive(), f"ended before the signal came:\n{log()}"
        assert time.monotonic() < given_up
        time.sleep(0.001)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """The process id and environment of every process that lives and may be looked at."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        yield int(folder.name), dict(entry.split("=", 1) for entry in told.split("\0") if "=" in entry)


def _parent(process: int) -> int | None:
    """Its parent's id; None if it has ended meanwhile."""
    try:
        told = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(told.rpartition(")")[2].split()[1])  # behind the name, which may hold anything: state, parent


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
