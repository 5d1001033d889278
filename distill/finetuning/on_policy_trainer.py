"""TRL's DistillationTrainer as a recipe of on-policy distillation wants it.

The student writes y after a prompt, through its own cache; student q and teacher p then both read prompt and y:

    loss = D_β(p ‖ q), a mean over the tokens of y,   m = (1 − β) q + β p
    D_β  = β KL(p ‖ m) + (1 − β) KL(q ‖ m)            0 < β < 1
    D_0  = KL(p ‖ q),   D_1 = KL(q ‖ p)

Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649), with λ = 1. No gradient flows through what
was written. TRL makes the logits of both models a tile at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import DistillationConfig, DistillationTrainer

from distill.finetuning.job import Job
from distill.finetuning.on_policy import OnPolicyRecipe
from distill.finetuning.one_device import on_one_device
from distill.student import load_model


class ByEpoch(Sampler[int]):
    """TRL's order of prompts, as one of seed and epoch alone.

    TRL's own sampler goes on drawing from epoch to epoch, from a generator that no checkpoint keeps: a run that goes on
    in its second epoch would read the first one's order again. Trainer and accelerate tell the epoch before each, also
    where a run goes on in the middle of it.

    Args:
        sampler: TRL's RepeatSampler, which shuffles.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.epoch = sampler, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.sampler.seed + self.epoch)  # as accelerate's own samplers do
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class OnPolicyTrainer(DistillationTrainer):
    """The same, writing in the precision that it trains in, with adapters too, and in an order that can go on."""

    def _get_train_sampler(self, dataset: Any = None) -> ByEpoch:
        return ByEpoch(super()._get_train_sampler(dataset))

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
    arguments = DistillationConfig(
        **shared, beta=recipe.beta, temperature=recipe.temperature, max_completion_length=recipe.new_tokens
    )
    return OnPolicyTrainer(
        model=model,
        teacher_model=teacher.eval().requires_grad_(False),
        args=on_one_device(arguments),
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        optimizers=(optimizer, None),
    )
