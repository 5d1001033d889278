"""Tokenise in several processes, in order, and never far ahead of whoever takes the results."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from distill.data import tokenising as program
from distill.data.tokenising import Encoded, Tokenising, encode
from distill.errors import UserError

Encode = Callable[[Iterable[Sequence[str]]], Iterator[list[Encoded]]]
"""Lists of texts to lists of encoded texts, in the same order."""

Texts = TypeVar("Texts")

# What a worker finds in its environment: one core each, and no warnings about it.
ALONE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def encoder(tokenising: Tokenising, workers: int) -> Iterator[Encode]:
    """What tokenises: with one worker this process, with more as many others.

    The others are started afresh, not forked (this process may hold a GPU and threads), and import nothing of the
    program that runs here. They end with the block, and at the latest with this process.
    """
    if workers == 1:
        yield partial(map, partial(encode, tokenising))
        return
    start = pickle.dumps(tokenising)
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in [stack.enter_context(_worker()) for _ in range(workers)]:
            _tell(worker, start)
            idle.put(worker)

        def call(texts: Sequence[str]) -> list[Encoded]:
            worker = idle.get()
            try:
                return _ask(worker, texts)
            finally:
                idle.put(worker)

        threads = stack.enter_context(ThreadPoolExecutor(workers))
        yield lambda chunks: in_order(lambda texts: threads.submit(call, texts), chunks, ahead=2 * workers)


def in_order(submit: Callable[[Texts], "Future[list[Encoded]]"], chunks: Iterable[Texts], ahead: int) -> Iterator:
    """The result of each chunk in turn; of no more than ``ahead`` chunks is the result waiting or being made."""
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(submit(chunk))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


_Worker = subprocess.Popen[bytes]


@contextmanager
def _worker() -> Iterator[_Worker]:
    environment = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # -P: the folder of the program is no place to import from.
    command = [sys.executable, "-P", str(program.__file__)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        yield worker
    finally:
        worker.kill()
        worker.communicate()


def _ask(worker: _Worker, texts: Sequence[str]) -> list[Encoded]:
    assert worker.stdout
    _tell(worker, list(texts))
    try:
        return pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise _ended(worker) from error


def _tell(worker: _Worker, what: object) -> None:
    assert worker.stdin
    try:
        pickle.dump(what, worker.stdin)
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise _ended(worker) from error


def _ended(worker: _Worker) -> UserError:
    code = worker.wait()
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return UserError(
        f"data.workers: a process that tokenises ended {how} (signal 9 is often a lack of memory); "
        "run the same command again, perhaps with fewer workers: it goes on from the last part that was prepared"
    )
