"""What would make a stage fit that fits nowhere: changes to the recipe, to the engine, to the number of devices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from distill.costs import Sizes, cut, kept_for_backward
from distill.machine import Machine
from distill.memory import MODES, memory, modes_for, numbers
from distill.recipe import LogitsStage, Recipe, StageName

_OFFLOAD = "zero3_offload"
_MOST_DEVICES = 1024


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
    """Changes of the recipe one on top of the other until the stage fits; then offload or more devices, if it must."""
    stage = recipe.stages.named()[name]
    sequences, _ = cut(stage, machine.devices)
    kept = kept_for_backward(recipe, stage, sizes, student, sequences)

    def tried(change: str, devices: int = machine.devices, modes: Sequence[str] | None = None) -> Remedy:
        k = numbers(recipe, stage, sizes, kept, passes=1, processes=devices)
        totals = {mode: memory(mode, k).total for mode in modes or modes_for(stage, devices)}
        mode = min(totals, key=totals.__getitem__)
        return Remedy(change, mode, totals[mode], round(MODES[mode].on_host(k)), machine.fits(totals[mode]))

    if sequences > 1:
        sequences = 1
        kept = kept_for_backward(recipe, stage, sizes, student, sequences)
        yield (remedy := tried("one sequence a forward pass (batch_size: 1)"))
        if remedy.fits:
            return
    if recipe.teacher.dtype == "float32":
        recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": "bfloat16"})})
        kept = kept_for_backward(recipe, stage, sizes, student, sequences)
        yield (remedy := tried("teacher: {dtype: bfloat16}"))
        if remedy.fits:
            return
    if isinstance(stage, LogitsStage):
        kept = kept_for_backward(recipe, stage, sizes, student, sequences, checkpointing=True)
        yield (remedy := tried("gradient checkpointing (not in recipes yet)"))
        if remedy.fits:
            return
    yield tried("weights and optimizer on the host", modes=[_OFFLOAD])
    devices = machine.devices
    while devices < _MOST_DEVICES:
        devices *= 2
        if (remedy := tried(f"instead {devices} devices", devices)).fits:
            yield remedy
            return
