"""Tokenising in other processes: in order, not far ahead, and nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.data.tokenising import encode
from distill.data.workers import encoder
from distill.errors import UserError
from tests.conftest import CHECKOUT
from tests.distill.data.ending import Ending

TEXTS = [[f"text {chunk}-{i} " * (1 + (7 * chunk + i) % 5) for i in range(3)] for chunk in range(40)]


@pytest.fixture
def tokenising(tokenizer):
    return tokenizer, [0], [], "<u2"


def test_results_come_in_order_and_are_the_same(tokenising):
    expected = [encode(tokenising, texts) for texts in TEXTS]
    for workers in (1, 3):
        with encoder(tokenising, workers) as tokenise:
            assert list(tokenise(iter(TEXTS))) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_is_read_than_the_workers_can_use(tokenising, workers):
    """So a terabyte, or a stream without end, takes no more memory than this."""
    n_read = 0

    def endless():
        nonlocal n_read
        while True:
            n_read += 1
            yield ["a text that is never the last"]

    with encoder(tokenising, workers) as tokenise:
        results = tokenise(endless())
        for taken in range(1, 30):
            next(results)
            assert n_read - taken <= 2 * workers


@pytest.mark.parametrize(("how", "said"), [("killed", "by signal 9"), ("raised", "with exit code 1")])
def test_a_worker_that_ends_is_said_at_once(how, said):
    with (
        pytest.raises(UserError, match=rf"a process that tokenises ended {said}.*perhaps with fewer workers"),
        encoder((Ending(how), [], [], "<u2"), 2) as tokenise,
    ):
        list(tokenise(iter(TEXTS)))


def test_workers_end_with_the_block(tokenising):
    others = set(children(os.getpid()))
    with encoder(tokenising, 2) as tokenise:
        next(tokenise(iter(TEXTS)))
        workers = set(children(os.getpid())) - others
        assert len(workers) == 2
    assert not any(map(is_running, workers))


STARTER = """
import sys, time
from transformers import AutoTokenizer
from distill.data.workers import encoder
from tests.distill.data.test_workers import TEXTS, children
import os, json
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with encoder((tokenizer, [], [], "<u4"), 2) as tokenise:
    results = tokenise(TEXTS[i % 40] for i in range(10**9))
    next(results)
    print(json.dumps(children(os.getpid())), flush=True)
    for _ in results:
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_does(how, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as parent:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 2
        parent.send_signal(how)
        parent.communicate()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    if not tasks.exists():
        pytest.skip("processes are looked up in /proc")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    """Not counting one that nobody has waited for yet, as in a container without an init that does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
