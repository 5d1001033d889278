"""TRL's SFTTrainer as a recipe of supervised fine-tuning wants it."""

from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from distill.finetuning.job import Job


def make_supervised(job: Job, model: Any, optimizer: torch.optim.Optimizer, shared: dict[str, Any]) -> SFTTrainer:
    """A trainer of ``model`` on the rows of the job.

    Args:
        shared: arguments that all trainers take alike.
    """
    data: Any = job.recipe.data  # type: ignore[attr-defined]
    arguments = SFTConfig(
        **shared,
        max_length=data.max_length,
        packing=data.packing,
        packing_strategy="bfd" if data.format == "chat" else "bfd_split",
        assistant_only_loss=data.format == "chat" and data.assistant_only,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        optimizers=(optimizer, None),
    )
