"""A recipe's run: where its stages live, what they load, and how one is carried out and handed on.

run_dir/
  data/                       token blocks, prepared once (distill.data)
  recipe.yaml                 the resolved recipe
  teacher/evaluation.json
  convert/ mixing/ hidden/ logits/      finished stages (distill.handover), each with its evaluation
  training/STAGE/             metrics and checkpoints of the stage that is being trained
"""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill import handover
from distill.atomic import replace_file
from distill.capture import Batch
from distill.checks import RecipeFacts, check
from distill.conversion import convert_with_report, load_teacher
from distill.data import Blocks, TrainingBatches, evaluation_batches, prepare, read_documents, split_documents
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.evaluation_record import read_evaluation
from distill.handover import Parent, StageRecord
from distill.recipe import Recipe, Stage, StageName, Step, load_recipe
from distill.roles import roles
from distill.student import load_student
from distill.training import Objective, TrainResult, parameter_groups, schedule, train

CONVERT: Literal["convert"] = "convert"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A checked recipe and what its stages share. Models and data are loaded when first asked for."""

    recipe: Recipe
    facts: RecipeFacts

    @cached_property
    def accelerator(self) -> Accelerator:
        """The engine; the recipe's dtype and device decide, the launch config may add processes."""
        return Accelerator(
            cpu=self.recipe.device == "cpu", mixed_precision="bf16" if self.recipe.dtype == "bfloat16" else "no"
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.recipe.teacher.path)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, in the recipe's dtype, on the device."""
        model = load_teacher(self.recipe.teacher.path, DTYPES[self.recipe.teacher.dtype])
        return model.to(self.accelerator.device)

    @cached_property
    def blocks(self) -> tuple[Blocks, Blocks]:
        """Training and held-out blocks, tokenised on first use; from then on the run's recipe is in its folder.

        So a text that cannot be used leaves nothing behind.
        """
        data, folder = self.recipe.data, self.recipe.run_dir / "data"
        documents = read_documents(list(data.source), text_key=data.text_key, separator=data.separator)
        train_documents, held_out = split_documents(documents, fraction=data.held_out.fraction, by=data.held_out.by)
        prepare(train_documents, held_out, self.tokenizer, folder, block=data.block, bos=data.bos, eos=data.eos)
        replace_file(self.recipe.run_dir / "recipe.yaml", self.recipe.dump().encode())
        return Blocks(folder, "train", data.block), Blocks(folder, "held_out", data.block)

    def held_out(self) -> Iterator[Batch]:
        """Batches of held-out text, always the same."""
        wanted = self.recipe.evaluation
        return evaluation_batches(self.blocks[1], wanted.batch_size, wanted.tokens)

    @property
    def stages(self) -> list[Step]:
        """Every stage of the recipe in order, conversion first."""
        return [CONVERT, *self.recipe.stages.named()]

    def folder(self, stage: str) -> Path:
        return self.recipe.run_dir / stage

    @cached_property
    def origin(self) -> Parent:
        """The teacher as the first stage's parent: a digest of its config and weights, so that another is noticed."""
        return Parent("teacher", handover.folder_digest(Path(self.recipe.teacher.path)))

    def verified(self, stage: Step) -> StageRecord:
        """The record of a finished stage, its weights and its whole ancestry checked.

        Raises:
            UserError: it, or a stage before it, is missing, damaged, or was made with other settings.
        """
        place = self.stages.index(stage)
        parent = self.verified(self.stages[place - 1]).as_parent() if place else self.origin
        try:
            return handover.verify(
                self.folder(stage),
                parent,
                expected_settings=self.recipe.stage_digest(stage),
            )
        except UserError as error:
            raise UserError(f"{error}{self._changed_settings(stage)}") from error

    def is_done(self, stage: Step) -> bool:
        """Whether the stage's folder is there; if it is, it must be the one this recipe makes."""
        if not handover.is_there(self.folder(stage)):
            return False
        self.verified(stage)
        return True

    def is_evaluated(self, stage: str) -> bool:
        """Whether the stage's folder holds an evaluation of what it holds now, on this recipe's held-out text."""
        evaluation = read_evaluation(self.folder(stage))
        return evaluation is not None and evaluation.subject == self.evaluation_subject(stage)

    def evaluation_subject(self, stage: str) -> str:
        """A digest of all that an evaluation depends on: teacher, student, held-out text, and the recipe's wishes."""
        student = "" if stage == self.origin.stage else handover.read(self.folder(stage)).as_parent().sha256
        text, wishes = self.blocks[1].fingerprint, self.recipe.evaluation.model_dump_json()
        told = (self.origin.sha256, student, text, str(self.recipe.data.block), wishes)
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def _changed_settings(self, stage: str) -> str:
        """Which settings differ from those a finished stage was made with, as the end of an error message."""
        path = self.folder(stage) / "recipe.yaml"
        if not path.is_file():
            return ""
        then, now = _flat(yaml.safe_load(path.read_text())), _flat(yaml.safe_load(self.recipe.dump()))
        changed = [
            f"{key}: {then.get(key)} → {now.get(key)}"
            for key in then.keys() | now.keys()
            if then.get(key) != now.get(key)
        ]
        if not changed:
            return ""
        return (
            f"\nsettings that differ (then → now): {'; '.join(sorted(changed))}\n"
            "put them back, choose another run_dir, or remove the folder to make it anew"
        )


def open_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read and check a recipe; nothing heavy is loaded and nothing is written.

    Raises:
        UserError: everything the recipe says that cannot be done, or something else stands where a stage would.
    """
    recipe = load_recipe(path, overrides)
    run = Run(recipe, check(recipe))
    for stage in run.stages:
        handover.require_room(run.folder(stage))
    return run


def convert_stage(run: Run) -> StageRecord:
    """Turn the teacher into a student and hand it on as the stage ``convert``."""
    started = time.perf_counter()
    held_out = run.held_out()  # before the teacher: if the text cannot be used, that shows at once
    student, report = convert_with_report(
        run.teacher,
        mixer=run.recipe.student.mixer,
        keep_attention=run.facts.kept,
        seed=run.recipe.seed,
        seed_from_attention=run.recipe.student.seed_from_attention,
        state_dim=run.recipe.student.state_dim,
        conv_width=run.recipe.student.conv_width,
    )
    loss = evaluate(student, None, held_out).loss

    def save(folder: Path) -> None:
        _save(run, student, folder)
        (folder / "conversion.json").write_text(json.dumps(report.to_json(), indent=1))

    record = StageRecord(
        stage=CONVERT,
        parent=run.origin,
        loss_start=loss,
        loss_end=loss,
        steps=0,
        tokens=0,
        seconds=time.perf_counter() - started,
        settings=run.recipe.stage_digest(CONVERT),
    )
    return handover.write(run.folder(CONVERT), save, record)


def train_stage(
    run: Run, stage: StageName, make_objective: Callable[[PreTrainedModel, PreTrainedModel, Any], Objective]
) -> StageRecord:
    """Load what the stage before handed on, train it on the objective, and hand the result on.

    Args:
        run: the recipe's run.
        stage: which of its stages.
        make_objective: called with the teacher, the student and the stage's part of the recipe.

    Raises:
        UserError: the recipe has no such stage, or the stage before is missing, damaged or another's.
    """
    settings = run.recipe.stages.named().get(stage)
    if settings is None:
        raise UserError(f"the recipe has no stage {stage!r}; it has {', '.join(run.recipe.stages.named())}")
    before = run.stages[run.stages.index(stage) - 1]
    parent = run.verified(before).as_parent()
    student = load_student(run.folder(before), dtype=torch.float32)
    objective = make_objective(run.teacher, student.to(run.accelerator.device), settings)
    result = _train(run, stage, settings, student, objective, parent)

    record = StageRecord(
        stage=stage,
        parent=parent,
        loss_start=result.loss_start,
        loss_end=result.loss_end,
        steps=result.steps,
        tokens=result.tokens,
        seconds=result.seconds,
        settings=run.recipe.stage_digest(stage),
    )
    work = run.recipe.run_dir / "training" / stage

    def save(folder: Path) -> None:
        _save(run, student, folder)
        shutil.copy(work / "metrics.jsonl", folder)

    record = handover.write(run.folder(stage), save, record)
    shutil.rmtree(work / "checkpoints")
    return record


def _train(
    run: Run,
    stage: StageName,
    settings: Stage,
    student: PreTrainedModel,
    objective: Objective,
    parent: Parent,
) -> TrainResult:
    set_seed(run.recipe.seed)
    by_name = roles(student)
    groups = parameter_groups(
        student,
        by_name.__getitem__,
        settings.train,
        lr=settings.lr,
        mixer_lr=settings.mixer_lr,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        asked="train" in settings.model_fields_set,
    )
    steps = run.facts.steps[stage]
    rate = functools.partial(
        schedule,
        steps=steps,
        name=settings.schedule,
        warmup=settings.warmup,
        decay=settings.decay,
        min_ratio=settings.min_lr_ratio,
    )
    # Each stage reads its own order of the blocks, so that the next does not repeat the last one's beginning.
    batches = TrainingBatches(run.blocks[0], settings.batch_size, seed=run.recipe.seed + run.stages.index(stage))

    def measure() -> dict[str, float]:
        metrics = evaluate(student, run.teacher, run.held_out())
        assert metrics.kl is not None
        assert metrics.agreement is not None
        return {"loss": metrics.loss, "kl": metrics.kl, "agreement": metrics.agreement}

    return train(
        objective=objective,
        student=student,
        groups=groups,
        schedule=rate,
        batch=batches.batch,
        steps=steps,
        accumulate=settings.accumulate,
        clip=settings.clip,
        tokens_per_step=settings.batch_size * settings.accumulate * run.recipe.data.block,
        folder=run.recipe.run_dir / "training" / stage,
        evaluate=measure,
        eval_every=settings.eval_every,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        trackers=run.recipe.trackers,
        accelerator=run.accelerator,
        origin={
            "the recipe": run.recipe.stage_digest(stage),
            "the text": run.blocks[0].fingerprint,
            "the stage before": parent.sha256,
        },
    )


def _save(run: Run, student: PreTrainedModel, folder: Path) -> None:
    student.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(run.recipe.dump())


def _flat(nested: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {
        key: value
        for name, part in nested.items()
        for key, value in _flat(part, f"{prefix}{'.' if prefix else ''}{name}").items()
    }
