"""What every tuning program does with its recipe's job, and what it says of it."""

from rich.console import Console

from distill.finetuning.job import Job
from distill.handover import StageRecord
from distill.units import count


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
