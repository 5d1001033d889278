"""A recipe's run before it runs: which layers change, how large everything is, where it fits, what each stage takes.

Time is a bound, not a simulation. A device computes at its rate of operations and, for what is elementwise, at the
rate of its memory; it sends what its engine sends (`distill.memory`) at its bandwidth; computing and sending are
taken to overlap, so that the longer of the two counts. Evaluation, checkpoints, data preparation and start-up come on
top. Devices beyond the first are otherwise taken to scale linearly.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from distill.checks import RecipeFacts
from distill.conversion import CONTEXTS, Report, empty_model, report
from distill.conversion import plan as plan_student
from distill.costs import (
    DTYPES,
    RECOMPUTED,
    Kept,
    Sizes,
    cut,
    flops_per_token,
    kept_for_backward,
    sizes_of,
    student_flops_per_token,
    teacher_flops_per_token,
)
from distill.data.batches import steps_for
from distill.data.image_text import read_image_manifest
from distill.data.pack import MANIFEST, Blocks
from distill.data.splits import TRAIN
from distill.machine import FITS, Machine, Wanted, machine
from distill.memory import ENGINES, MODES, Memory, bytes_sent, memory, modes_for, numbers, sharing
from distill.recipe import LogitsStage, Recipe, Stage, StageName
from distill.remedies import Remedy, remedies

# How often what backward needs is moved: written in the forward, read in the backward, its gradient written.
_PASSES = 3


@dataclass(frozen=True)
class Placed:
    """A stage under one engine.

    Attributes:
        mode: a key of `distill.memory.MODES`.
        tokens: what its steps really take, the recipe's tokens rounded down to whole steps.
        memory: of a device.
        on_host: bytes of the host's memory for each device.
        seconds: for all steps.
    """

    mode: str
    steps: int
    tokens: int
    memory: Memory
    on_host: int
    fits: bool
    seconds: float

    @property
    def tokens_a_day(self) -> float:
        return self.tokens / self.seconds * 86400

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": _with_total(self.memory), "tokens_a_day": self.tokens_a_day}


@dataclass(frozen=True)
class StagePlan:
    """One stage, as far as it is known beforehand.

    Attributes:
        epochs: passes over the training text; None while the text is not prepared.
        flops: floating-point operations, teacher and student.
        modes: every engine that it can run under, the least communication first.
        remedies: what would make it fit, if nothing does.
    """

    name: StageName
    epochs: float | None
    flops: float
    modes: list[Placed]
    remedies: list[Remedy]

    @property
    def fits(self) -> bool:
        """Whether any engine fits."""
        return any(placed.fits for placed in self.modes)

    @property
    def best(self) -> Placed:
        """The first that fits, otherwise the one that takes least memory."""
        smallest = min(self.modes, key=lambda placed: placed.memory.total)
        return next((placed for placed in self.modes if placed.fits), smallest)

    def fits_under(self, engine: str) -> bool:
        """Whether it fits when that engine is launched; a stage that can only run by layers does so under any."""
        return any(placed.fits for placed in self.modes if placed.mode == engine or self.modes == [placed])

    def to_json(self) -> dict[str, Any]:
        best = self.best.to_json()
        return {
            "name": self.name,
            **{key: best[key] for key in ("tokens", "steps", "seconds", "memory", "tokens_a_day")},
            "epochs": self.epochs,
            "flops": self.flops,
            "fits": self.fits,
            "mode": best["mode"],
            "modes": [placed.to_json() for placed in self.modes],
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }


@dataclass(frozen=True)
class Plan:
    """What `distill plan` shows.

    Attributes:
        conversion: layers, parameters by role, state and cache bytes.
        machine: what it is planned for.
        simple: whether that is one process on this machine, whatever it is.
        weights_found: whether the teacher has weights, or only a config.
    """

    recipe: Recipe
    conversion: Report
    stages: list[StagePlan]
    machine: Machine
    simple: bool
    weights_found: bool

    def engines_for_all(self) -> list[str]:
        """The engines under which every stage fits, the least communication first."""
        return [engine for engine in ENGINES if all(stage.fits_under(engine) for stage in self.stages)]

    def cost(self, stage: StagePlan) -> float | None:
        """In the currency of the price, or None without a price."""
        hours = stage.best.seconds / 3600 * self.machine.devices
        return None if self.machine.price is None else hours * self.machine.price

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes, times in seconds."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "weights_found": self.weights_found,
            "layers": self.conversion.layers,
            "exportable": self.recipe.student.exportable,
            "parameters": {"teacher": self.conversion.parameters_before, "student": self.conversion.parameters_after},
            "state_bytes": self.conversion.state_bytes,
            "cache_bytes": {
                tokens: dict(zip(("student", "teacher"), self.conversion.cache_bytes(tokens), strict=True))
                for tokens in CONTEXTS
            },
            "stages": [{**stage.to_json(), "cost": self.cost(stage)} for stage in self.stages],
            "rates": asdict(self.machine.rates),
            "device": self.machine.name,
            "machine": {**asdict(self.machine), "fills_at_most": FITS},
        }


def make_plan(
    recipe: Recipe,
    facts: RecipeFacts,
    *,
    training_tokens: int | None = None,
    wanted: Wanted | None = None,
) -> Plan:
    """Computes the plan of a checked recipe; both models are built without weights.

    Args:
        recipe: the recipe.
        facts: what `distill.checks.check` found, for as many ranks as the machine has devices.
        training_tokens: tokens of the training text, if it is prepared.
        wanted: the machine; one process on this one, measured for about a second, if None.

    Raises:
        UserError: the devices cannot share a step's sequences evenly.
    """
    wanted = wanted or Wanted()
    teacher = empty_model(facts.config)
    teacher.to(DTYPES[recipe.teacher.dtype])  # type: ignore[arg-type]  # transformers hides nn.Module's signature
    student = empty_model(plan_student(facts.config, keep_attention=facts.kept, **recipe.student.settings()))
    conversion = report(teacher, student)
    sizes = sizes_of(student, recipe.data.block, conversion.parameters_before, conversion.parameters_after)
    devices = machine(wanted, recipe.dtype, sizes.hidden, cpu=recipe.device == "cpu")
    stages = [_plan_stage(recipe, name, sizes, student, devices, training_tokens) for name in recipe.stages.named()]
    return Plan(recipe, conversion, stages, devices, wanted.nothing, facts.weights_found)


def prepared_tokens(recipe: Recipe) -> int | None:
    """Tokens of the training text, if an earlier run has prepared it."""
    folder = recipe.run_dir / "data"
    if recipe.data.images is not None:
        manifest = read_image_manifest(folder)
        return None if manifest is None else manifest.rows[TRAIN] * recipe.data.block
    return Blocks(folder, "train", recipe.data.block).n_tokens if (folder / MANIFEST).is_file() else None


def _plan_stage(
    recipe: Recipe,
    name: StageName,
    sizes: Sizes,
    student: PreTrainedModel,
    machine: Machine,
    training_tokens: int | None,
) -> StagePlan:
    stage = recipe.stages.named()[name]
    sizes = replace(sizes, block=recipe.block_of(stage))
    kept = functools.cache(functools.partial(kept_for_backward, recipe, stage, sizes, student))
    modes = [_place(recipe, stage, mode, sizes, student, kept, machine) for mode in modes_for(stage, machine.devices)]
    fits, tokens = any(placed.fits for placed in modes), modes[0].tokens
    return StagePlan(
        name=name,
        epochs=tokens / training_tokens if training_tokens else None,
        flops=tokens * flops_per_token(sizes, stage),
        modes=modes,
        remedies=[] if fits else list(remedies(recipe, name, sizes, student, machine)),
    )


def _place(
    recipe: Recipe,
    stage: Stage,
    mode: str,
    sizes: Sizes,
    student: PreTrainedModel,
    kept_by: Callable[[int], Kept],
    machine: Machine,
) -> Placed:
    """Memory and time of a stage under one engine."""
    block = recipe.block_of(stage)
    sequences, passes = cut(stage, sharing(mode, machine.devices))
    kept = kept_by(sequences)
    k = numbers(recipe, stage, sizes, student, kept, passes=passes, processes=machine.devices)
    steps = steps_for(stage.tokens, stage.batch_size, block)
    share = k.s if mode == "layers" else RECOMPUTED if _recomputes(stage, mode) else 1.0
    flops = teacher_flops_per_token(sizes, stage) + share * student_flops_per_token(sizes, stage)
    traffic = share * _PASSES * kept.in_all
    tokens = sequences * block
    computing = passes * (tokens * flops / machine.rates.flops + traffic / machine.rates.bytes)
    needed = memory(mode, k)
    return Placed(
        mode=mode,
        steps=steps,
        tokens=steps * stage.batch_size * block,
        memory=needed,
        on_host=round(MODES[mode].on_host(k)),
        fits=machine.fits(needed.total),
        seconds=steps * max(computing, bytes_sent(mode, k) / machine.bandwidth),
    )


def _recomputes(stage: Stage, mode: str) -> bool:
    """Whether the engine computes all of the student's forward twice (`distill.engines.joint`), asked for or not."""
    return mode not in ("one", "layers") and not isinstance(stage, LogitsStage)


def _with_total(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "total": memory.total}
