"""TRL's DPOTrainer as a recipe of preference tuning wants it, its reference above all.

    loss = −log σ(β (Δ(chosen) − Δ(rejected))),   Δ(y) = log π(y | x) − log π_ref(y | x),   summed over y's tokens

Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With π_ref = π, as at the start, the loss is log 2.

Left to itself, TRL would load as the reference of a model whatever folder its config names, which for a student may be
its teacher's. So the reference is always given: a frozen copy, or the same model with its new adapters switched off.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from distill.finetuning.job import Job
from distill.finetuning.one_device import on_one_device
from distill.finetuning.preferences import START, PreferRecipe
from distill.student import load_model


def make_preferring(job: Job, model: Any, optimizer: torch.optim.Optimizer, shared: dict[str, Any]) -> DPOTrainer:
    """A trainer of ``model`` on the pairs of the job.

    Args:
        shared: arguments that all trainers take alike.
    """
    recipe = job.recipe
    assert isinstance(recipe, PreferRecipe)
    reference = reference_of(recipe)
    arguments = DPOConfig(**shared, beta=recipe.beta, loss_type=[recipe.loss], max_length=recipe.data.max_length)
    trainer: Any = DPOTrainer(
        model=model,
        ref_model=reference,
        args=on_one_device(arguments),
        train_dataset=Dataset.from_list(job.rows),
        processing_class=job.tokenizer,
        optimizers=(optimizer, None),
    )
    if reference is None:
        # TRL's copy of the adapters, which are new and do nothing yet. Without it TRL switches them off instead.
        trainer.model.delete_adapter("ref")
    return trainer


def reference_of(recipe: PreferRecipe) -> PreTrainedModel | None:
    """What the model is compared with, frozen; None for itself without its adapters, which are new."""
    start = None if recipe.adapter is None else recipe.adapter.start
    if recipe.reference == START and recipe.method != "full" and start is None:
        return None
    folder = recipe.model if recipe.reference == START else recipe.reference
    reference: Any = load_model(Path(folder).expanduser(), dtype=torch.float32)
    if recipe.reference == START and start is not None:
        import peft

        reference = peft.PeftModel.from_pretrained(reference, Path(start).expanduser()).merge_and_unload()
    return reference.eval().requires_grad_(False)
