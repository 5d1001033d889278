"""The one training loop. Every stage brings an objective; everything else about training is here.

What is saved after every ``checkpoint_every`` steps is all that the rest of the run depends on, so a run that was
killed at any moment and started again by the same call makes the same losses, step for step, as one that was not.

On several processes every one of them runs this loop; the engine (``distill.engines``) makes their gradients one, and
whatever decides how the loop goes on is agreed on.
"""

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from distill.training.watching import Best, Hook, Mode, Patience, is_better, is_due, measured, metric_by_default
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
        best_step: of those evaluated and checkpointed, the step with the lowest KL (or loss, where no KL is measured),
            or the best by what ``keep_best`` says.
        best: that KL, loss or other metric.
        reached: the best so far of the metric that ``stop_early`` goes by.
        stale: measures of it since then.
        kept_step: the step whose weights the student has at the end, where it is not the last.
    """

    loss_start: float = math.nan
    loss_end: float = math.nan
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best: float = math.inf
    reached: float | None = None
    stale: int = 0
    kept_step: int | None = None


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
    hooks: Sequence[Hook] = (),
    keep_best: Best | None = None,
    stop_early: Patience | None = None,
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
            last, and as often as ``cadence`` says between; what it returns is logged. The student is trained as if
            it had not been called.
        device: of this process.
        precision: what the objective computes in, by autocast.
        origin: what else a checkpoint must agree with to be continued, such as a digest of the weights that
            training started from, each under the name that a message gives it.
        hooks: what else is measured, each at its own pace.
        keep_best: at the end the student gets the weights of the best step; the start is none.
        stop_early: when training may end before its last step.

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
    measures = [*_as_hook(evaluate, cadence), *hooks]

    def keep(log: MetricsLog | NoLog, done: TrainResult) -> None:
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

    with log_here as log, progress(folder.name, steps, done.steps) as show, stop_on_signals() as stop:
        while True:
            due = [hook for hook in measures if is_due(done.steps, steps, hook.every)]
            if due:
                engine.settle()
                metrics = _agreed(measured(student, due, done.steps))
                done = _with_patience(done, metrics, stop_early)
                if _is_over(done, steps, stop_early):  # then this step is the last, which every hook measures
                    rest = [hook for hook in measures if hook not in due]
                    metrics |= _agreed(measured(student, rest, done.steps))
                log.write("eval", done.steps, done.tokens, metrics)
                if _is_saved(done.steps, steps, cadence, keep_best):
                    done = _with_best(done, metrics, keep_best)
            if _is_over(done, steps, stop_early):
                if not _is_saved(done.steps, steps, cadence, keep_best):  # it ends early, and may be stopped right here
                    keep(log, done)
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
            if stopping or _is_saved(done.steps, steps, cadence, keep_best):
                keep(log, done)
            if stopping:
                break

    engine.settle()
    asked = next((signal for signal in processes.gather(stop.signal) if signal), None)
    if asked:
        _say(f"stopped by {asked.name} after step {done.steps} of {steps}; the same command goes on from there")
        raise SystemExit(128 + asked)
    return done if keep_best is None else processes.together(lambda: _back_to_best(done, checkpoints, engine))


def _as_hook(evaluate: Callable[[], dict[str, float]] | None, cadence: Cadence) -> list[Hook]:
    return [] if evaluate is None else [Hook(lambda student, step: evaluate(), cadence.eval_every)]


def _agreed(metrics: dict[str, float]) -> dict[str, float]:
    """The main process's on all, which must decide alike: GPUs of different makes may round differently."""
    return processes.on_main(lambda: metrics)


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


def _is_saved(step: int, steps: int, cadence: Cadence, keep_best: Best | None) -> bool:
    """Whether the step gets a checkpoint; each that may turn out to be the best one does."""
    may_be_best = keep_best is not None and is_due(step, steps, keep_best.every)
    return bool(step) and (may_be_best or is_due(step, steps, cadence.checkpoint_every))


def _with_best(done: TrainResult, metrics: Mapping[str, float], keep_best: Best | None) -> TrainResult:
    """``done``, with this step, whose checkpoint was just written, as the best if it is."""
    metric = keep_best.metric if keep_best else metric_by_default(metrics)
    mode: Mode = keep_best.mode if keep_best else "min"
    value, best = metrics.get(metric or "", math.nan), None if done.best_step is None else done.best
    return replace(done, best_step=done.steps, best=value) if is_better(value, best, mode) else done


def _with_patience(done: TrainResult, metrics: Mapping[str, float], stop_early: Patience | None) -> TrainResult:
    if stop_early is None or stop_early.metric not in metrics:
        return done
    value = metrics[stop_early.metric]
    if is_better(value, done.reached, stop_early.mode, stop_early.min_delta):
        return replace(done, reached=value, stale=0)
    return replace(done, stale=done.stale + 1)


def _is_over(done: TrainResult, steps: int, stop_early: Patience | None) -> bool:
    return done.steps == steps or (stop_early is not None and done.stale >= stop_early.patience)


def _back_to_best(done: TrainResult, checkpoints: Path, engine: Engine) -> TrainResult:
    """Give the student the weights of the best step, if that is not the last."""
    if done.best_step in (None, done.steps):
        return done
    best = checkpoint.of_step(checkpoints, done.best_step)
    if damage := checkpoint.damage_of(best):
        raise UserError(f"the best step's checkpoint cannot be used: {damage}; take keep_best out, or train anew")
    engine.load(best / checkpoint.STATE)
    engine.settle()
    _say(f"back to step {done.best_step} of {done.steps}, the best")
    return replace(done, kept_step=done.best_step)


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
