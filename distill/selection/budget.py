"""What selection may cost in tokens, and how it is divided: all of it is counted against the distillation it serves.

    align + passes · score + C · refine ≤ total           total = a tenth of the recipe's training tokens

``align`` trains the student without attention, ``score`` is the text of one forward pass, ``passes`` how many of them
the method takes, C the choices that are trained for ``refine`` tokens each. A token that a student reads counts once,
trained on or not, though one that is trained on costs three times as much; the teacher's own passes beside a student's
are not counted, as they are not in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.data import steps_for
from distill.errors import UserError
from distill.recipe import Recipe, StageName

SHARE = 0.1  # of the distillation's tokens
FORWARD = 0.25  # of these, at most, for forward passes
TEXT = 32_768  # tokens of a forward pass, at most
ALIGNING: tuple[StageName, ...] = ("mixing", "hidden")
OF_STUDENT = ("restore", "greedy", "mixing", "hidden")
METHODS = (*OF_STUDENT, "probe", "uniform", "last", "first_last")
"""How layers may be ranked: by an aligned student, by the teacher alone, or by their places."""


@dataclass(frozen=True)
class Budget:
    """Tokens by what they are for.

    Attributes:
        total: what all of it may come to.
        align: of each stage that aligns the student; empty where nothing is trained.
        score: of the text that forward passes read.
        passes: forward passes, at most.
        refine: training of each choice, 0 for none.
        refined: choices that are trained, at most.
        distillation: the recipe's own training tokens.
    """

    total: int
    align: Mapping[StageName, int]
    score: int
    passes: int
    refine: int
    refined: int
    distillation: int

    @property
    def spent(self) -> int:
        """All of it together, at most."""
        return sum(self.align.values()) + self.passes * self.score + self.refined * self.refine


def divide(
    recipe: Recipe,
    *,
    method: str,
    candidates: int,
    keep: int,
    total: int | None = None,
    score: int | None = None,
    refine: int = 0,
    refined: int = 0,
    sets: int = 0,
) -> Budget:
    """The tokens of a selection.

    Forward passes are paid first, refinement as it was asked for, and alignment gets the rest in the proportions of
    the recipe's own stages, but no more than these have.

    Args:
        recipe: the distillation that layers are selected for.
        method: one of ``METHODS``.
        candidates: layers that may keep attention.
        keep: how many shall.
        total: of all, a tenth of the recipe's tokens if None.
        score: of a forward pass, at most ``TEXT`` if None.
        refine: tokens of each choice's training; 0 for none.
        refined: choices that are trained.
        sets: choices that one forward pass each looks at first.

    Raises:
        UserError: a stage that is needed is missing, or something gets less than a step or a block.
    """
    stages = recipe.stages.named()
    distillation = sum(stage.tokens for stage in stages.values())
    total = int(SHARE * distillation) if total is None else total
    passes = passes_of(method, candidates, keep) + (_passes_of_refining(method, sets, refined) if refine else 0)
    block = recipe.data.block
    if score is not None and score < block:
        raise UserError(f"--score-tokens {score:,} is less than one block of the text; give {block:,} at least")
    if score is None:
        score = min(TEXT, int(FORWARD * total) // max(1, passes))
    score = score // block * block
    if passes and score < block:
        raise UserError(
            f"{total:,} tokens leave less than one block of {block} for each of {passes} forward passes; give a larger"
            " --budget, or --score-tokens"
        )
    needed = method in OF_STUDENT or bool(refine)
    _require_stages(recipe, method, refine)
    refine = _whole_steps(recipe, refine)
    left = total - passes * score - (refined * refine if refine else 0)
    align = _aligning(recipe, left, total) if needed else {}
    budget = Budget(total, align, score if passes else 0, passes, refine, refined if refine else 0, distillation)
    if budget.spent > total:
        raise UserError(
            f"{passes} forward passes of {score:,} tokens are more than the {total:,} that selection may cost; give a"
            " larger --budget, or less to --score-tokens"
        )
    return budget


def passes_of(method: str, candidates: int, keep: int) -> int:
    """Forward passes over the text that a method takes."""
    if method == "restore":  # nothing, each layer, and the choice
        return 2 + candidates
    if method == "greedy":
        return 1 + sum(candidates - round_ for round_ in range(keep))
    if method == "probe":  # means, intact, and each layer
        return 2 + candidates
    return 3 if method in ("mixing", "hidden") else 0


def _passes_of_refining(method: str, sets: int, refined: int) -> int:
    """Each choice before, each that is trained after; and the aligned student, which probe alone has not measured."""
    return (method == "probe") + sets + refined


def _require_stages(recipe: Recipe, method: str, refine: int) -> None:
    if (method in OF_STUDENT or refine) and recipe.stages.hidden is None:
        what = f"--method {method}" if method in OF_STUDENT else "--refine"
        raise UserError(
            f"{what} ranks by an aligned student, and the recipe has no stage hidden to align it; add one, or take"
            " --method probe, which needs the teacher alone"
        )
    if refine and recipe.stages.logits is None:
        raise UserError("--refine trains choices as the recipe's stage logits does, and it has none; leave it out")


def _whole_steps(recipe: Recipe, refine: int) -> int:
    stage = recipe.stages.logits
    if not refine or stage is None:
        return 0
    return steps_for(refine, stage.batch_size, recipe.block_of(stage)) * stage.batch_size * recipe.block_of(stage)


def _aligning(recipe: Recipe, left: int, total: int) -> dict[StageName, int]:
    """Whole steps of each stage that aligns, from what is left of the total."""
    stages = {name: stage for name, stage in recipe.stages.named().items() if name in ALIGNING}
    own = sum(stage.tokens for stage in stages.values())
    align: dict[StageName, int] = {}
    for name, stage in stages.items():
        step = stage.batch_size * recipe.block_of(stage)
        align[name] = min(stage.tokens, left * stage.tokens // own) // step * step if left > 0 else 0
        if not align[name]:
            raise UserError(
                f"{max(left, 0):,} of {total:,} tokens are left to align the student, less than one step of {step:,} in"
                f" {name}; give a larger --budget, or less to --score-tokens and --refine"
            )
    return align
