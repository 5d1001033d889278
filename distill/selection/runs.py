"""The runs of a selection: ordinary ones (`distill.run`), made from the recipe by settings that replace its own.

    OUTPUT/aligned/          the student without attention: convert, mixing, hidden, as many tokens as there are for it
    OUTPUT/choices/3-5/      a choice of layers: that student with layers 3 and 5 put back, trained in logits

A choice's stage ``convert`` is not made by converting: ``put_back`` writes it, so that all choices start from one
student, and what tells them apart is the layers alone.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.convert_stage import hand_on
from distill.data import TrainingBatches
from distill.errors import UserError
from distill.handover import StageRecord
from distill.objective import Batch
from distill.recipe import Recipe, StageName
from distill.run import CONVERT, Run, share_text
from distill.selection.ranking import Layers
from distill.selection.restoring import hybrid
from distill.student import load_student

ORIGIN = "put_back.json"
SELECTION = 2**96
"""In the place of a stage's number, where small ones would be those of another seed's stages: a recipe's seed is below
2**32, and the sampler hashes seed and epoch in words of 32 bits, so that no stage of any seed has this order."""


def aligned_settings(recipe: Recipe, output: Path, align: Mapping[StageName, int]) -> list[str]:
    """Settings that make the recipe that of the aligned student.

    Args:
        align: tokens of each stage that trains; empty where none does, and the run is only of text and teacher.
    """
    settings = [*_anywhere(output / "aligned"), "student.keep_attention=[]"]
    if not align:
        return settings
    settings.append(_hardly_evaluated(recipe))
    for name in recipe.stages.named():
        if name not in align:
            settings.append(f"stages.{name}=null")
            continue
        settings += [f"stages.{name}.tokens={align[name]}", f"stages.{name}.eval_every=null"]
        settings += [f"stages.{name}.keep_best=null", f"stages.{name}.stop_early=null"]
    return settings


def choice_settings(recipe: Recipe, output: Path, layers: Layers, tokens: int) -> list[str]:
    """Settings that make the recipe that of a choice of layers, which trains for so many tokens in logits."""
    settings = [
        *_anywhere(choice_folder(output, layers)),
        _hardly_evaluated(recipe),
        f"student.keep_attention={json.dumps(list(layers))}",
        f"stages.logits.tokens={tokens}",
    ]
    settings += [f"stages.{name}=null" for name in recipe.stages.named() if name != "logits"]
    alone = ("eval_every", "keep_best", "stop_early", "stepwise", "offline_teacher")
    return settings + [f"stages.logits.{key}=null" for key in alone]


def choice_folder(output: Path, layers: Layers) -> Path:
    """Where a choice of layers is trained."""
    return output / "choices" / "-".join(map(str, layers))


def _anywhere(run_dir: Path) -> list[str]:
    # Without any attention a student need not be exportable.
    return [f"run_dir={json.dumps(str(run_dir))}", "student.exportable=null"]


def _hardly_evaluated(recipe: Recipe) -> str:
    """Held-out text is none of selection's business: a run looks at a block of it, by which nothing goes."""
    wanted = {"tokens": recipe.data.block, "batch_size": recipe.evaluation.batch_size}
    return f"evaluation={json.dumps(wanted)}"


def scoring_batches(run: Run, tokens: int) -> list[Batch]:
    """Training text in an order that no stage has, whole blocks; the same for all measures."""
    rows = run.blocks[0]
    order = TrainingBatches(rows, 1, run.recipe.seed + 1 + SELECTION)
    places = order.first(max(1, min(tokens // rows.block, order.n)))
    size = run.recipe.evaluation.batch_size
    return [rows.batch(places[start : start + size]) for start in range(0, len(places), size)]


def last_student(run: Run) -> PreTrainedModel:
    """The student that a run's last stage handed on, on its device, frozen."""
    student: Any = load_student(run.folder(run.stages[-1]))
    return student.to(run.device).eval().requires_grad_(False)


def put_back(run: Run, aligned: Run, student: PreTrainedModel) -> StageRecord:
    """Write a choice's stage ``convert``: the aligned student with the choice's layers put back.

    Args:
        run: of the choice.
        aligned: of the student.
        student: what ``aligned`` handed on.

    Raises:
        UserError: the folder has a choice that was made from another student.
    """
    origin = {"aligned": aligned.verified(aligned.stages[-1]).as_parent().sha256, "layers": list(run.facts.kept)}
    if run.is_done(CONVERT):
        _require_origin(run.folder(CONVERT), origin)
        return run.verified(CONVERT)
    share_text(run, aligned.recipe.run_dir / "data")
    started = time.perf_counter()
    made = hybrid(student, run.teacher, run.facts.kept)

    return hand_on(run, made, {ORIGIN: origin}, loss=None, started=started)


def _require_origin(folder: Path, origin: Mapping[str, object]) -> None:
    path = folder / ORIGIN
    if not path.is_file() or json.loads(path.read_text()) != origin:
        raise UserError(f"{folder} was not made from this aligned student; remove {folder.parent} and start again")
