"""One checkpoint, in as many shards as it has, as one Hugging Face folder.

A checkpoint holds what its stage trains; the rest of the student comes from the stage before, which stands in the same
run_dir. No process group and no GPU is needed, only memory for one student.
"""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from distill import handover
from distill.atomic import whole_folder
from distill.engines import training_state, zero
from distill.errors import UserError
from distill.recipe import load_recipe
from distill.student import load_student
from distill.training import checkpoint


def consolidate(folder: Path, to: Path) -> None:
    """Write the student as it was at a checkpoint: weights in fp32, tokenizer and recipe beside them.

    Args:
        folder: run_dir/training/STAGE/checkpoints/step-N.
        to: where the folder shall stand; it must be new or empty.

    Raises:
        UserError: there is no checkpoint at ``folder``, it is damaged, or it does not belong to the run around it.
    """
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UserError(f"{to} is there already; give a new folder")
    _require_intact(folder)
    before = _stage_before(folder)
    student = load_student(before, dtype=torch.float32)
    trained = _trained_weights(folder / checkpoint.STATE)
    _, strangers = student.load_state_dict(trained, strict=False)
    assert not strangers, f"{folder} holds weights that {before} has no place for: {strangers}"
    with whole_folder(to) as partial:
        student.save_pretrained(partial)
        for path in _beside_the_weights(before):
            if not (partial / path.name).exists():
                shutil.copy(path, partial)


_OF_THE_STAGE = {handover.RECORD, "metrics.jsonl", "conversion.json", "evaluation.json", "matrices.npz"}


def _beside_the_weights(stage: Path) -> list[Path]:
    """Tokenizer, recipe, generation config; no weights, however they are split, and nothing that is told of them."""
    excluded = _OF_THE_STAGE | handover.read(stage).weights.keys()
    return [path for path in stage.iterdir() if path.is_file() and path.name not in excluded]


def _require_intact(folder: Path) -> None:
    if not (folder / checkpoint.MANIFEST).is_file():
        found = sorted(str(path) for path in folder.glob("**/step-????????"))
        hint = f"; there are {', '.join(found[-3:])}" if found else ""
        raise UserError(f"{folder} is no checkpoint: give run_dir/training/STAGE/checkpoints/step-N{hint}")
    damage = checkpoint.damage_of(folder)
    if damage:
        one_before = checkpoint.before(folder)
        hint = f"the one before it is {one_before}" if one_before else "there is none before it"
        raise UserError(f"{damage}, so the checkpoint cannot be used; {hint}")


def _stage_before(folder: Path) -> Path:
    """The folder of the stage that the checkpoint's stage started from, checked to be the very same."""
    stage, run_dir = folder.resolve().parents[1].name, folder.resolve().parents[3]
    recipe = load_recipe(run_dir / "recipe.yaml")
    stages = ["convert", *recipe.stages.named()]
    if stage not in stages[1:]:
        raise UserError(f"{folder} lies in training/{stage}, and the recipe in {run_dir} has no such stage")
    before = run_dir / stages[stages.index(stage) - 1]
    started_from = json.loads((folder / checkpoint.LOOP).read_text())["call"]["the stage before"]
    if handover.verify(before).as_parent().sha256 != started_from:
        raise UserError(f"{folder} started from another student than the one that is in {before} now")
    return before


def _trained_weights(state: Path) -> dict[str, Tensor]:
    return zero.read_weights(state) if (state / zero.TAG).is_dir() else training_state.read_weights(state)
