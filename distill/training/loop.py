"""The one training loop. Every stage brings an objective; everything else about training is here.

What is saved after every ``checkpoint_every`` steps is all that the rest of the run depends on, so a run that was
killed at any moment and started again by the same call makes the same losses, step for step, as one that was not.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from distill.errors import UserError
from distill.training import checkpoint
from distill.training.interrupt import stop_on_signals
from distill.training.nonfinite import (
    NonFiniteLoss,
    first_nonfinite,
    first_nonfinite_gradient,
    watch_outputs,
)
from distill.training.objective import Batch, Objective, Part
from distill.training.progress import progress
from distill.training.tracking import MetricsLog, require_trackers


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        loss_start: loss of the first step.
        loss_end: loss of the last step.
        steps: optimizer steps made.
        tokens: tokens they took.
        seconds: time spent in them, over all restarts, without evaluations.
    """

    loss_start: float = math.nan
    loss_end: float = math.nan
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(
    *,
    objective: Objective,
    student: nn.Module,
    groups: Sequence[dict[str, Any]],
    schedule: Callable[[int], float],
    batch: Callable[[int], Batch],
    steps: int,
    accumulate: int,
    clip: float | None,
    tokens_per_step: int,
    folder: Path,
    evaluate: Callable[[], dict[str, float]] | None,
    eval_every: int | None,
    checkpoint_every: int,
    keep_checkpoints: int,
    trackers: Collection[str],
    accelerator: Accelerator,
    origin: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train ``student``, or go on where an interrupted call with the same arguments stopped.

    Args:
        objective: the loss, in parts; it holds what it needs of student and teacher.
        student: what is saved, restored and put into training mode; trainable weights in fp32.
        groups: AdamW's parameter groups (``parameter_groups``), with ``lr`` as the highest rate of each.
        schedule: factor on every ``lr`` at a step, counted from 0.
        batch: micro-batch by its number: step s takes ``s * accumulate`` to ``(s + 1) * accumulate - 1``.
        clip: largest global norm of the gradient; None leaves it.
        tokens_per_step: for the counts in metrics.jsonl.
        folder: gets metrics.jsonl, checkpoints/ and, if tracked, tensorboard/.
        evaluate: called in eval mode without gradients before the first step, after the last, and every
            ``eval_every`` steps between; what it returns is logged.
        accelerator: its mixed precision is the autocast that the objective runs in.
        origin: what else a checkpoint must agree with to be continued, such as a digest of the weights that
            training started from, each under the name that a message gives it.

    Raises:
        UserError: the checkpoints in ``folder`` are of another call, or the disk is full.
        NonFiniteLoss: the loss or gradient of a step is NaN or infinite.
        SystemExit: 143 or 130, after SIGTERM or SIGINT; the step was finished and saved.
    """
    _require_usable(student, accelerator, trackers)
    student.to(accelerator.device).train()
    optimizer = AdamW([dict(group) for group in groups])
    call = {**(origin or {}), **_call(groups, schedule, steps, accumulate, clip, tokens_per_step)}
    checkpoints = folder / "checkpoints"
    done = _resume(checkpoints, call, student, optimizer)

    with (
        MetricsLog(folder, trackers, done.steps) as log,
        progress(folder.name, steps, done.steps) as show,
        stop_on_signals() as stop,
    ):
        while True:
            if evaluate is not None and _is_due(done.steps, steps, eval_every):
                log.write("eval", done.steps, done.tokens, _evaluated(student, evaluate))
            if done.steps == steps:
                break

            started = time.perf_counter()
            lr = _set_learning_rate(optimizer, groups, schedule(done.steps))
            micro_batches = [batch(done.steps * accumulate + i) for i in range(accumulate)]
            rng = checkpoint.rng_state()
            losses = _backward(objective, micro_batches, accelerator)
            grad_norm = _clip(student, clip, accelerator)
            loss = sum(losses.values())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                place = _origin_of_nonfinite(objective, student, micro_batches, rng, accelerator)
                last_good = checkpoint.newest_path(checkpoints)
                raise NonFiniteLoss(done.steps + 1, first_nonfinite(losses), place, last_good)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started

            done = _advanced(done, loss, tokens_per_step, seconds)
            speed = tokens_per_step / seconds
            log.write("train", done.steps, done.tokens, _metrics(losses, lr, grad_norm, speed))
            show(done.steps, loss, speed)
            stopping = stop.signal is not None
            if stopping or _is_due(done.steps, steps, checkpoint_every):
                log.flush_to_disk()
                state = _state(student, optimizer, call, done)
                checkpoint.save(checkpoints, done.steps, state, keep_checkpoints)
            if stopping:
                break

    if stop.signal:
        _say(f"stopped by {stop.signal.name} after step {done.steps} of {steps}; the same command goes on from there")
        raise SystemExit(stop.exit_code)
    return done


def _require_usable(student: nn.Module, accelerator: Accelerator, trackers: Collection[str]) -> None:
    """Refuse what would only show hours later."""
    require_trackers(trackers)
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes were launched; training runs in one so far")
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"{name} is {parameter.dtype}: small updates would be rounded away. Load the student in float32"
                " and give the Accelerator mixed_precision='bf16'"
            )


def _call(
    groups: Sequence[dict[str, Any]],
    schedule: Callable[[int], float],
    steps: int,
    accumulate: int,
    clip: float | None,
    tokens_per_step: int,
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued, each under the name that a message gives it."""
    call: dict[str, Any] = {
        "steps": steps,
        "accumulate": accumulate,
        "clip": clip,
        "tokens per step": tokens_per_step,
        "schedule": [schedule(step) for step in range(0, steps, max(1, steps // 16))],
    }
    for index, group in enumerate(groups):
        name = group.get("name", index)
        call[f"parameters of group {name}"] = [list(parameter.shape) for parameter in group["params"]]
        for key in ("lr", "weight_decay", "betas"):
            value = group.get(key)
            call[f"{key} of group {name}"] = list(value) if isinstance(value, tuple) else value
    return call


def _resume(checkpoints: Path, call: dict[str, Any], student: nn.Module, optimizer: Optimizer) -> TrainResult:
    """Put everything back as the newest intact checkpoint has it; how far that was."""
    found = checkpoint.newest(checkpoints)
    if found is None:
        return TrainResult()
    saved = found.state["loop"]["call"]
    changed = [name for name in call.keys() | saved.keys() if call.get(name) != saved.get(name)]
    if changed:
        raise UserError(
            f"{checkpoints} was made with other settings: {', '.join(sorted(changed))} changed. Put them back to"
            " continue, or remove that folder to start over"
        )
    checkpoint.load_weights(student, found.state["weights"])
    optimizer.load_state_dict(found.state["optimizer"])
    checkpoint.set_rng_state(found.state["rng"])
    _say(f"continuing from {found.folder}")
    return TrainResult(**found.state["loop"]["done"])


def _state(student: nn.Module, optimizer: Optimizer, call: dict[str, Any], done: TrainResult) -> checkpoint.State:
    """What a checkpoint holds, file by file."""
    return {
        "weights": checkpoint.trained_weights(student),
        "optimizer": optimizer.state_dict(),
        "rng": checkpoint.rng_state(),
        "loop": {"call": call, "done": asdict(done)},
    }


def _is_due(step: int, steps: int, every: int | None) -> bool:
    """At the start, at the end, and every ``every`` steps."""
    return step in (0, steps) or (every is not None and step % every == 0)


def _evaluated(student: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    student.eval()
    with torch.no_grad():
        metrics = evaluate()
    student.train()
    return metrics


def _set_learning_rate(optimizer: Optimizer, groups: Sequence[dict[str, Any]], factor: float) -> float:
    """Set every group's rate to its own times ``factor``; the highest is the one that is logged."""
    for running, given in zip(optimizer.param_groups, groups, strict=True):
        running["lr"] = given["lr"] * factor
    return max(running["lr"] for running in optimizer.param_groups)


def _backward(objective: Objective, batches: Sequence[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Add the gradient of the step's loss to every ``.grad``; return the loss, part by part.

    Every part is divided by the weight of the whole step, all micro-batches and ranks together, so that how a
    batch is cut up changes nothing. Engines average gradients over ranks and divide by their own accumulation;
    both factors are taken back here.
    """
    local_weight = torch.tensor(sum(objective.weight(batch) for batch in batches), dtype=torch.float64)
    weight = float(accelerator.reduce(local_weight.to(accelerator.device), "sum"))
    if weight <= 0:
        raise UserError("a step's batches hold no token to learn from (every label is -100)")
    scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / weight
    sums: dict[str, Tensor] = {}
    for batch in batches:
        on_device = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        for name, loss_sum in _autocast(objective.parts(on_device), accelerator):
            accelerator.backward(loss_sum * scale)
            sums[name] = sums.get(name, 0.0) + loss_sum.detach().double()
    totals = accelerator.reduce(torch.stack(list(sums.values())), "sum") / weight
    return dict(zip(sums, totals.tolist(), strict=True))


def _autocast(parts: Iterator[Part], accelerator: Accelerator) -> Iterator[Part]:
    """The same parts, each computed under autocast, which ends before the part is sent backward."""
    while True:
        with accelerator.autocast():
            part = next(parts, None)
        if part is None:
            return
        yield part


def _clip(student: nn.Module, clip: float | None, accelerator: Accelerator) -> float:
    """Scale all gradients so that their global norm is at most ``clip``; the norm before."""
    norm = accelerator.clip_grad_norm_(student.parameters(), math.inf if clip is None else clip)
    return float(norm)


def _origin_of_nonfinite(
    objective: Objective,
    student: nn.Module,
    batches: Sequence[Batch],
    rng: dict[str, Any],
    accelerator: Accelerator,
) -> str | None:
    """Compute the step again, with the same dropout and without clipping, and watch where it goes wrong."""
    student.zero_grad()
    checkpoint.set_rng_state(rng)
    with watch_outputs(student) as found:
        _backward(objective, batches, accelerator)
    place = found[0] if found else first_nonfinite_gradient(student)
    student.zero_grad()
    return place


def _advanced(done: TrainResult, loss: float, tokens: int, seconds: float) -> TrainResult:
    return TrainResult(
        loss_start=done.loss_start if done.steps else loss,
        loss_end=loss,
        steps=done.steps + 1,
        tokens=done.tokens + tokens,
        seconds=done.seconds + seconds,
    )


def _metrics(losses: dict[str, float], lr: float, grad_norm: float, speed: float) -> dict[str, Any]:
    """A line of metrics.jsonl; the parts of the loss are listed where there are several."""
    values: dict[str, Any] = {
        "loss": sum(losses.values()),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": round(speed, 1),
    }
    return values | {"parts": losses} if len(losses) > 1 else values


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
