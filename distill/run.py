"""A recipe's run: where its stages live, what they load, and how one is carried out and handed on.

run_dir/
  data/                       token blocks, prepared once (distill.data)
  recipe.yaml                 the resolved recipe
  teacher/evaluation.json
  convert/ mixing/ hidden/ logits/      finished stages (distill.handover), each with its evaluation
  training/STAGE/             metrics and checkpoints of the stage that is being trained
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill import handover
from distill.atomic import replace_file, settle
from distill.capture import Batch
from distill.checks import RecipeFacts, check
from distill.data import Blocks, Rows, TrainingBatches, evaluation_batches, prepare_recipe_text
from distill.data.image_text import ImageTextRows, prepare_image_text
from distill.data.splits import HELD_OUT, TRAIN
from distill.engines import processes
from distill.engines.launched import Launched, launched
from distill.engines.placement import place_teacher
from distill.errors import UserError
from distill.evaluation_record import read_evaluation
from distill.handover import Parent, StageRecord
from distill.lock import alone_in
from distill.processor import copy_processor, image_token_id, read_processor
from distill.recipe import STAGE_NAMES, Recipe, StageName, Step, load_recipe
from distill.vision import is_vision

CONVERT: Literal["convert"] = "convert"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A checked recipe and what its stages share. Models and data are loaded when first asked for.

    On several processes each has its own, and all go through the same stages together; the main one writes.
    """

    recipe: Recipe
    facts: RecipeFacts
    device: torch.device
    launched: Launched

    @property
    def precision(self) -> torch.dtype:
        """What the student computes in; its weights are fp32."""
        return DTYPES[self.recipe.dtype]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.recipe.teacher.path)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The frozen teacher, in the recipe's dtype, where the engine wants it."""
        wanted = self.recipe.teacher
        return place_teacher(wanted.path, DTYPES[wanted.dtype], self.launched, self.device)

    def forget_teacher(self) -> None:
        """Free its memory; it is loaded anew when next asked for."""
        vars(self).pop("teacher", None)

    @cached_property
    def blocks(self) -> tuple[Rows, Rows]:
        """Training and held-out rows, prepared on first use; from then on the run's recipe is in its folder.

        So a text that cannot be used leaves nothing behind.
        """
        processes.on_main(self._prepare)
        data, folder = self.recipe.data, self.recipe.run_dir / "data"
        if data.images is None:
            return Blocks(folder, TRAIN, data.block), Blocks(folder, HELD_OUT, data.block)
        image = image_token_id(self.facts.config)
        train, held_out = (
            ImageTextRows(folder, split, data.block, self.processor, image, data.images.score)
            for split in (TRAIN, HELD_OUT)
        )
        if self.launched.kind == "zero3" and train.without_images:
            raise UserError(
                f"ZeRO-3 gathers weights module by module, on all processes at once; {train.without_images} rows have"
                " no image to run the vision tower for; leave them out, or launch fsdp2"
            )
        return train, held_out

    @cached_property
    def processor(self) -> Any:
        """The teacher's, with the recipe's settings; only of a vision-language teacher."""
        images = self.recipe.data.images
        return read_processor(self.recipe.teacher.path, images.processor if images else None)

    def _prepare(self) -> None:
        data, folder = self.recipe.data, self.recipe.run_dir / "data"
        if data.images is None:
            prepare_recipe_text(data, self.tokenizer, folder)
        else:
            image = image_token_id(self.facts.config)
            fraction = data.held_out.fraction
            prepare_image_text(data.source, self.processor, image, folder, block=data.block, fraction=fraction)
        replace_file(self.recipe.run_dir / "recipe.yaml", self.recipe.dump().encode())

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

    def work_folder(self, stage: StageName) -> Path:
        """Where a stage trains: metrics and checkpoints."""
        return self.recipe.run_dir / "training" / stage

    def save_beside(self, folder: Path) -> None:
        """Write what stands beside the weights in every stage's folder."""
        self.tokenizer.save_pretrained(folder)
        if is_vision(self.facts.config):
            copy_processor(self.recipe.teacher.path, folder)
        (folder / "recipe.yaml").write_text(self.recipe.dump())

    def training_batches(self, stage: StageName, size: int) -> TrainingBatches:
        """The stage's own order of the text, so that the next does not repeat the last one's beginning.

        It depends on the stage's name, and neither on which others the recipe has nor on how long its blocks are: what
        two recipes do in a stage, they do on the same text.
        """
        rows, block = self.blocks[0], self.recipe.block_of(self.recipe.stages.named()[stage])
        together = rows.block // block
        if together > 1:
            rows = Blocks(self.recipe.run_dir / "data", TRAIN, block)
        return TrainingBatches(rows, size, self.recipe.seed + 1 + STAGE_NAMES.index(stage), together)

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

        def look() -> bool:
            return handover.is_there(self.folder(stage)) and bool(self.verified(stage))

        return processes.on_main(look)

    def is_evaluated(self, stage: str) -> bool:
        """Whether the stage's folder holds an evaluation of what it holds now, on this recipe's held-out text."""
        evaluation = processes.on_main(lambda: read_evaluation(self.folder(stage)))
        if evaluation is None:
            return False
        _ = self.blocks  # by every process, before the main one alone looks at the text
        return processes.on_main(lambda: evaluation.subject == self.evaluation_subject(stage))

    def evaluation_subject(self, stage: str) -> str:
        """A digest of all that an evaluation depends on: teacher, student, held-out text, and the recipe's wishes.

        The main process computes it.
        """
        student = "" if stage == self.origin.stage else handover.read(self.folder(stage)).as_parent().sha256
        text, wishes = self.blocks[1].fingerprint, self.recipe.evaluation.model_dump_json(exclude={"tasks"})
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
        UserError: everything the recipe says that cannot be done.
    """
    recipe = load_recipe(path, overrides)
    device = processes.start(recipe.device)

    def checked() -> Run:
        asked = launched()
        return Run(recipe, check(recipe, ranks=processes.world(), zero=asked.is_zero), device, asked)

    return processes.together(checked)


@contextmanager
def at_work_on(path: Path, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """``open_run``, and nobody else writes into its run_dir until the block ends.

    Raises:
        UserError: as ``open_run``; another run is at work there, or something else stands where a stage would.
    """
    run = open_run(path, overrides)
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(alone_in(run.recipe.run_dir))
            for stage in run.stages:
                settle(run.folder(stage))
                handover.require_room(run.folder(stage))

        processes.on_main(begin)
        yield run


def _flat(nested: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {
        key: value
        for name, part in nested.items()
        for key, value in _flat(part, f"{prefix}{'.' if prefix else ''}{name}").items()
    }


def share_text(run: Run, prepared: Path) -> None:
    """Let a run read the text that another has prepared, in the folder ``prepared``, unless it has its own.

    By a link from the one to the other, made anew each time, so that the folder above both may be moved or copied.
    """
    place = run.recipe.run_dir / "data"
    if place.is_symlink():
        place.unlink()
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(prepared.resolve(), place.parent.resolve()))
