"""The first stage of every run: teacher in, student out, handed on like any other stage's."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill import handover
from distill.capture import Batch
from distill.conversion import convert_with_report, load_teacher
from distill.data import TrainingBatches
from distill.engines import processes
from distill.evaluation import evaluate
from distill.fitting import calibrate_student
from distill.handover import StageRecord
from distill.run import CONVERT, DTYPES, Run
from distill.threads import every_core

TOKENS_AT_ONCE = 4096
"""Of the text that seeds are calibrated on; at least a block."""


def convert_stage(run: Run) -> StageRecord:
    """Turn the teacher into a student and hand it on as the stage ``convert``; the main process does it."""
    held_out, batches = run.held_out(), _calibration_batches(run)  # before the teacher: unusable text shows at once
    if not run.launched.shards_weights:
        _ = run.teacher  # by every process at once: they need it anyway
        return processes.on_main(lambda: _convert(run, held_out, batches))
    with every_core():
        return processes.on_main(lambda: _convert(run, held_out, batches))


def _calibration_batches(run: Run) -> list[Batch]:
    """Training text for ``student.calibrate``, in an order of its own; none where nothing is calibrated."""
    wanted, rows = run.recipe.student.calibrate, run.blocks[0]
    if wanted is None:
        return []
    size = max(1, TOKENS_AT_ONCE // rows.block)
    text = TrainingBatches(rows, size, run.recipe.seed)
    blocks = min(-(-wanted.tokens // rows.block), text.n)
    indices = text.first(blocks)
    return [rows.batch(indices[first : first + size]) for first in range(0, blocks, size)]


def conversion_of(run: Run) -> dict[str, Any]:
    """What ``distill.conversion.convert`` takes besides the teacher, as a run's recipe has it."""
    wanted = run.recipe.student
    return {
        "keep_attention": run.facts.kept,
        "seed": run.recipe.seed,
        "seed_from_attention": wanted.seed_from_attention,
        "from_scratch": wanted.from_scratch,
        **wanted.settings(),
    }


def _convert(run: Run, held_out: Iterator[Batch], batches: list[Batch]) -> StageRecord:
    started = time.perf_counter()
    if run.launched.shards_weights:  # a process has a part of the common one only
        teacher = load_teacher(run.recipe.teacher.path, DTYPES[run.recipe.teacher.dtype])
    else:
        teacher = run.teacher
    student, report = convert_with_report(teacher, **conversion_of(run))
    if batches:
        wanted = run.recipe.student.calibrate
        assert wanted is not None
        fitted = calibrate_student(student, teacher, batches, **wanted.model_dump(exclude={"tokens"}))
        report = replace(report, calibrated=fitted)
    # What is too large for one device is measured by all of them, in the evaluation that follows.
    loss = None if run.launched.shards_weights else evaluate(student, None, held_out).loss

    return hand_on(run, student, {"conversion.json": report.to_json()}, loss=loss, started=started)


def hand_on(
    run: Run, student: PreTrainedModel, accounts: dict[str, Any], *, loss: float | None, started: float
) -> StageRecord:
    """Write the stage ``convert`` of a run: a student that nothing was trained of.

    Args:
        accounts: JSON beside the student, by the name of its file: where the student comes from.
        loss: on the held-out text, if it was measured.
        started: when making it began, by ``time.perf_counter``.
    """

    def save(folder: Path) -> None:
        student.save_pretrained(folder)
        run.save_beside(folder)
        for name, account in accounts.items():
            (folder / name).write_text(json.dumps(account, indent=1))

    record = StageRecord(
        stage=CONVERT,
        parent=run.origin,
        loss_start=loss,
        loss_end=loss,
        steps=0,
        tokens=0,
        seconds=time.perf_counter() - started,
        settings=run.recipe.stage_digest(CONVERT),
    )
    return handover.write(run.folder(CONVERT), save, record)
