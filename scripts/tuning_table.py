"""Full, LoRA and DoRA tuning of a student in every precision, on a real text, in one table (docs/finetuning.md).

    python -m scripts.tuning_table runs/stories260k/logits tinyshakespeare.txt

Every line is a whole run of ``stages.finetune``: the same rows in the same order from the same first weights. Losses of
bfloat16 and float16 are compared with float32's, step by step. What was saved is loaded again by plain transformers and
PEFT, and must be what was trained, bit for bit.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import peft
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.finetuning.job import open_job
from distill.finetuning.recipe import FinetuneRecipe
from distill.finetuning.trainer import load_base, tune, with_adapters
from distill.programs import report_user_errors

LEARNING_RATES = {"full": 5e-4, "lora": 3e-3, "dora": 3e-3}
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 0.01
"""By how much the loss of any step may differ from float32's, relatively."""

Weights = dict[str, Tensor]


class Tuned(NamedTuple):
    """One run.

    Attributes:
        losses: of every step.
        moved: how many of the trained tensors are not what they were before.
        trained: how many there are.
        reloads: whether plain transformers and PEFT read back what was trained.
    """

    losses: list[float]
    moved: int
    trained: int
    reloads: bool


def main(
    model: Annotated[Path, typer.Argument(help="A student's folder, its mixers trained.")],
    text: Annotated[Path, typer.Argument(help="A text file.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps a run.")] = 12,
    separator: Annotated[str, typer.Option(help="Between documents.")] = "\n\n",
) -> None:
    """Print the table; exit with code 1 if a run is off float32 by more than the tolerance, or is a no-op."""
    found = {}
    with report_user_errors():
        for method in LEARNING_RATES:
            for dtype in DTYPES:
                found[method, dtype] = tuned(model, text, method, dtype, steps, separator)
    print(
        f"| method, rate | dtype | loss, first → last of {steps} | largest difference | tensors that moved | reloaded |"
    )
    print("|---|---|---|---:|---:|---|")
    failed = False
    for (method, dtype), run in found.items():
        off = difference(run.losses, found[method, "float32"].losses)
        failed |= off > TOLERANCE or run.moved < run.trained or not run.reloads
        losses = f"{run.losses[0]:.3f} → {run.losses[-1]:.3f}"
        print(
            f"| {method}, {LEARNING_RATES[method]:g} | {dtype} | {losses} | {off:.2%} | {run.moved} of {run.trained} |"
            f" {'equal' if run.reloads else '**differs**'} |"
        )
    raise typer.Exit(int(failed))


def tuned(model: Path, text: Path, method: str, dtype: str, steps: int, separator: str) -> Tuned:
    with tempfile.TemporaryDirectory() as folder:
        training = {"steps": steps, "batch_size": 8, "lr": LEARNING_RATES[method]}
        recipe = FinetuneRecipe.model_validate(
            {
                "name": "table",
                "run_dir": folder,
                "model": str(model),
                "method": method,
                "dtype": dtype,
                "device": "cpu",
                "data": {"source": str(text), "format": "text", "separator": separator, "max_length": 128},
                "training": {**training, "warmup": 0.0, "schedule": "constant"},
            }
        )
        before, after = weights(start(recipe)), {}
        job = open_job(recipe)
        tune(job, look=lambda trained: after.update(weights(trained)))
        lines = (job.work_folder / "metrics.jsonl").read_text().splitlines()
        read = weights(reloaded(job.folder, recipe))
    moved = sum(not torch.equal(after[name], before[name]) for name in before)
    same = after.keys() <= read.keys() and all(torch.equal(after[name], read[name]) for name in after)
    return Tuned([json.loads(line)["loss"] for line in lines], moved, len(before), same)


def start(recipe: FinetuneRecipe) -> Any:
    """What ``tune`` begins with, new adapters and all."""
    torch.manual_seed(recipe.seed)
    base = load_base(recipe)
    return base if recipe.method == "full" else with_adapters(base, recipe)


def reloaded(folder: Path, recipe: FinetuneRecipe) -> Any:
    if recipe.method == "full":
        return AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(recipe.model)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def weights(model: Any) -> Weights:
    """What trains."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def difference(losses: list[float], exact: list[float]) -> float:
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(losses, exact, strict=True))


if __name__ == "__main__":
    typer.run(main)
