"""Supervised fine-tuning of a student on chats or text, whole or through adapters.

    python -m stages.finetune recipes/finetune/chat.yaml model=runs/quickstart/logits

min − Σ log p(token | what came before), a mean over the tokens that are scored: the assistant's, or all. TRL trains;
the result is a Hugging Face folder, of the model or of an adapter that plain PEFT loads. Whenever it is killed, the
same command goes on.
"""

from rich.console import Console

from distill.finetuning.job import Job, at_work_on_tuning
from distill.handover import StageRecord
from distill.units import count
from stages.command import run_program


def main(job: Job) -> StageRecord | None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if job.is_done():
        console.print(f"{job.folder}: already done")
        return None
    from distill.finetuning.trainer import finetune  # its imports take longer than all checks

    record = finetune(job, console.print)
    console.print(
        f"{job.folder}: loss {record.loss_start:.4f} → {record.loss_end:.4f} in {record.steps} steps,"
        f" {count(record.tokens)} tokens, {record.seconds:.0f} s"
    )
    return record


if __name__ == "__main__":
    run_program(main, "Fine-tune a student on chats or text.", at_work_on_tuning)
