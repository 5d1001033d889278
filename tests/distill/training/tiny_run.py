"""A run of the real loop that takes milliseconds, and a program that kills it in as many ways as it is told.

    python tiny_run.py FOLDER HOW HOW ...

Each HOW is one process that runs the same call in FOLDER, one after the other; see ``start``. Processes are forked
from this one, which has imported torch but computed nothing. Their exit statuses are printed as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.engines.engine import Engine, Groups
from distill.engines.plain import PlainEngine
from distill.objectives import hidden_distance
from distill.training import Cadence, Part, TrainResult, parameter_groups, schedule, train

STEPS, ACCUMULATE, TOKENS = 20, 2, 2 * 3 * 8
SIGNALS = {"step": signal.SIGKILL, "term": signal.SIGTERM, "terms": signal.SIGTERM, "hup": signal.SIGHUP}
CADENCE = Cadence(eval_every=6, checkpoint_every=4, keep_checkpoints=2)


class Student(nn.Module):
    """Two layers that train alone; dropout makes the torch generator matter."""

    def __init__(self, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )


class Alignment:
    """Every layer beside a fixed target; the other two generators matter as well when ``noise`` is set."""

    layerwise = True

    def __init__(self, student: Student, noise: float) -> None:
        self.student, self.noise = student, noise

    def begin(self, done: float) -> None:
        pass

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(batch["valid"].sum())

    def parts(self, batch: dict[str, Tensor]) -> Iterator[Part]:
        inputs = self.student.embed(batch["input_ids"]).detach()
        for index, layer in enumerate(self.student.layers):
            jitter = 1 + self.noise * (random.random() + np.random.rand())
            target = jitter * inputs.flip(-1)
            yield Part(f"layers.{index}", partial(self._distance, layer, inputs, target, batch["valid"]))

    def _distance(self, layer: nn.Module, inputs: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return hidden_distance(layer(inputs), target, valid, reduction="sum")


def micro_batch(index: int, sequences: int = 3) -> dict[str, Tensor]:
    """Sequences of 8 tokens with a random amount of padding."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(50, (sequences, 8), generator=generator)
    lengths = torch.randint(1, 9, (sequences, 1), generator=generator)
    return {"input_ids": ids, "valid": torch.arange(8) < lengths}


def groups_of(student: Student, lr: float = 0.01) -> list[dict[str, Any]]:
    """The layers train, the embedding does not."""
    return parameter_groups(student, lambda name: name.split(".")[0], ["layers"], lr=lr)


def run(
    folder: Path,
    *,
    student: Student | None = None,
    make_engine: Callable[[Student, Groups], Engine] = PlainEngine,
    seed: int = 0,
    noise: float = 1.0,
    lr: float = 0.01,
    **changed: Any,
) -> TrainResult:
    """Train a fresh student by the usual call, with any argument of ``train`` changed."""
    torch.manual_seed(0)
    student = student or Student()
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    steps = changed.get("steps", STEPS)
    groups = groups_of(student, lr)
    arguments: dict[str, Any] = {
        "objective": Alignment(student, noise),
        "student": student,
        "engine": make_engine(student, groups),
        "groups": groups,
        "schedule": partial(schedule, steps=steps, warmup=0.2, decay=0.2),
        "batch": micro_batch,
        "steps": STEPS,
        "accumulate": ACCUMULATE,
        "clip": 0.5,
        "tokens_per_step": TOKENS,
        "folder": folder,
        "evaluate": lambda: {"draw": float(torch.rand(())), "norm": float(student.layers[0][0].weight.norm())},
        "cadence": CADENCE,
        "trackers": [],
        "device": torch.device("cpu"),
    }
    return train(**arguments | changed)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("cpu_seconds", None)
    return lines


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if line["kind"] == "train"]


def saved(folder: Path) -> list[str]:
    """The checkpoints' names, and whatever else lies beside them."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stop_at(
    index: int, how: Callable[[], object], make: Callable[[int], dict[str, Tensor]] = micro_batch
) -> Callable[[int], dict[str, Tensor]]:
    """A batch function that does ``how`` when micro-batch ``index`` is asked for."""

    def batch(asked: int) -> dict[str, Tensor]:
        if asked == index:
            how()
        return make(asked)

    return batch


def crash() -> None:
    raise RuntimeError("pulled the plug")


def start(folder: Path, how: str) -> int:
    """Run once in a process of its own, and return its wait status.

    finish        let it be
    step:N        it kills itself (-9) in the middle of its Nth step
    fsync:N       it kills itself just before its Nth fsync
    after:S       it is killed S seconds after its start
    partial:N     it is killed when the Nth half-written checkpoint appears
    term:N        it sends itself SIGTERM in the middle of its Nth step
    terms:N       the same, and again at every fsync from then on
    hup:N         it sends itself SIGHUP in the middle of its Nth step
    """
    kind, _, number = how.partition(":")
    child = os.fork()
    if child == 0:
        exit_as(lambda: _run_until(folder, kind, int(number) if number.isdigit() else 0))
    if kind == "after":
        time.sleep(float(number))
        os.kill(child, signal.SIGKILL)
    seen: set[str] = set()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        seen.update(path.name for path in (folder / "checkpoints").glob(".*.partial"))
        if kind == "partial" and len(seen) >= int(number):
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]


def exit_as(program: Callable[[], object]) -> None:
    """Leave the process as a program that ran ``program`` would."""
    code = 1
    try:
        program()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run_until(folder: Path, kind: str, number: int) -> None:
    asked, synced, fsync = 0, 0, os.fsync

    def batch(index: int) -> dict[str, Tensor]:
        nonlocal asked
        asked += 1
        if kind in SIGNALS and asked == number * ACCUMULATE:
            os.kill(os.getpid(), SIGNALS[kind])
        return micro_batch(index)

    def counted_fsync(handle: int) -> None:
        nonlocal synced
        synced += 1
        if kind == "fsync" and synced == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "terms" and asked >= number * ACCUMULATE:
            os.kill(os.getpid(), signal.SIGTERM)
        fsync(handle)

    os.fsync = counted_fsync
    torch.manual_seed(0)
    # A wide student, so that writing a checkpoint takes long enough to be caught at it.
    run(folder, student=Student(width=400), batch=batch)


if __name__ == "__main__":
    print(json.dumps([start(Path(sys.argv[1]), how) for how in sys.argv[2:]]))
