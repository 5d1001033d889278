"""The one training loop. Every stage brings an objective; everything else about training is here.

What is saved after every ``checkpoint_every`` steps is all that the rest of the run depends on, so a run that was
killed at any moment and started again by the same call makes the same losses, step for step, as one that was not.

On several processes every one of them runs this loop; the engine (``distill.engines``) makes their gradients one, and
whatever decides how the loop goes on is agreed on.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.engines import processes
from distill.engines.engine import Engine, Groups
from distill.errors import UserError
from distill.objective import Batch, Objective
from distill.training import checkpoint
from distill.training.gradients import Gradients
from distill.training.interrupt import stop_on_signals
from distill.training.nonfinite import NonFiniteLoss, first_nonfinite
from distill.training.progress import progress
from distill.training.tracking import MetricsLog, NoLog, require_trackers
from distill.within import whole_shape


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        loss_start: loss of the first step.
        loss_end: loss of the last step.
        steps: optimizer steps made.
        tokens: tokens they took.
        seconds: time spent in them, over all restarts, without evaluations.
        best_step: of those evaluated and checkpointed, the step with the lowest KL (or loss, where no KL is measured).
        best: that KL or loss.
    """

    loss_start: float = math.nan
    loss_end: float = math.nan
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best: float = math.inf


@dataclass(frozen=True)
class Cadence:
    """How often a run looks and saves.

    Attributes:
        eval_every: steps between evaluations; None for only the first and the last.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep_checkpoints: how many stay, besides the best.
    """

    eval_every: int | None = None
    checkpoint_every: int = 200
    keep_checkpoints: int = 2


def train(
    *,
    objective: Objective,
    student: nn.Module,
    engine: Engine,
    groups: Groups,
    schedule: Callable[[int], float],
    batch: Callable[[int], Batch],
    steps: int,
    accumulate: int,
    clip: float | None,
    tokens_per_step: int,
    folder: Path,
    evaluate: Callable[[], dict[str, float]] | None,
    cadence: Cadence,
    trackers: Collection[str],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    origin: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train ``student``, or go on where an interrupted call with the same arguments stopped.

    Args:
        objective: the loss, in parts; it holds what it needs of student and teacher.
        student: what is put into training mode; its trainable weights are in fp32.
        engine: made for this student and these groups.
        groups: AdamW's parameter groups (``parameter_groups``), with ``lr`` as the highest rate of each.
        schedule: factor on every ``lr`` at a step, counted from 0.
        batch: micro-batch by its number in the order of all processes: step s takes ``s * n`` to ``(s + 1) * n - 1``,
            where n = ``accumulate`` × the engine's ``data_ranks``.
        accumulate: micro-batches a step, on each process.
        clip: largest global norm of the gradient; None leaves it.
        tokens_per_step: of all processes, for the counts in metrics.jsonl.
        folder: gets metrics.jsonl, checkpoints/ and, if tracked, tensorboard/.
        evaluate: called in eval mode without gradients, on every process at once, before the first step, after the
            last, and as often as ``cadence`` says between; what it returns is logged.
        device: of this process.
        precision: what the objective computes in, by autocast.
        origin: what else a checkpoint must agree with to be continued, such as a digest of the weights that
            training started from, each under the name that a message gives it.

    Raises:
        UserError: the checkpoints in ``folder`` are of another call, or the disk is full.
        NonFiniteLoss: the loss or gradient of a step is NaN or infinite.
        SystemExit: 143 or 130, after SIGTERM or SIGINT on any process; the step was finished and saved.
    """
    _require_usable(student, trackers)
    student.train()
    call = {**(origin or {}), **_call(groups, schedule, steps, clip, tokens_per_step)}
    checkpoints = folder / "checkpoints"
    done = processes.together(lambda: _resume(checkpoints, call, engine))
    log_here = MetricsLog(folder, trackers, done.steps) if processes.is_main() else NoLog()
    gradients = Gradients(objective, engine, device, precision)

    with log_here as log, progress(folder.name, steps, done.steps) as show, stop_on_signals() as stop:
        while True:
            if evaluate is not None and _is_due(done.steps, steps, cadence.eval_every):
                engine.settle()
                metrics = _evaluated(student, evaluate)
                log.write("eval", done.steps, done.tokens, metrics)
                done = _with_best(done, metrics, cadence, steps)
            if done.steps == steps:
                break

            started, started_cpu = time.perf_counter(), time.process_time()
            lr = _set_learning_rate(engine, groups, schedule(done.steps))
            batches = [batch(number) for number in _numbers(done.steps, accumulate, engine)]
            objective.begin(done.steps / steps)
            rng = checkpoint.rng_state()
            losses, stopping = gradients.backward(batches, lambda: stop.signal is not None)
            loss = sum(losses.values())
            grad_norm = engine.step(clip) if math.isfinite(loss) else math.nan
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                place = gradients.origin_of_nonfinite(student, batches, rng)
                last_good = checkpoint.newest_path(checkpoints)
                raise NonFiniteLoss(done.steps + 1, first_nonfinite(losses), place, last_good)
            seconds = time.perf_counter() - started

            done = _advanced(done, loss, tokens_per_step, seconds)
            speed = tokens_per_step / seconds
            line = _metrics(losses, lr, grad_norm, speed, time.process_time() - started_cpu)
            log.write("train", done.steps, done.tokens, line)
            show(done.steps, loss, speed)
            if stopping or _is_due(done.steps, steps, cadence.checkpoint_every):
                log.flush_to_disk()
                checkpoint.save(
                    checkpoints,
                    done.steps,
                    engine.save,
                    {"call": call, "done": asdict(done)},
                    keep=cadence.keep_checkpoints,
                    best=done.best_step,
                    needed=lambda: _bytes_of_a_checkpoint(groups),
                )
            if stopping:
                break

    engine.settle()
    asked = next((signal for signal in processes.gather(stop.signal) if signal), None)
    if asked:
        _say(f"stopped by {asked.name} after step {done.steps} of {steps}; the same command goes on from there")
        raise SystemExit(128 + asked)
    return done


def _require_usable(student: nn.Module, trackers: Collection[str]) -> None:
    """Refuse what would only show hours later."""
    require_trackers(trackers)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"{name} is {parameter.dtype}: small updates would be rounded away. Load the student in float32"
                " and train with precision torch.bfloat16"
            )


def _call(
    groups: Groups, schedule: Callable[[int], float], steps: int, clip: float | None, tokens_per_step: int
) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued, each under the name that a message gives it.

    Not how many processes there are, nor how they cut a step up: neither changes what a step is.
    """
    call: dict[str, Any] = {
        "steps": steps,
        "clip": clip,
        "tokens per step": tokens_per_step,
        "schedule": [schedule(step) for step in range(0, steps, max(1, steps // 16))],
    }
    for index, group in enumerate(groups):
        name = group.get("name", index)
        call[f"parameters of group {name}"] = [list(whole_shape(parameter)) for parameter in group["params"]]
        for key in ("lr", "weight_decay", "betas"):
            value = group.get(key)
            call[f"{key} of group {name}"] = list(value) if isinstance(value, tuple) else value
    return call


def _bytes_of_a_checkpoint(groups: Groups) -> int:
    """Weights and AdamW's two moments in fp32, and what torch's files add for every tensor."""
    return sum(3 * (4 * whole_shape(parameter).numel() + 2_000) for group in groups for parameter in group["params"])


def _resume(checkpoints: Path, call: dict[str, Any], engine: Engine) -> TrainResult:
    """Put everything back as the newest intact checkpoint has it; how far that was."""
    found = checkpoint.newest(checkpoints)
    if found is None:
        return TrainResult()
    saved = found.loop["call"]
    changed = [name for name in call.keys() | saved.keys() if call.get(name) != saved.get(name)]
    if changed:
        raise UserError(
            f"{checkpoints} was made with other settings: {', '.join(sorted(changed))} changed. Put them back to"
            " continue, or remove that folder to start over"
        )
    engine.load(found.folder / checkpoint.STATE)
    checkpoint.restore_rng(found.folder)
    _say(f"continuing from {found.folder}")
    return TrainResult(**found.loop["done"])


def _numbers(step: int, accumulate: int, engine: Engine) -> Iterator[int]:
    """This process's micro-batches of a step."""
    return ((step * accumulate + index) * engine.data_ranks + engine.data_rank for index in range(accumulate))


def _is_due(step: int, steps: int, every: int | None) -> bool:
    """At the start, at the end, and every ``every`` steps."""
    return step in (0, steps) or (every is not None and step % every == 0)


def _evaluated(student: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    student.eval()
    with torch.no_grad():
        metrics = evaluate()
    student.train()
    return metrics


def _with_best(done: TrainResult, metrics: Mapping[str, float], cadence: Cadence, steps: int) -> TrainResult:
    """``done``, with this step as the best if it is, and if its checkpoint was just written."""
    value = metrics.get("kl", metrics.get("loss", math.inf))
    if done.steps and value < done.best and _is_due(done.steps, steps, cadence.checkpoint_every):
        return replace(done, best_step=done.steps, best=value)
    return done


def _set_learning_rate(engine: Engine, groups: Groups, factor: float) -> float:
    """Set every group's rate to its own times ``factor``; the highest is the one that is logged."""
    for running, given in zip(engine.optimizer.param_groups, groups, strict=True):
        running["lr"] = given["lr"] * factor
    return max(group["lr"] for group in groups) * factor


def _advanced(done: TrainResult, loss: float, tokens: int, seconds: float) -> TrainResult:
    return replace(
        done,
        loss_start=done.loss_start if done.steps else loss,
        loss_end=loss,
        steps=done.steps + 1,
        tokens=done.tokens + tokens,
        seconds=done.seconds + seconds,
    )


def _metrics(losses: dict[str, float], lr: float, grad_norm: float, speed: float, cpu: float) -> dict[str, Any]:
    """A line of metrics.jsonl; the parts of the loss are listed where there are several."""
    values: dict[str, Any] = {
        "loss": sum(losses.values()),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": round(speed, 1),
        "cpu_seconds": round(cpu, 4),
    }
    return values | {"parts": losses} if len(losses) > 1 else values


def _say(line: str) -> None:
    if processes.is_main():
        print(line, file=sys.stderr, flush=True)
