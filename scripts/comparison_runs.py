"""The runs of a comparison: every recipe on one teacher, its tokens cut to one budget; and what each run left behind.

    OUTPUT/data/                                the text, prepared once for all
    OUTPUT/measured.json                        what the first comparison in it measured on, and all others must
    OUTPUT/runs/RECIPE/BUDGET/lr-FACTOR/seed-S/   an ordinary run_dir (`distill.run`), resumable like any

What the recipes of a comparison share, whatever they say themselves: teacher, text, layers that keep attention, seed.
A stage reads the text in an order that the seed and the stage's name decide (`Run.training_batches`), so that what two
recipes do in a stage they do on the same text.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill.atomic import replace_file
from distill.checks import check
from distill.data.batches import steps_for
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.recall import examine, row_examples
from distill.recipe import Recipe, StageName, load_recipe
from distill.run import CONVERT, Run, at_work_on, share_text
from distill.student import load_student
from distill.training.nonfinite import NonFiniteLoss
from scripts.measure import Fields
from stages.run import PROGRAMS

RECIPES = Path("recipes")
PUBLISHED = RECIPES / "published"
RECALL = [("associative", 8, 64), ("associative", 32, 128), ("phonebook", 12, 0)]
EXAMPLES = 48  # of each
LONGEST_NAME = 100
MEASURED = "measured.json"


@dataclass(frozen=True)
class Common:
    """What all recipes of a comparison share.

    Attributes:
        teacher: the recipe whose teacher and text they take.
        overrides: settings that replace that recipe's, such as where its teacher lies.
        keep_attention: YAML of the layers that keep attention.
        evaluation_tokens: held-out tokens that are scored, at the end and on the way.
        points: evaluations on the way, about; those at the borders of stages come on top.
        recall: whether the teacher answers rows of `distill.recall` in its own ids.
        batch_size: sequences of the text's own block that every stage reads a step, whatever recipes say; None leaves
            them theirs. Where a stage cuts blocks in four it reads four times as many.
    """

    teacher: Path
    overrides: tuple[str, ...]
    keep_attention: str
    evaluation_tokens: int
    points: int
    recall: bool
    output: Path
    batch_size: int | None = None


@dataclass(frozen=True)
class Wanted:
    """One run of a comparison.

    Attributes:
        recipe: as given on the command line: a name or a file, and settings behind it.
        factor: on all learning rates of the recipe.
    """

    recipe: str
    budget: int
    factor: float
    seed: int

    def folder(self, output: Path) -> Path:
        return output / "runs" / slug(self.recipe) / str(self.budget) / f"lr-{self.factor:g}" / f"seed-{self.seed}"


def slug(recipe: str) -> str:
    """A recipe as the name of a folder; one of many settings by its beginning and a hash, for names have a limit."""
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", recipe).strip("_.")
    return (
        name
        if len(name) <= LONGEST_NAME
        else f"{name[:LONGEST_NAME]}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    )


def recipe_file(given: str) -> tuple[Path, list[str]]:
    """The file of a recipe and the settings given behind it.

    ``ours`` is recipes/quickstart.yaml; other names are looked for in recipes/published and recipes.

    Raises:
        UserError: there is no such recipe, or it cannot be told from its settings.
    """
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise UserError(f"--recipe {given}: {str(error).lower()}; quote settings as in a shell") from None
    if not words:
        raise UserError(f"--recipe {given!r}: names no recipe; {_allowed()}")
    name, *settings = words
    if name.endswith((".yaml", ".yml")):
        return Path(name), settings
    places = [folder / f"{'quickstart' if name == 'ours' else name}.yaml" for folder in (PUBLISHED, RECIPES)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"there is no recipe {name!r}; {_allowed()}")
    return found, settings


def _allowed() -> str:
    here = [f"{', '.join(sorted(path.stem for path in at.glob('*.yaml')))} (in {at})" for at in (PUBLISHED, RECIPES)]
    return f"allowed: a file, ours, {', '.join(here)}; settings may follow"


def cut_recipe(common: Common, wanted: Wanted) -> tuple[Path, list[str]]:
    """The recipe of a run: a file, and settings that put it on the common ground and into the budget.

    A stage gets the share of the budget that it has of the recipe's own tokens, in whole steps; the last one gets what
    is left.

    Raises:
        UserError: a recipe cannot be read, one of its stages is left without a step, or it may not end with its budget.
    """
    path, settings = recipe_file(wanted.recipe)
    teacher = load_recipe(common.teacher, common.overrides)
    settings = [
        *settings,
        f"teacher={_yaml(teacher.teacher)}",
        f"data={_yaml(teacher.data)}",
        *_own_text(load_recipe(path, settings)),
        f"student.keep_attention={common.keep_attention}",
        f"evaluation={json.dumps({'tokens': common.evaluation_tokens})}",
        f"seed={wanted.seed}",
        f"run_dir={yaml_text(wanted.folder(common.output))}",
    ]
    recipe = load_recipe(path, settings)
    _require_comparable(wanted, recipe)
    if common.batch_size is not None:
        wider = {name: recipe.data.block // recipe.block_of(stage) for name, stage in recipe.stages.named().items()}
        settings += [f"stages.{name}.batch_size={common.batch_size * times}" for name, times in wider.items()]
        recipe = load_recipe(path, settings)
    for name, tokens in _tokens(recipe, wanted).items():
        stage = recipe.stages.named()[name]
        steps = steps_for(tokens, stage.batch_size, recipe.block_of(stage))
        every = max(1, math.ceil(steps / max(1, round(common.points * tokens / wanted.budget))))
        settings += [
            f"stages.{name}.tokens={tokens}",
            f"stages.{name}.eval_every={every}",
            f"stages.{name}.lr={wanted.factor * stage.lr!r}",
            f"stages.{name}.mixer_lr={wanted.factor * stage.mixer_lr!r}",
        ]
    return path, settings


def check_all(common: Common, wanted: Iterable[Wanted]) -> None:
    """Whatever is wrong with any shows before the first is trained.

    Raises:
        UserError: as `cut_recipe` for a run, as `distill.checks.check` for a recipe.
    """
    checked = set[str]()
    for one in wanted:
        recipe = load_recipe(*cut_recipe(common, one))
        if one.recipe not in checked:  # at other budgets and seeds only numbers differ
            _check(one.recipe, recipe)
            checked.add(one.recipe)


def _check(name: str, recipe: Recipe) -> None:
    try:
        check(recipe)
    except UserError as error:
        raise UserError("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from None


def _own_text(recipe: Recipe) -> list[str]:
    """What a recipe trains on besides, or alone; what is held out stays that of all."""
    if not recipe.data.training_only:
        return []
    own = recipe.data.model_dump(mode="json", include={"training_only", "train_on_source"})
    return [f"data.{key}={json.dumps(value)}" for key, value in own.items()]


def _require_comparable(wanted: Wanted, recipe: Recipe) -> None:
    for name, stage in recipe.stages.named().items():
        for key in ("offline_teacher", "keep_best", "stop_early"):
            if getattr(stage, key, None) is not None:
                raise UserError(
                    f"{wanted.recipe}: stages.{name}.{key} has no place in a comparison, whose students all train to"
                    f" the end of the budget, beside their teacher; put stages.{name}.{key}=null behind the recipe"
                )


def carry_out(common: Common, wanted: Wanted) -> Fields:
    """Train one run to its end, or go on where it stopped, and measure it: see ``measured``.

    A loss that leaves the numbers is a result too: a learning rate that is too high.

    Raises:
        UserError: as ``distill.run.at_work_on``.
    """
    torch.set_num_threads(1)
    with at_work_on(*cut_recipe(common, wanted)) as run:
        share_text(run, common.output / "data")
        try:
            for stage in run.stages:
                if not run.is_done(stage):
                    PROGRAMS[stage](run)
        except NonFiniteLoss as error:
            return {**asdict(wanted), "failed": str(error), "curve": []}
        return {**asdict(wanted), **measured(common, run)}


def prepare(common: Common, wanted: Wanted) -> Fields:
    """Prepare the text for all runs and measure the teacher.

    Raises:
        UserError: the teacher or its text cannot be used, or what is in the folder was measured on other tokens.
    """
    torch.set_num_threads(1)
    path, settings = cut_recipe(common, wanted)
    data = load_recipe(common.teacher, common.overrides).data
    with at_work_on(path, [*settings, f"data={_yaml(data)}", f"run_dir={yaml_text(common.output)}"]) as run:
        _require_measured_alike(common)
        loss = evaluate(run.teacher, None, run.held_out()).loss
        replace_file(common.output / MEASURED, f"{json.dumps(_measure(common))}\n".encode())
        return {
            "path": run.recipe.teacher.path,
            "loss": loss,
            "recall": recalled(run.teacher) if common.recall else None,
        }


def _measure(common: Common) -> dict[str, int]:
    return {"evaluation_tokens": common.evaluation_tokens, "points": common.points}


def _require_measured_alike(common: Common) -> None:
    """Finished runs keep the losses they have; a folder from before there was such a file is taken as it is."""
    path = common.output / MEASURED
    if not path.exists():
        return
    before, now = json.loads(path.read_text()), _measure(common)
    if before != now:
        raise UserError(
            f"{common.output} was begun with {_told(before)}, not {_told(now)}: gaps on other text and curves at other"
            " tokens cannot be set side by side; give what it was begun with, or another --output"
        )


def _told(measure: dict[str, int]) -> str:
    return f"{measure['evaluation_tokens']:,} held-out tokens and {measure['points']} evaluations on the way"


def measured(common: Common, run: Run) -> Fields:
    """A finished run as points over all its tokens, and its last one.

    A point has tokens and CPU seconds of training so far, the stage, loss, kl and agreement, and at the end of a stage
    recall, if the teacher has any; one whose loss is not finite is left out. Beside the last one stand the student's
    sizes. A run whose last loss or KL is not finite has failed.
    """
    points, tokens, seconds = list[Fields](), 0, 0.0
    for stage in run.stages:
        if stage == CONVERT:
            continue
        rows = [json.loads(line) for line in (run.folder(stage) / "metrics.jsonl").open()]
        for row in rows:
            if row["kind"] == "train":
                seconds += row["cpu_seconds"]
            elif row["step"] or not points:
                numbers = {name: row.get(name) for name in ("loss", "kl", "agreement")}
                points.append({"stage": stage, "tokens": tokens + row["tokens"], "cpu_seconds": seconds, **numbers})
        tokens += rows[-1]["tokens"]
        if common.recall and points[-1]["loss"] is not None:
            points[-1]["recall"] = recalled(load_student(run.folder(stage)))
    for name, shown in (("loss", "loss"), ("kl", "KL")):
        if points[-1][name] is None:
            return {"failed": f"the held-out {shown} is not finite", "curve": []}
    curve = [point for point in points if point["loss"] is not None]
    return {"curve": curve, **curve[-1], **_sizes(run)}


def _sizes(run: Run) -> Fields:
    """What the student costs: its parameters, and what it remembers of a sequence as long as a block."""
    report = json.loads((run.folder(CONVERT) / "conversion.json").read_text())
    remembered = report["state_bytes"] + run.recipe.data.block * report["kv_bytes_per_token"]
    return {"parameters": sum(report["parameters_after"].values()), "remembered_bytes": remembered}


def recalled(model: Any) -> float:
    """The share of answers that a model writes, over the tasks that the recall teacher was trained on."""
    vocabulary = model.config.get_text_config().vocab_size
    shares = []
    for task, items, length in RECALL:
        examples = row_examples(task, items, length, samples=EXAMPLES, seed=0, vocabulary=vocabulary)
        results = examine(model.eval(), examples, batch_size=EXAMPLES)
        shares.append(sum(result.written for result in results) / len(results))
    return sum(shares) / len(shares)


def _tokens(recipe: Recipe, wanted: Wanted) -> dict[StageName, int]:
    """What each stage gets of the budget."""
    stages = recipe.stages.named()
    nominal = sum(stage.tokens for stage in stages.values())
    cut: dict[StageName, int] = {}
    steps = {name: stage.batch_size * recipe.block_of(stage) for name, stage in stages.items()}
    least = max(math.ceil(steps[name] * nominal / stage.tokens) for name, stage in stages.items())
    for name, stage in stages.items():
        last = len(cut) == len(stages) - 1
        tokens = wanted.budget - sum(cut.values()) if last else round(wanted.budget * stage.tokens / nominal)
        if tokens < steps[name]:
            raise UserError(
                f"{wanted.recipe}: {tokens} tokens of {wanted.budget} are left for {name}, less than one step of"
                f" {steps[name]}; give a --budget of at least {least}, or a smaller --batch-size"
            )
        cut[name] = tokens // steps[name] * steps[name]
    return cut


def _yaml(section: Any) -> str:
    return json.dumps(section.model_dump(mode="json"), ensure_ascii=False)


def yaml_text(path: Path | str) -> str:
    """As YAML, which would read 2026 as a number."""
    return json.dumps(str(path), ensure_ascii=False)
