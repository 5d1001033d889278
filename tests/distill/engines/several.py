"""A program in several real processes at once, which find each other as those of ``accelerate launch`` do.

They are forked from a server that has imported torch and computed nothing, so that they start at once.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from distill.engines import processes

PATIENCE = 120.0
"""Seconds after which a process is given up."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["distill.run"])


def several(count: int, program: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``program(*arguments)`` returns in each of ``count`` processes.

    Args:
        count: how many processes.
        program: a function of a module, called when the processes have found each other.
        arguments: for every process the same.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = []
    for rank in range(count):
        here, there = _server.Pipe(duplex=False)
        # A daemon, so that it does not outlive a test that gave up.
        process = _server.Process(
            target=_become, args=(rank, count, store.port, there, program, arguments), daemon=True
        )
        process.start()
        there.close()
        answers.append((process, here))
    results, failures = [], []
    for rank, (process, answer) in enumerate(answers):
        try:
            ended_well, result = pickle.loads(answer.recv_bytes()) if answer.poll(PATIENCE) else (False, "it hung")
        except EOFError:
            ended_well, result = False, "it died"
        results.append(result)
        if not ended_well:
            failures.append(f"process {rank}: {result}")
            process.kill()
        process.join(PATIENCE)
    assert not failures, "\n".join(failures)
    return results


def _become(
    rank: int, count: int, port: int, answer: Connection, program: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is already there, on a port that nobody else can have taken
    )
    try:
        processes.start("cpu")
        result = program(*arguments)
        processes.wait()  # or the first to leave could break what the others are still at
        told = pickle.dumps((True, result))
    except BaseException:
        told = pickle.dumps((False, traceback.format_exc()))
    answer.send_bytes(told)
