"""The processes in which runs of a comparison are carried out, several at a time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context

from distill.programs import quiet_unless_watched
from scripts.comparison_runs import Common, Fields, Wanted, carry_out

GRACE = 30  # seconds for a step to end and be saved


def carried_out(pool: ProcessPoolExecutor, common: Common, wanted: Sequence[Wanted]) -> list[Fields]:
    """The results of all, in the order given."""
    running = {pool.submit(carry_out, common, one): one for one in dict.fromkeys(wanted)}
    done: dict[Wanted, Fields] = {}
    try:
        for future in as_completed(running):
            one = running[future]
            done[one] = future.result()
            print(
                f"{len(done)}/{len(running)} {one.folder(common.output)}: {_said(done[one])}",
                file=sys.stderr,
                flush=True,
            )
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():  # those at work save what they have
            process.terminate()
        raise
    return [done[one] for one in wanted]


def _said(result: Fields) -> str:
    return result["failed"] if "failed" in result else f"loss {result['loss']:.4f}, KL {result['kl']:.4f}"


def processes(jobs: int) -> ProcessPoolExecutor:
    """Fresh ones with a thread each: sums over several threads would not be the same on every machine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """In a process of the pool: it ends, its run saved, when the comparison is killed; else it would hold the run.

    A signal alone ends no more than the run at work: the pool's own code would go on with the next one it was given.
    """
    quiet_unless_watched()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
