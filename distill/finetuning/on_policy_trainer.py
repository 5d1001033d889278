"""TRL's DistillationTrainer as a recipe of on-policy distillation wants it.

The student writes y after a prompt, through its own cache; student q and teacher p then both read prompt and y:

    loss = D_β(p ‖ q), a mean over the tokens of y,   m = (1 − β) q + β p
    D_β  = β KL(p ‖ m) + (1 − β) KL(q ‖ m)            0 < β < 1
    D_0  = KL(p ‖ q),   D_1 = KL(q ‖ p)

Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649), with λ = 1. No gradient flows through what
was written. TRL makes the logits of both models a tile at a time.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from distill.finetuning.job import Job
from distill.finetuning.on_policy import OnPolicyRecipe
from distill.student import load_model


class OnPolicyTrainer(DistillationTrainer):
    """The same, writing in the precision that it trains in, with adapters too."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self.accelerator.autocast():
            return super()._prepare_inputs(generation_batch)


def make_on_policy(job: Job, model: Any, optimizer: torch.optim.Optimizer, shared: dict[str, Any]) -> OnPolicyTrainer:
    """A trainer of ``model`` on what it writes after the prompts of the job.

    Args:
        shared: arguments that all trainers take alike.
    """
    recipe = job.recipe
    assert isinstance(recipe, OnPolicyRecipe)
    teacher: Any = load_model(Path(recipe.teacher.path).expanduser(), dtype=getattr(torch, recipe.dtype))
    return OnPolicyTrainer(
        model=model,
        teacher_model=teacher.eval().requires_grad_(False),
        args=DistillationConfig(
            **shared,
            beta=recipe.beta,
            temperature=recipe.temperature,
            max_completion_length=recipe.new_tokens,
        ),
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        optimizers=(optimizer, None),
    )
