"""A plan for people: on one screen for this machine, and for many devices a table of engines for every stage."""

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.conversion_view import cache, layers, parameters, table
from distill.machine import FITS, Machine
from distill.memory import Memory
from distill.plan import Placed, Plan, StagePlan
from distill.units import count, duration, size

WIDTH = 100
"""Columns that the widest table takes."""

_PARTS = ("teacher", "student", "gradients", "optimizer", "activations", "working")


def render(plan: Plan) -> RenderableType:
    """Tables of the layers, the parameters, the cache and the stages."""
    return Group(*_head(plan), *(_on_this_machine(plan) if plan.simple else _on_devices(plan)))


def _head(plan: Plan) -> Iterator[RenderableType]:
    recipe, report = plan.recipe, plan.conversion
    yield Text.assemble((recipe.name, "bold"), f": {recipe.teacher.path} into {recipe.run_dir}")
    if not plan.weights_found:
        yield Text("weights not found: planned from the config alone", style="yellow")
    yield layers(report)
    if recipe.student.exportable:
        yield Text(f"exportable: {recipe.student.exportable} (checked)")
    yield from (parameters(report), cache(report))


def _on_this_machine(plan: Plan) -> Iterator[RenderableType]:
    grid = table("stage", ["tokens", "steps", "epochs", "operations", "time, about"])
    memory = table("memory a process", [*_PARTS, "total"])
    for stage in plan.stages:
        epochs, best = "-" if stage.epochs is None else f"{stage.epochs:.3g}", stage.best
        numbers = (count(best.tokens), str(best.steps), epochs, count(stage.flops), duration(best.seconds))
        grid.add_row(stage.name, *numbers)
        memory.add_row(stage.name, *map(size, _parts(best.memory)))
    total = duration(sum(stage.best.seconds for stage in plan.stages))
    yield from (grid, memory, Text(f"{total} in all, by {_speed(plan.machine)}", style="dim"))


def _on_devices(plan: Plan) -> Iterator[RenderableType]:
    machine = plan.machine
    yield _machine(machine)
    if machine.devices == 1:
        yield Text()
        yield _memory("stage", [(stage.name, stage.best, stage.fits) for stage in plan.stages])
    for stage in plan.stages:
        if machine.devices > 1:
            yield Text()
            yield _memory(stage.name, [(_dot(stage, placed), placed, placed is stage.best) for placed in stage.modes])
        if not stage.fits:
            yield from _what_would_help(stage, machine)
    yield Text()
    yield _stages(plan)
    yield Text()
    if machine.devices > 1:
        yield _launch(plan)
    yield Text(_assumed(machine), style="dim")


def _machine(machine: Machine) -> Text:
    devices = f"{machine.devices} × {machine.name}" if machine.devices > 1 else f"one {machine.name}"
    memory = "" if machine.memory is None else f", {size(machine.memory)} each"
    price = "" if machine.price is None else f", {machine.price:g} an hour each"
    return Text.assemble(("\n" + devices, "bold"), memory, price)


def _memory(title: str, rows: list[tuple[str, Placed, bool]]) -> Table:
    """What each row's engine takes, all in one unit, so that numbers can be compared at a glance.

    Args:
        rows: a name, the engine, and whether it is the one to use, if it fits.
    """
    unit, name = _unit(max(placed.memory.total for _, placed, _ in rows))
    grid = table(f"{title}, {name}", [*_PARTS, "total", "fits", "tokens/day"])
    for label, placed, chosen in rows:
        numbers = (_three_digits(part / unit) for part in _parts(placed.memory))
        style = "dim" if not placed.fits else "bold" if chosen else ""
        grid.add_row(label, *numbers, _yes(placed.fits), count(placed.tokens_a_day), style=style)
    return grid


def _what_would_help(stage: StagePlan, machine: Machine) -> Iterator[RenderableType]:
    assert machine.memory is not None
    least = f"{size(stage.best.memory.total)} ({stage.best.mode})"
    yield Text(f"{stage.name} does not fit: it takes at least {least} of {size(FITS * machine.memory)}", style="red")
    grid = table("what would help, each on top of the last", ["", "a device", "fits"])
    for remedy in stage.remedies:
        host = f", {size(remedy.on_host)} on the host" if remedy.on_host else ""
        grid.add_row(remedy.change, remedy.mode, size(remedy.total) + host, _yes(remedy.fits))
    yield grid


def _stages(plan: Plan) -> Table:
    """What the stages take, each under the first engine that it fits under; dashes where there is none."""
    priced = plan.machine.price is not None
    columns = ["mode", "tokens", "steps", "operations", "tokens/day", "time, about", "device-hours"]
    grid = table("stage", [*columns, "cost"] if priced else columns)
    for stage in plan.stages:
        best = stage.best
        taken = [count(best.tokens_a_day), *_taken(plan, [stage])] if stage.fits else ["-"] * (3 + priced)
        mode = best.mode if stage.fits else "-"
        grid.add_row(stage.name, mode, count(best.tokens), str(best.steps), count(stage.flops), *taken)
    if len(plan.stages) > 1 and all(stage.fits for stage in plan.stages):
        tokens, flops = (sum(column) for column in zip(*((s.best.tokens, s.flops) for s in plan.stages), strict=True))
        grid.add_row("all", "", count(tokens), "", count(flops), "", *_taken(plan, plan.stages), style="bold")
    return grid


def _taken(plan: Plan, stages: Iterable[StagePlan]) -> list[str]:
    """Time, device-hours and, with a price, cost."""
    seconds = sum(stage.best.seconds for stage in stages)
    hours, price = seconds / 3600 * plan.machine.devices, plan.machine.price
    return [duration(seconds), f"{hours:,.0f}", *([] if price is None else [f"{hours * price:,.0f}"])]


def _launch(plan: Plan) -> Text:
    command = f"accelerate launch --num_processes {plan.machine.devices} --config_file recipes/launch/"
    engines = plan.engines_for_all()
    if engines:
        return Text(f"All stages fit under {engines[0]}:\n  {command}{engines[0]}.yaml -m stages.run RECIPE")
    if any(stage.fits for stage in plan.stages):
        return Text(f"One stage alone:\n  {command}MODE.yaml -m stages.STAGE RECIPE")
    return Text("Nothing fits as it is.")


def _assumed(machine: Machine) -> str:
    lines = [
        f"A device is filled to {FITS:.0%}. Working space: gathered layers, bfloat16 copies of weights, buckets.",
        f"A device computes {_speed(machine)}",
        f"and sends {machine.bandwidth / 1e9:g} GB a second at the same time; the longer of both counts.",
        "Evaluation, checkpoints and preparation come on top.",
    ]
    if machine.devices > 1:
        lines.append("layers: parallel: layers in the recipe, launched with ddp.yaml.")
    return "\n".join([*lines, "All by formula: docs/planning.md"])


def _speed(machine: Machine) -> str:
    speed = f"{count(machine.rates.flops)} operations and {size(machine.rates.bytes)} a second"
    return f"{speed} {machine.origin}"


def _dot(stage: StagePlan, placed: Placed) -> str:
    return f"{'●' if placed.fits and placed is stage.best else '○'} {placed.mode}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _parts(memory: Memory) -> list[int]:
    return [*(getattr(memory, part) for part in _PARTS), memory.total]


def _unit(n_bytes: float) -> tuple[int, str]:
    """The unit that the largest number of a table is given in."""
    return (2**30, "GiB") if n_bytes >= 2**30 else (2**20, "MiB")


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}"
