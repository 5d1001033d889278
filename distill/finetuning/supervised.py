"""TRL's SFTTrainer as a recipe of supervised fine-tuning wants it, with a teacher beside the data if it names one."""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from distill.finetuning.guidance import Guide, guide_of
from distill.finetuning.job import Job
from distill.finetuning.one_device import on_one_device
from distill.finetuning.recipe import FinetuneRecipe


def make_supervised(job: Job, model: Any, optimizer: torch.optim.Optimizer, shared: dict[str, Any]) -> SFTTrainer:
    """A trainer of ``model`` on the rows of the job.

    Args:
        shared: arguments that all trainers take alike.
    """
    recipe = job.recipe
    assert isinstance(recipe, FinetuneRecipe)
    arguments = SFTConfig(
        **shared,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        packing_strategy="bfd" if recipe.data.format == "chat" else "bfd_split",
        assistant_only_loss=recipe.data.format == "chat" and recipe.data.assistant_only,
    )
    given: dict[str, Any] = {
        "model": model,
        "args": on_one_device(arguments),
        "train_dataset": Dataset.from_list(job.rows),
        "processing_class": job.tokenizer,
        "optimizers": (optimizer, None),
    }
    if recipe.teacher is None:
        return SFTTrainer(**given)
    guide = guide_of(recipe.teacher, plain(model), getattr(torch, recipe.dtype), arguments.device)
    trainer = GuidedTrainer(**given)
    trainer.guide = guide
    return trainer


class GuidedTrainer(SFTTrainer):
    """The same with another loss."""

    guide: Guide

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """A mean over the scored tokens of the step, whatever micro-batches it is made of (trl#6006)."""
        assert not return_outputs, "nothing here evaluates"
        labels_BT = inputs["labels"]
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        total = self.guide.loss_sum(plain(self.accelerator.unwrap_model(model)), asked, labels_BT)
        # As SFTTrainer counts what it has read: no padding.
        mask = inputs.get("attention_mask")
        self._total_train_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return total / num_items_in_batch


def plain(model: Any) -> Any:
    """A model without PEFT's wrapper; the adapters inside its layers stay on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
