"""The command line of every program that tunes a finished model: a recipe of its own kind, then settings."""

from functools import partial

from rich.console import Console

from distill.finetuning.job import Job, Load, at_work_on_tuning
from distill.handover import StageRecord
from distill.units import count
from stages.command import run_program


def tuning_program(load: Load, description: str) -> None:
    """Read the arguments, check the recipe that ``load`` reads, and train as it says unless that is done."""
    run_program(tune_and_tell, description, partial(at_work_on_tuning, load=load))


def tune_and_tell(job: Job) -> StageRecord | None:
    """The record of what was trained; None where nothing was left to do."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if job.is_done():
        console.print(f"{job.folder}: already done")
        return None
    from distill.finetuning.trainer import tune  # its imports take longer than all checks

    record = tune(job, console.print)
    console.print(
        f"{job.folder}: loss {record.loss_start:.4f} → {record.loss_end:.4f} in {record.steps} steps,"
        f" {count(record.tokens)} tokens, {record.seconds:.0f} s"
    )
    return record
