"""Which parameters train, at which learning rate, with which decay; and the learning rate over the steps."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from distill.errors import UserError
from distill.within import whole_shape

SCHEDULES = ("wsd", "cosine", "constant")

# Mamba-2's parameters per head: a matrix or not, pulling them to zero changes the dynamics.
UNDECAYED = {"A_log", "D", "dt_bias"}


def parameter_groups(
    student: nn.Module,
    role_of: Callable[[str], str],
    train: Collection[str] | None,
    *,
    lr: float,
    mixer_lr: float | None = None,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    asked: bool = True,
    reached: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Freeze what does not train and sort the rest into groups for AdamW.

    Args:
        student: its ``requires_grad`` flags are set: True for what trains, False for everything else.
        role_of: role of a parameter by its name in ``student.named_parameters()``, such as "mixer" or "mlp".
        train: the roles that train; None means all of them.
        lr: learning rate of everything but mixers.
        mixer_lr: learning rate of the role "mixer"; None means ``lr``.
        weight_decay: for matrices; see ``decays``.
        betas: of AdamW.
        asked: the user named ``train`` in the recipe, so a role without parameters is a mistake; False when it
            is a default, of which a model may lack a role.
        reached: names of the parameters that the loss depends on; the others do not train, whatever their role. None
            means all of them.

    Returns:
        Up to four groups (mixer or not, decayed or not), each with ``name``, ``params``, ``lr``,
        ``weight_decay`` and ``betas``. A tied parameter stands in one group once.

    Raises:
        UserError: a role asked for has no parameters, or nothing is left to train.
    """
    roles = {name: role_of(name) for name, _ in student.named_parameters()}
    wanted = _wanted_roles(set(roles.values()), train, asked)
    undecayed = _undecayed(student)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(roles[name] in wanted and (reached is None or name in reached))
        if not parameter.requires_grad:
            continue
        is_mixer, decay = roles[name] == "mixer", id(parameter) not in undecayed
        key = ("mixer" if is_mixer else "rest") + ("" if decay else ", no decay")
        group = {
            "name": key,
            "params": [],
            "lr": lr if mixer_lr is None or not is_mixer else mixer_lr,
            "weight_decay": weight_decay if decay else 0.0,
            "betas": tuple(betas),
        }
        groups.setdefault(key, group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def decays(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices that multiply activations: linear weights and stacked expert weights.

    Not for biases, norms, embeddings, convolution kernels, or a state-space layer's A_log, D and dt_bias.

    Args:
        module: the module that owns the parameter.
        name: the parameter's full name.
    """
    *path, leaf = name.split(".")
    return (
        len(whole_shape(parameter)) >= 2
        and not isinstance(module, nn.Embedding | _ConvNd)
        and leaf not in UNDECAYED
        and not leaf.endswith("bias")
        and not any(word in part for part in (*path[-1:], leaf) for word in ("conv", "norm"))
    )


def schedule(
    step: int,
    steps: int,
    name: str = "wsd",
    warmup: float = 0.1,
    decay: float = 0.1,
    min_ratio: float = 0.0,
) -> float:
    """Factor on the learning rate at ``step`` (0 … steps - 1); a pure function, so resuming needs no state.

    With W = warmup·steps and D = decay·steps, both rounded:

        wsd       a line from 0 up over the first W steps, 1, a line down to ``min_ratio`` over the last D
        cosine    the same warm-up, then half a cosine from 1 down to ``min_ratio``
        constant  the same warm-up, then 1

    The lines' ends (0 and ``min_ratio``) fall on the steps just before the first and just after the last, so
    that no step is spent at a rate of 0.

    Raises:
        UserError: unknown name, or fractions that do not fit.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    if not (0 <= warmup <= 1 and 0 <= decay <= 1 and 0 <= min_ratio <= 1):
        raise UserError(f"warmup {warmup}, decay {decay} and min_ratio {min_ratio} must lie between 0 and 1")
    if name == "wsd" and warmup + decay > 1:
        raise UserError(f"warmup {warmup} and decay {decay} are fractions of the steps; together at most 1")
    warm_steps, decay_steps = round(warmup * steps), round(decay * steps)
    rising = (step + 1) / (warm_steps + 1) if step < warm_steps else 1.0
    falling = 1.0
    if name == "wsd":
        falling = min(1.0, (steps - step) / (decay_steps + 1))
    elif name == "cosine":
        progress = max(0.0, (step - warm_steps + 1) / (steps - warm_steps + 1))
        falling = (1 + math.cos(math.pi * progress)) / 2
    return min(rising, min_ratio + (1 - min_ratio) * falling)


def _wanted_roles(present: set[str], train: Collection[str] | None, asked: bool) -> set[str]:
    """The roles to train, after refusing those that would train nothing."""
    listed = ", ".join(sorted(present))
    if train is None:
        return present
    missing = sorted(set(train) - present)
    if missing and asked:
        raise UserError(
            f"train names {', '.join(missing)}, of which this model has no parameters; it has: {listed}"
            " (a head tied to the embeddings counts as embeddings)"
        )
    wanted = present & set(train)
    if not wanted:
        raise UserError(f"nothing would train: train is [{', '.join(train)}] and this model has: {listed}")
    return wanted


def _undecayed(student: nn.Module) -> set[int]:
    """Ids of the parameters that are not decayed anywhere they stand; a tied head is an embedding too."""
    return {
        id(parameter)
        for path, module in student.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(path, recurse=False)
        if not decays(module, name, parameter)
    }
