"""The processes in which runs of a comparison are carried out, several at a time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context

from distill.errors import UserError
from distill.programs import quiet_unless_watched
from distill.training.interrupt import stop_on_signals
from scripts.comparison_runs import Common, Wanted, carry_out
from scripts.measure import Fields

GRACE = 30  # seconds for a step to end and be saved
POLL = 0.2  # seconds between two looks at whether a signal came


def carried_out(pool: ProcessPoolExecutor, common: Common, wanted: Sequence[Wanted]) -> list[Fields]:
    """The results of all, in the order given.

    Raises:
        UserError: as `carry_out`, or a process of the pool was ended by something else.
        SystemExit: 143, 129 or 130, after SIGTERM, SIGHUP or SIGINT. `processes` then has the runs at work saved.
    """
    running = {pool.submit(_carry_out, common, one): one for one in dict.fromkeys(wanted)}
    done: dict[Wanted, Fields] = {}
    with stop_on_signals() as stop:
        while len(done) < len(running):
            for future in wait([f for f, one in running.items() if one not in done], POLL, FIRST_COMPLETED).done:
                one = running[future]
                try:
                    done[one] = future.result()
                except BrokenProcessPool:
                    raise UserError(
                        "a process of the comparison was ended from outside, as it is where memory runs out; the same"
                        " command goes on from what is saved, and takes less memory with fewer --jobs"
                    ) from None
                _say(f"{len(done)}/{len(running)} {one.folder(common.output)}: {_said(done[one])}")
            if stop.signal:
                _say(f"stopped by {stop.signal.name}; the same command goes on from what is saved")
                raise SystemExit(128 + stop.signal)
    return [done[one] for one in wanted]


def _carry_out(common: Common, one: Wanted) -> Fields:
    """In a process of the pool, which ends if it was asked to: the pool's own code would go on with the next run."""
    try:
        return carry_out(common, one)
    except SystemExit as stopped:  # the run is saved
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.code if isinstance(stopped.code, int) else 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _said(result: Fields) -> str:
    return result["failed"] if "failed" in result else f"loss {result['loss']:.4f}, KL {result['kl']:.4f}"


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh ones with a thread each: sums over several threads would not be the same on every machine.

    Whatever ends the block early ends the runs at work too, each after its step, which is saved.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
    try:
        yield pool
    except BaseException:
        _end(pool)
        raise
    pool.shutdown()


def _end(pool: ProcessPoolExecutor) -> None:
    """Return when no process is left; a second Ctrl-C, from a person who is done waiting, kills them."""
    try:
        for process in active_children():
            process.terminate()  # one at work notes it, saves and ends
        pool.shutdown(cancel_futures=True)
    except KeyboardInterrupt:
        for process in active_children():
            process.kill()


def _begin(parent: int) -> None:
    """In a process of the pool: it ends, its run saved, when the comparison is killed; else it would hold the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    quiet_unless_watched()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
