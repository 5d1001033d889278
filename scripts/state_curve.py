"""What a state is worth by its size: students of one teacher whose mixers remember more or fewer numbers.

    python -m scripts.recall_rows
    python -m scripts.state_curve --teacher recall --budget 1M --output runs/states

No layer keeps attention; all students train on the same tokens (`scripts.comparison_runs`). Beside them stands the
teacher, untrained, with a window in all its layers: what the same bytes are worth as keys and values. Writes
results.json, table.md and curve.png into --output; the same command goes on where it was killed. A state narrower than
the teacher's head drops its rotary positions, which need all of a head's columns.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from distill.attention import views
from distill.conversion import load_teacher
from distill.copies import ALIKE
from distill.evaluation import evaluate
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe import load_recipe
from distill.recipe_fields import read_tokens
from distill.run import CONVERT, at_work_on
from distill.student import load_student, state_bytes
from distill.units import size as in_bytes
from distill.windowed import windowed
from scripts.compare_recipes import TEACHERS, teacher_of
from scripts.comparison_pool import carried_out, processes
from scripts.comparison_runs import Common, Wanted, check_all, cut_recipe, prepare, recalled, yaml_text
from scripts.measure import Fields, record

WINDOW = "teacher with a window"
MIXERS = ["discrete_mamba2", "mamba2"]
STATES = [4, 8, 16, 32, 64]
WINDOWS = [8, 16, 32, 64, 128]


@report_user_errors()
def main(
    teacher: Annotated[str, typer.Option(help=f"One of {', '.join(TEACHERS)}, or a recipe that names one.")],
    output: Annotated[Path, typer.Option(help="Folder of all runs and of what they come to.")],
    recipe: Annotated[str, typer.Option(help="As in scripts.compare_recipes.")] = "ours",
    budget: Annotated[str, typer.Option(help="Training tokens of each student over all stages.")] = "1M",
    mixer: Annotated[list[str], typer.Option(help="Kinds of mixers; may be given again.")] = MIXERS,
    state: Annotated[list[int], typer.Option(min=1, help="Numbers a channel; may be given again.")] = STATES,
    window: Annotated[list[int], typer.Option(min=1, help="Tokens that the teacher sees.")] = WINDOWS,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that it sees besides.")] = 4,
    evaluation_tokens: Annotated[str, typer.Option(help="Held-out tokens to score.")] = "32K",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, with one thread each.")] = 1,
) -> None:
    """Train a student for every kind of mixer and size of state, and draw what they keep over their bytes."""
    quiet_unless_watched()
    asked = teacher_of(teacher)
    common = Common(
        teacher=asked.recipe,
        overrides=(),
        keep_attention="[]",
        evaluation_tokens=read_tokens("--evaluation-tokens", evaluation_tokens),
        points=1,
        recall=asked.recall,
        output=output,
    )
    plain = Wanted(recipe, read_tokens("--budget", budget), 1.0, 0)
    check_all(common, [plain])
    path = load_recipe(common.teacher, common.overrides).teacher.path
    head = next(iter(views(load_teacher(path), [0]).values())).head_dim
    sizes = [(kind, size) for kind in mixer for size in sorted(state)]
    wanted = [replace(plain, recipe=_recipe(recipe, kind, size, head)) for kind, size in sizes]
    check_all(common, wanted)
    facts = prepare(common, plain)
    with processes(jobs) as pool:
        results = carried_out(pool, common, wanted)
    points = [_of_student(common, one, result, *size) for one, result, size in zip(wanted, results, sizes, strict=True)]
    points += _of_windows(common, plain, sorted(window), sinks)
    found: Fields = {"teacher": {"name": teacher, **facts}, "points": points}
    record(output / "results.json", found)
    (output / "table.md").write_text(f"{table(found)}\n")
    draw(found, output / "curve.png")
    print(f"{table(found)}\n\n{output}/results.json, table.md, curve.png")


def _recipe(recipe: str, mixer: str, state: int, head: int) -> str:
    rope = "drop" if state < head else "keep"
    copies = " student.expand=1" * (mixer in ALIKE)
    return f"{recipe} student.mixer={mixer} student.state_dim={state} student.rope={rope}{copies}"


def _of_student(common: Common, wanted: Wanted, result: Fields, kind: str, size: int) -> Fields:
    """What it remembers is known before it is trained, so also of one that failed."""
    student = load_student(wanted.folder(common.output) / CONVERT)
    failed = {"failed": result["failed"]} if "failed" in result else {}
    return {"kind": kind, "size": size, "bytes": state_bytes(student), **_worth(result), **failed}


def _of_windows(common: Common, wanted: Wanted, sizes: list[int], sinks: int) -> list[Fields]:
    """The teacher with each window, measured on the text that the students were."""
    points = []
    path, settings = cut_recipe(common, wanted)
    with at_work_on(path, [*settings, f"run_dir={yaml_text(common.output)}"]) as run:
        layers = list(range(run.teacher.config.get_text_config().num_hidden_layers))
        heads = [(attention.n_kv_heads, attention.head_dim) for attention in views(run.teacher, layers).values()]
        a_token = run.teacher.dtype.itemsize * sum(2 * number * width for number, width in heads)
        for size in sizes:
            model = windowed(run.teacher, layers, window=size, sinks=sinks)
            metrics = evaluate(model, run.teacher, run.held_out())
            recall = recalled(model) if common.recall else None
            worth = _worth({"loss": metrics.loss, "kl": metrics.kl, "agreement": metrics.agreement, "recall": recall})
            points.append({"kind": WINDOW, "size": size, "bytes": a_token * (size + sinks), **worth})
    return points


def _worth(result: Fields) -> Fields:
    return {name: result.get(name) for name in ("loss", "kl", "agreement", "recall")}


def table(found: Fields) -> str:
    """Markdown, a row for each model."""
    teacher = found["teacher"]
    recall = teacher["recall"] is not None
    head = ["", "size", "bytes a sequence", "gap, nats", "KL", "top-1", *["recall"] * recall]
    rows = [
        [
            point["kind"],
            str(point["size"]),
            in_bytes(point["bytes"]),
            *(["failed"] * (3 + recall) if "failed" in point else _numbers(point, teacher["loss"], recall)),
        ]
        for point in found["points"]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _numbers(point: Fields, teacher_loss: float, recall: bool) -> list[str]:
    numbers = [f"{point['loss'] - teacher_loss:.3f}", f"{point['kl']:.3f}", f"{point['agreement']:.1%}"]
    return [*numbers, f"{point['recall']:.1%}"] if recall else numbers


def draw(found: Fields, path: Path) -> None:
    """Recall, if there is any, and KL to the teacher over bytes; a line for each kind, without what failed."""
    points = [point for point in found["points"] if "failed" not in point]
    shown = [("kl", "KL to the teacher, nats a token"), ("recall", "answers written")]
    shown = [(name, label) for name, label in shown if name == "kl" or found["teacher"][name] is not None]
    figure = Figure(figsize=(5.5 * len(shown), 4.2), layout="constrained")
    for ax, (name, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for kind in dict.fromkeys(point["kind"] for point in points):
            line = [(point["bytes"], point[name]) for point in points if point["kind"] == kind]
            ax.plot(*zip(*sorted(line), strict=True), marker="o", label=kind)
        ax.set(xscale="log", xlabel="bytes a sequence, at any length", ylabel=label)
        ax.set_yscale("log" if name == "kl" else "linear")
        ax.grid(True, which="both", alpha=0.2)
        ax.legend(fontsize="small")
    figure.suptitle(f"{found['teacher']['name']}: what all layers remember, without attention")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
