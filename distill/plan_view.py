"""A plan for people, on one screen."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.conversion_view import cache, layers, parameters, table
from distill.plan import Plan
from distill.units import count, duration, size


def render(plan: Plan) -> RenderableType:
    """Tables of the layers, the parameters, the cache and the stages."""
    recipe, report = plan.recipe, plan.conversion
    title = Text.assemble((recipe.name, "bold"), f": {recipe.teacher.path} into {recipe.run_dir}")
    tables = (parameters(report), cache(report), _stages(plan), _memory(plan))
    return Group(title, layers(report), *tables, _closing(plan))


def _stages(plan: Plan) -> Table:
    grid = table("stage", ["tokens", "steps", "epochs", "operations", "time, about"])
    for stage in plan.stages:
        epochs = "-" if stage.epochs is None else f"{stage.epochs:.3g}"
        grid.add_row(
            stage.name, count(stage.tokens), str(stage.steps), epochs, count(stage.flops), duration(stage.seconds)
        )
    return grid


def _memory(plan: Plan) -> Table:
    grid = table("memory a process", ["weights", "gradients", "optimizer", "activations", "total"])
    for stage in plan.stages:
        m = stage.memory
        grid.add_row(stage.name, *map(size, (m.weights, m.gradients, m.optimizer, m.activations, m.total)))
    return grid


def _closing(plan: Plan) -> Text:
    total = duration(sum(stage.seconds for stage in plan.stages))
    flops, traffic = f"{count(plan.rates.flops)} operations", size(plan.rates.bytes)
    return Text(f"{total} in all, by {flops} and {traffic} a second as just measured on {plan.device}", style="dim")
