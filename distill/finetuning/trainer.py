"""What all tuning has alike: adapters, precision, checkpoints, metrics and the hand-over, as the recipe says.

Which of TRL's trainers it is, with its own settings, say ``supervised``, ``preferring`` and ``on_policy_trainer``.
"""

import copy
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback

from distill import handover
from distill.adapters import default_lora_targets, require_gradients, require_norms, uncovered_weights
from distill.atomic import explained_full_disk, replace_file
from distill.errors import UserError
from distill.finetuning.bases import KINDS
from distill.finetuning.job import Job
from distill.finetuning.on_policy_trainer import make_on_policy
from distill.finetuning.preferring import make_preferring
from distill.finetuning.settings import Adapter, TuningRecipe
from distill.finetuning.supervised import make_supervised
from distill.handover import StageRecord
from distill.recipe_stages import TEXT_ROLES
from distill.roles import roles
from distill.student import load_model
from distill.training.optim import parameter_groups
from distill.training.tracking import MetricsLog

FIRST_SCALE = 2.0**10
"""Of float16's loss on the CPU. PyTorch's own 2¹⁶ overflows at first in small students; each overflow costs a step."""

METRICS = {
    "loss": "loss",
    "lr": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
    "written_tokens": "completions/mean_length",
}
"""Our names of what TRL logs. A pair's reward is β log(model / reference) of an answer, its margin the difference;
``written_tokens`` is the mean length of what the student wrote."""

_MAKERS: dict[str, Callable[..., Any]] = {
    "finetune": make_supervised,
    "prefer": make_preferring,
    "onpolicy": make_on_policy,
}
_ALWAYS = ("loss", "lr", "grad_norm")
_FINGERPRINT = "fingerprint"


def tune(
    job: Job, tell: Callable[[str], object] = print, look: Callable[[Any], object] = lambda model: None
) -> StageRecord:
    """Train as the recipe says, from the last checkpoint if there is one, and hand the result on.

    Args:
        tell: is given what the user should know beforehand, in one line.
        look: is given the trained model before it is saved.

    Raises:
        UserError: an adapter would not train, or the checkpoints there are another recipe's.
    """
    recipe, folder = job.recipe, job.work_folder
    for remark in job.remarks:
        tell(remark)
    checkpoint = _begin(job)
    torch.manual_seed(recipe.seed)
    base = load_base(recipe)
    # The trainer writes its own wishes into the model's.
    config, of_generation = copy.deepcopy(base.config), copy.deepcopy(base.generation_config)
    if recipe.method != "full" and (left := uncovered_weights(base)):
        tell(f"no adapter is on {', '.join(left)}, which are no linear modules; they stay as they are")
    model = base if recipe.method == "full" else with_adapters(base, recipe)
    groups = trained_groups(model, recipe)
    step = 0 if checkpoint is None else _state(checkpoint)["global_step"]
    clock = _Clock(_seconds_at(checkpoint))
    with MetricsLog(folder, (), step) as log:
        trainer = _trainer(job, model, groups, log)
        trainer.add_callback(clock)
        with explained_full_disk(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers, as below
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = StageRecord(
        stage=recipe.STAGE,
        parent=job.parent,
        loss_start=losses[0]["loss"],
        loss_end=losses[-1]["loss"],
        steps=trainer.state.global_step,
        tokens=_last_tokens(folder / "metrics.jsonl"),
        seconds=clock.seconds,
        settings=job.fingerprint,
    )
    base.config, base.generation_config = config, of_generation
    look(trainer.model)
    record = handover.write(job.folder, lambda partial: _save(trainer.model, job, partial), record)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return record


def load_base(recipe: TuningRecipe) -> PreTrainedModel:
    """The model as it is before tuning: in float32, or for qlora its layers' linear maps in 4 bits.

    The quantised are NF4 with quantised constants (QLoRA, arXiv 2305.14314, section 3), and compute in the recipe's
    dtype. Embeddings, head, norms, convolutions and the mixers' own parameters stay as they are.
    """
    folder = Path(recipe.model).expanduser()
    if recipe.method != "qlora":
        return load_model(folder, dtype=torch.float32)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
    )
    base = load_model(folder, dtype=torch.float32, quantization_config=quantised)
    return base.requires_grad_(False)


def with_adapters(base: PreTrainedModel, recipe: TuningRecipe) -> Any:
    """The model with new adapters on its default targets, or with those to go on with.

    Raises:
        UserError: dora would divide by zero.
    """
    import peft

    wanted, targets = recipe.adapter or Adapter(), default_lora_targets(base)
    if wanted.start is not None:
        return peft.PeftModel.from_pretrained(base, Path(wanted.start).expanduser(), is_trainable=True)
    use_rslora, use_dora = KINDS[recipe.method]
    if use_dora:
        require_norms(base, targets)
    config = peft.LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha or 2 * wanted.rank,  # type: ignore[arg-type]  # any number will do
        lora_dropout=wanted.dropout,
        target_modules=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, config)
    # Where plain PEFT looks for the base: from any current directory.
    adapted.peft_config["default"].base_model_name_or_path = str(Path(recipe.model).expanduser().absolute())
    return adapted


def trained_groups(model: Any, recipe: TuningRecipe) -> list[dict[str, Any]]:
    """What trains, for AdamW, which decays matrices alone: transformers' rule would also shrink A_log and D."""
    settings: dict[str, Any] = {
        "lr": recipe.lr,
        "weight_decay": recipe.training.weight_decay,
        "betas": recipe.training.betas,
    }
    if recipe.method == "full":
        return parameter_groups(model, roles(model).__getitem__, TEXT_ROLES, **settings, asked=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = ([p for p in trained if (p.dim() > 1) is wanted] for wanted in (True, False))
    return [
        {**settings, "params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, recipe.training.weight_decay), (others, 0.0))
        if parameters
    ]


def _trainer(job: Job, model: Any, groups: list[dict[str, Any]], log: MetricsLog) -> Any:
    if not sys.stderr.isatty():
        disable_progress_bars()
    make = _MAKERS[job.recipe.STAGE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL's own settings, which transformers is about to rename
        trainer = make(job, model, torch.optim.AdamW(groups), shared_arguments(job))
    for parameter in model.parameters():
        if parameter.requires_grad:  # beside a model in 4 bits TRL would train adapters in bfloat16
            parameter.data = parameter.data.float()
    trainer.add_callback(_Watch(log, job.recipe, tokens_before=_last_tokens(log.path)))
    trainer.remove_callback(PrinterCallback)
    if job.recipe.dtype == "float16" and job.on_cpu:
        _scale_on_cpu(trainer)
    # Accelerate casts what goes through the trained model's forward: not a teacher, a reference, or a decoder alone.
    trainer.compute_loss_context_manager = trainer.accelerator.autocast
    return trainer


def shared_arguments(job: Job) -> dict[str, Any]:
    """What TRL's trainers take alike."""
    recipe, training = job.recipe, job.recipe.training
    rows = training.micro_batch_size or training.batch_size
    return {
        "output_dir": str(job.work_folder),
        "seed": recipe.seed,
        "use_cpu": job.on_cpu,
        "bf16": recipe.dtype == "bfloat16",
        "fp16": recipe.dtype == "float16",
        "num_train_epochs": training.epochs,
        "max_steps": training.steps or -1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": training.batch_size // rows,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": training.schedule if training.schedule != "constant" else "constant_with_warmup",
        "warmup_steps": training.warmup,  # below 1 it is a fraction
        "max_grad_norm": training.clip,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_every,
        "save_total_limit": training.keep_checkpoints,
        "logging_steps": 1,
        "logging_first_step": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": not job.on_cpu,
    }


def _scale_on_cpu(trainer: Any) -> None:
    """Accelerate leaves float16 off on the CPU without a word, and would train in float32: both halves of it on."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)


@dataclass
class _Watch(TrainerCallback):
    """Metrics go to metrics.jsonl; adapters that do not train end the run before it has begun."""

    log: MetricsLog
    recipe: TuningRecipe
    tokens_before: int
    """Of the run that this one goes on with."""
    watched: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if state.num_input_tokens_seen:  # the trainer itself goes on counting; others begin at 0 again
            self.tokens_before = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_rest: Any) -> None:
        # Where float16 overflowed, clipping has made zeros of what did not; that step is not taken.
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not self.watched and self.recipe.method != "full" and all(bool(g.isfinite().all()) for g in gradients):
            require_gradients(model)
            self.watched = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_rest: Any) -> None:
        if logs and "loss" in logs:
            values = {ours: logs.get(theirs) for ours, theirs in METRICS.items() if theirs in logs or ours in _ALWAYS}
            tokens = self.tokens_before + int(logs.get("num_tokens", 0))
            self.log.write("train", state.global_step, tokens, values)

    def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        self.log.flush_to_disk()


class _Clock(TrainerCallback, ExportableState):
    """Seconds of training over all restarts; a checkpoint keeps those that it took.

    Args:
        before: those of the run that this one goes on with.
    """

    def __init__(self, before: float) -> None:
        self.before, self.started = before, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def state(self) -> dict[str, Any]:
        """What transformers writes into trainer_state.json; ``_seconds_at`` reads it."""
        return {"args": {}, "attributes": {"before": self.seconds}}


def _seconds_at(checkpoint: Path | None) -> float:
    kept = {} if checkpoint is None else _state(checkpoint)["stateful_callbacks"]
    # Checkpoints of earlier versions do not tell.
    return kept[_Clock.__name__]["attributes"]["before"] if _Clock.__name__ in kept else 0.0


def _last_tokens(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return int(json.loads(lines[-1])["tokens"]) if lines else 0


def _begin(job: Job) -> Path | None:
    """The last whole checkpoint of this very recipe, if any."""
    told = job.work_folder / _FINGERPRINT
    checkpoint = _last_checkpoint(job.work_folder)
    if checkpoint is not None and (not told.is_file() or told.read_text() != job.fingerprint):
        raise UserError(
            f"{checkpoint} was trained with other settings, data or weights than this recipe's; put them back, remove"
            f" {job.work_folder}, or choose another run_dir"
        )
    job.work_folder.mkdir(parents=True, exist_ok=True)
    replace_file(told, job.fingerprint.encode())
    replace_file(job.recipe.run_dir / "recipe.yaml", job.recipe.dump().encode())
    return checkpoint


def _last_checkpoint(folder: Path) -> Path | None:
    """Its state is what a checkpoint's saving ends with."""
    whole = [path for path in folder.glob("checkpoint-*") if _state(path)]
    return max(whole, key=lambda path: _state(path)["global_step"], default=None)


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return {}


def _save(model: Any, job: Job, folder: Path) -> None:
    if job.recipe.adapter is not None and job.recipe.adapter.merge:
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    job.tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(job.recipe.dump())
