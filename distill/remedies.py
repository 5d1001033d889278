"""What would make a stage fit that fits nowhere: changes to the recipe, to the engine, to the number of devices."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from distill.costs import Sizes, cut, kept_for_backward
from distill.machine import Machine
from distill.memory import MODES, memory, modes_for, numbers, sharing
from distill.recipe import LogitsStage, Recipe, StageName

_OFFLOAD = "zero3_offload"
_MOST_DEVICES = 1024


_Change = tuple[str, Recipe]


@dataclass(frozen=True)
class Remedy:
    """A change, made on top of those before it, and how much the smallest engine then takes.

    Attributes:
        change: in words.
        total: bytes of a device.
        on_host: bytes of the host's memory for each device.
    """

    change: str
    mode: str
    total: int
    on_host: int
    fits: bool


def remedies(
    recipe: Recipe, name: StageName, sizes: Sizes, student: PreTrainedModel, machine: Machine
) -> Iterator[Remedy]:
    """Changes of the recipe one on top of the other until the stage fits; then offload or more devices, if it must.

    What leaves the result as it is comes first: fewer sequences at a time, then computing layers again.
    """

    def tried(change: _Change, devices: int = machine.devices, modes: Sequence[str] = ()) -> Remedy:
        said, changed = change
        stage = changed.stages.named()[name]
        kept = functools.cache(functools.partial(kept_for_backward, changed, stage, sizes, student))
        found = []
        for mode in modes or modes_for(stage, devices):
            sequences, passes = cut(stage, sharing(mode, devices))
            k = numbers(changed, stage, sizes, student, kept(sequences), passes=passes, processes=devices)
            total = memory(mode, k).total
            found.append(Remedy(said, mode, total, round(MODES[mode].on_host(k)), machine.fits(total)))
        return min(found, key=lambda remedy: remedy.total)

    for kind in (_fewer_at_a_time, _data_in_parallel, _layers_computed_again, _smaller_teacher):
        remedy = None
        for change in kind(recipe, name, machine.devices):
            remedy, recipe = tried(change), change[1]
            if remedy.fits:
                break
        if remedy:
            yield remedy
            if remedy.fits:
                return
    yield tried(("weights and optimizer on the host", recipe), modes=[_OFFLOAD])
    devices = machine.devices
    while devices < _MOST_DEVICES:
        devices *= 2
        if (remedy := tried(_shared(f"instead {devices} devices", recipe, name, devices), devices)).fits:
            yield remedy
            return


def _fewer_at_a_time(recipe: Recipe, name: StageName, devices: int) -> Iterator[_Change]:
    """Half as many sequences a forward pass, and half of these, down to one."""
    stage = recipe.stages.named()[name]
    sequences, _ = cut(stage, sharing(modes_for(stage, devices)[0], devices))
    while sequences > 1:
        sequences //= 2
        yield f"micro_batch_size: {sequences}", _with(recipe, name, micro_batch_size=sequences)


def _data_in_parallel(recipe: Recipe, name: StageName, devices: int) -> Iterator[_Change]:
    if modes_for(recipe.stages.named()[name], devices) == ["layers"]:
        yield _shared("parallel: data", _with(recipe, name, parallel="data"), name, devices)


def _layers_computed_again(recipe: Recipe, name: StageName, devices: int) -> Iterator[_Change]:
    stage = recipe.stages.named()[name]
    if isinstance(stage, LogitsStage) and not stage.gradient_checkpointing:
        yield "gradient_checkpointing: true", _with(recipe, name, gradient_checkpointing=True)


def _smaller_teacher(recipe: Recipe, name: StageName, devices: int) -> Iterator[_Change]:
    if recipe.teacher.dtype == "float32":
        teacher = recipe.teacher.model_copy(update={"dtype": "bfloat16"})
        yield "teacher: {dtype: bfloat16}", recipe.model_copy(update={"teacher": teacher})


def _shared(said: str, recipe: Recipe, name: StageName, devices: int) -> _Change:
    """A change to so many devices, with the next batch size that they can share if they cannot share the recipe's."""
    stage = recipe.stages.named()[name]
    ranks = sharing(modes_for(stage, devices)[0], devices)
    batch_size = -(-stage.batch_size // ranks) * ranks
    if batch_size == stage.batch_size:
        return said, recipe
    return f"{said}, batch_size: {batch_size}", _with(recipe, name, batch_size=batch_size)


def _with(recipe: Recipe, name: StageName, **settings: object) -> Recipe:
    """The recipe with other settings of one stage."""
    stage = recipe.stages.named()[name].model_copy(update=settings)
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={name: stage})})
