"""Carry out one training stage of a run: load what the stage before handed on, train it, hand it on."""

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from distill import handover
from distill.data import TrainingBatches, micro_batches
from distill.engines import processes
from distill.engines.choice import data_ranks, make_engine
from distill.engines.engine import Engine, Groups
from distill.engines.launched import Launched
from distill.engines.placement import place_student
from distill.engines.saving import save_student
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.handover import Parent, StageRecord
from distill.objective import Batch, Objective
from distill.reach import reached
from distill.recall.asked import examples_of, recall_measure
from distill.recipe import LayerwiseTraining, LogitsStage, Stage, StageName
from distill.roles import roles
from distill.run import Run
from distill.training import (
    Best,
    Cadence,
    Hook,
    Patience,
    TrainResult,
    checkpoint,
    parameter_groups,
    schedule,
    train,
)


class Batches(Protocol):
    """Training batches by number."""

    def batch(self, step: int) -> Batch: ...


def train_stage(
    run: Run,
    stage: StageName,
    make_objective: Callable[[PreTrainedModel, Any], Objective],
    *,
    enrich: Callable[[TrainingBatches], Batches] = lambda batches: batches,
    hooks: Sequence[Hook] = (),
) -> StageRecord:
    """Load what the stage before handed on, train it on the objective, and hand the result on.

    Args:
        run: the recipe's run.
        stage: which of its stages.
        make_objective: called with the student and the stage's part of the recipe.
        enrich: adds what the objective reads besides tokens to the stage's batches.
        hooks: measured while the stage trains, besides what the recipe lists.

    Raises:
        UserError: the recipe has no such stage, or the stage before is missing, damaged or another's.
    """
    settings = run.recipe.stages.named().get(stage)
    if settings is None:
        raise UserError(f"the recipe has no stage {stage!r}; it has {', '.join(run.recipe.stages.named())}")
    before = run.stages[run.stages.index(stage) - 1]
    parent = processes.on_main(lambda: run.verified(before).as_parent())
    student = place_student(run.folder(before), _placement(run, settings), run.device)
    objective = make_objective(student, settings)
    result = _train(run, stage, settings, student, objective, enrich, parent, [*_recipe_hooks(run), *hooks])
    record = StageRecord(
        stage=stage,
        parent=parent,
        loss_start=result.loss_start,
        loss_end=result.loss_end,
        steps=result.steps,
        tokens=result.tokens,
        seconds=result.seconds,
        settings=run.recipe.stage_digest(stage),
        kept_step=result.kept_step,
    )
    _hand_on(run, stage, student, record)
    if processes.is_main():
        # What keep_best chose was handed on.
        better = result.best_step if result.best_step != result.steps and settings.keep_best is None else None
        checkpoint.prune(run.work_folder(stage) / "checkpoints", 0, {better})
    processes.wait()
    return record


def _train(
    run: Run,
    stage: StageName,
    settings: Stage,
    student: PreTrainedModel,
    objective: Objective,
    enrich: Callable[[TrainingBatches], Batches],
    parent: Parent,
    hooks: Sequence[Hook],
) -> TrainResult:
    set_seed(run.recipe.seed)
    if isinstance(settings, LogitsStage) and settings.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    groups = _groups(student, settings)
    ranks = data_ranks(_by_layers(settings))
    size, accumulate = micro_batches(settings.batch_size, settings.micro_batch_size, ranks)
    engine = _engine(run, settings, student, groups, objective, accumulate)
    result = train(
        objective=objective,
        student=student,
        engine=engine,
        groups=groups,
        schedule=_rate(settings, run.facts.steps[stage]),
        batch=enrich(run.training_batches(stage, size)).batch,
        steps=run.facts.steps[stage],
        accumulate=accumulate,
        clip=settings.clip,
        tokens_per_step=settings.batch_size * run.recipe.block_of(settings),
        folder=run.work_folder(stage),
        evaluate=_measure(run, settings, student),
        cadence=Cadence(settings.eval_every, settings.checkpoint_every, settings.keep_checkpoints),
        trackers=run.recipe.trackers,
        device=run.device,
        precision=run.precision,
        origin={
            "the recipe": run.recipe.stage_digest(stage),
            "the text": run.blocks[0].fingerprint,
            "the stage before": parent.sha256,
        },
        hooks=hooks,
        keep_best=_best(run, stage, settings),
        stop_early=_patience(settings),
    )
    engine.close()
    return result


def _groups(student: PreTrainedModel, settings: Stage) -> Groups:
    return parameter_groups(
        student,
        roles(student).__getitem__,
        settings.train,
        lr=settings.lr,
        mixer_lr=settings.mixer_lr,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        asked=settings.train != type(settings).model_fields["train"].default,  # a run's recipe.yaml writes defaults out
        reached=reached(student, settings),
    )


def _rate(settings: Stage, steps: int) -> Callable[[int], float]:
    """Factor on the learning rates at a step."""
    return functools.partial(
        schedule,
        steps=steps,
        name=settings.schedule,
        warmup=settings.warmup,
        decay=settings.decay,
        min_ratio=settings.min_lr_ratio,
    )


def _engine(
    run: Run, settings: Stage, student: PreTrainedModel, groups: Groups, objective: Objective, accumulate: int
) -> Engine:
    return make_engine(
        student,
        groups,
        _placement(run, settings),
        run.device,
        layerwise=objective.layerwise,
        by_layers=_by_layers(settings),
        accumulate=accumulate,
        clip=settings.clip,
    )


def _measure(run: Run, settings: Stage, student: PreTrainedModel) -> Callable[[], dict[str, float]]:
    """Loss on the held-out text, and distance to the teacher where it is in memory."""
    is_offline = isinstance(settings, LogitsStage) and settings.offline_teacher is not None

    def measure() -> dict[str, float]:
        metrics = evaluate(student, None if is_offline else run.teacher, run.held_out())
        measured = {"loss": metrics.loss, "kl": metrics.kl, "agreement": metrics.agreement}
        return {name: value for name, value in measured.items() if value is not None}

    return measure


def _recipe_hooks(run: Run) -> list[Hook]:
    """The recipe's tasks that are asked every so many steps; their examples are drawn now, so that mistakes show."""
    vocabulary = run.facts.config.get_text_config().vocab_size
    tasks = run.recipe.evaluation.in_training()
    return [Hook(recall_measure(task, examples_of(task, run.tokenizer, vocabulary)), task.every) for task in tasks]


def _best(run: Run, stage: StageName, settings: Stage) -> Best | None:
    wanted = settings.keep_best
    if wanted is None:
        return None
    return Best(wanted.metric, wanted.mode, run.recipe.measured_in(stage)[wanted.metric])


def _patience(settings: Stage) -> Patience | None:
    wanted = settings.stop_early
    return None if wanted is None else Patience(wanted.metric, wanted.mode, wanted.patience, wanted.min_delta)


def _placement(run: Run, settings: Stage) -> Launched:
    """Processes that train layers of their own need the whole student each."""
    return Launched("ddp") if _by_layers(settings) else run.launched


def _by_layers(settings: Stage) -> bool:
    return isinstance(settings, LayerwiseTraining) and settings.parallel == "layers" and processes.world() > 1


def _hand_on(run: Run, stage: StageName, student: PreTrainedModel, record: StageRecord) -> None:
    """Write the stage's folder; every process calls it, and gives its part of the weights."""

    def save(folder: Path) -> None:
        save_student(student, folder)
        run.save_beside(folder)
        shutil.copy(run.work_folder(stage) / "metrics.jsonl", folder)

    if processes.is_main():
        handover.write(run.folder(stage), save, record)
    else:
        save_student(student, run.folder(stage))
