"""A tuning recipe that was checked against its files, and where it writes. No weight is loaded for it.

run_dir/
  recipe.yaml                 the resolved recipe
  STAGE/                      the tuned model or adapter, a Hugging Face folder with stage.json (distill.handover)
  training/STAGE/             metrics.jsonl, and checkpoints while it trains

STAGE is finetune, prefer or onpolicy.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from distill import handover
from distill.atomic import settle
from distill.checks import read_tokenizer
from distill.errors import UserError
from distill.finetuning.bases import adapter_digest, check_adapter, parent_beside, parent_of_tuning
from distill.finetuning.chat import check_template, require_template, set_template
from distill.finetuning.on_policy import OnPolicyRecipe, fitting_prompts, read_prompts
from distill.finetuning.preferences import START, PreferRecipe, fitting_pairs, read_pairs
from distill.finetuning.recipe import FinetuneRecipe, load_finetune_recipe
from distill.finetuning.rows import Row, is_text, read_rows
from distill.finetuning.settings import TuningRecipe
from distill.handover import Parent
from distill.lock import alone_in

Load = Callable[[Path, Sequence[str]], TuningRecipe]


@dataclass(frozen=True)
class Job:
    """A checked recipe and what its files hold.

    Attributes:
        parent: the model that is tuned.
        fingerprint: sha256 of all that the result depends on: settings, rows, template, models and adapters.
        remarks: what the user should know beforehand, a line each.
    """

    recipe: TuningRecipe
    parent: Parent
    tokenizer: Any
    rows: list[Row]
    fingerprint: str
    remarks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the tuned model or adapter goes."""
        return self.recipe.run_dir / self.recipe.STAGE

    @property
    def work_folder(self) -> Path:
        """Metrics and checkpoints."""
        return self.recipe.run_dir / "training" / self.recipe.STAGE

    @property
    def on_cpu(self) -> bool:
        return self.recipe.device == "cpu" or not torch.cuda.is_available()

    def is_done(self) -> bool:
        """Whether the result is there; if it is, it must be what this recipe makes."""
        if not handover.is_there(self.folder):
            return False
        handover.verify(self.folder, self.parent, expected_settings=self.fingerprint)
        return True


@contextmanager
def at_work_on_tuning(
    path: Path,
    overrides: Sequence[str] = (),
    load: Callable[[Path, Sequence[str]], TuningRecipe] = load_finetune_recipe,
) -> Iterator[Job]:
    """Check a recipe; nobody else writes into its run_dir until the block ends.

    Args:
        load: reads the recipe of one of the programs.

    Raises:
        UserError: whatever the recipe says that cannot be done; nothing was written.
    """
    job = open_job(load(path, overrides))
    with alone_in(job.recipe.run_dir):
        settle(job.folder)
        handover.require_room(job.folder)
        yield job


def open_job(recipe: TuningRecipe) -> Job:
    """Check what a recipe says against the files it names.

    Raises:
        UserError: the first thing that is wrong.
    """
    _require_packages(recipe.method)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("fine-tuning runs as one process, on the first GPU it sees; start it without a launcher")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA device is visible to this PyTorch; use auto or cpu")
    model = Path(recipe.model).expanduser()
    parent = parent_of_tuning(model)
    start = None if recipe.adapter is None or recipe.adapter.start is None else Path(recipe.adapter.start).expanduser()
    if start is not None:
        check_adapter(start, model, parent, recipe.method)
    match recipe:
        case FinetuneRecipe():
            found = _of_finetuning(recipe, model)
        case PreferRecipe():
            found = _of_preferences(recipe, model)
        case OnPolicyRecipe():
            found = _of_prompts(recipe, model)
        case _:
            raise TypeError(type(recipe))
    tokenizer, rows, beside, remarks = found
    told = [recipe.digest(), parent.sha256, rows, tokenizer.chat_template, start and adapter_digest(start)]
    fingerprint = hashlib.sha256(json.dumps([*told, *beside]).encode()).hexdigest()
    return Job(recipe, parent, tokenizer, rows, fingerprint, remarks)


class _Found(NamedTuple):
    """What a recipe's files hold.

    ``beside`` are the digests of other models that the result depends on.
    """

    tokenizer: Any
    rows: list[Row]
    beside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def _of_finetuning(recipe: FinetuneRecipe, model: Path) -> _Found:
    _check_length(recipe.data.max_length, model)
    rows = read_rows(recipe.data)
    is_chat = recipe.data.format == "chat"
    tokenizer = _tokenizer(model, recipe.data.chat_template, ends=None if is_chat else "every text")
    if is_chat:
        check_template(tokenizer, recipe.data, rows)
    if recipe.teacher is None:
        return _Found(tokenizer, rows)
    teacher = Path(recipe.teacher.path).expanduser()
    return _Found(tokenizer, rows, (parent_beside(teacher, model, tokenizer, "teacher.path").sha256,))


def _of_preferences(recipe: PreferRecipe, model: Path) -> _Found:
    _check_length(recipe.data.max_length, model)
    pairs = read_pairs(recipe.data)
    ends = "every answer" if is_text(pairs[0][1]) else None
    tokenizer = _tokenizer(model, recipe.data.chat_template, ends=ends)
    rows, n_long = fitting_pairs(pairs, tokenizer, recipe.data.max_length)
    remarks = (f"{n_long} of {len(pairs)} pairs are longer than data.max_length, and are left out",) if n_long else ()
    if recipe.reference == START:
        return _Found(tokenizer, rows, (START,), remarks)
    reference = Path(recipe.reference).expanduser()
    return _Found(tokenizer, rows, (parent_beside(reference, model, tokenizer, "reference").sha256,), remarks)


def _of_prompts(recipe: OnPolicyRecipe, model: Path) -> _Found:
    _check_length(recipe.data.max_prompt + recipe.new_tokens, model, "data.max_prompt and new_tokens together")
    prompts = read_prompts(recipe.data)
    ends = "what is written" if is_text(prompts[0][1]) else None
    tokenizer = _tokenizer(model, recipe.data.chat_template, ends=ends)
    rows, n_long = fitting_prompts(prompts, tokenizer, recipe.data.max_prompt)
    _require_a_step(len(rows), n_long, recipe.training.batch_size)
    remarks = (f"{n_long} of {len(prompts)} prompts are longer than data.max_prompt, and are left out",)
    teacher = parent_beside(Path(recipe.teacher.path).expanduser(), model, tokenizer, "teacher.path")
    return _Found(tokenizer, rows, (teacher.sha256,), remarks if n_long else ())


def _require_a_step(n_prompts: int, n_long: int, batch_size: int) -> None:
    """TRL leaves out of an epoch what does not fill a step of prompts: of too few it would take no step at all."""
    if n_prompts < batch_size:
        left = f" ({n_long} more are longer than data.max_prompt)" if n_long else ""
        raise UserError(
            f"training.batch_size: a step takes {batch_size} prompts, and there are {n_prompts}{left}; give"
            f" more prompts, or lower it to {n_prompts} at most"
        )


def _tokenizer(model: Path, template: str | None, *, ends: str | None) -> Any:
    """The model's tokenizer with the recipe's chat template.

    Args:
        ends: what its end-of-sequence token stands behind, of plain text; None of messages, which take a template.

    Raises:
        UserError: it lacks the one or the other.
    """
    tokenizer = read_tokenizer(model)
    set_template(tokenizer, template)
    if ends is None:
        require_template(tokenizer)
    elif tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {model} has no end-of-sequence token, which ends {ends}")
    return tokenizer


def _check_length(max_length: int, model: Path, key: str = "data.max_length") -> None:
    longest = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(
            f"{key}: {max_length} tokens are more than the {longest} positions that the model knows; lower it"
        )


def _require_packages(method: str) -> None:
    lacking = [name for name in ("peft", "trl") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"{' and '.join(lacking)} not installed: pip install 'distill-ssm[finetune]'")
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "method: qlora holds the model in 4 bits by bitsandbytes, which is not installed: pip install"
            " 'distill-ssm[qlora]', or use lora"
        )
