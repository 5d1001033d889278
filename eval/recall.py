"""What models can recall from their prompt: synthetic tasks over lengths and numbers of items, side by side.

python -m eval.recall teachers/stdlib-1m runs/quickstart/logits --task phonebook --lengths 128,256 --items 1,2,4
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distill.atomic import explained_full_disk
from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recall import TASKS
from distill.recall.sweep import Cell, Surface, sweep
from distill.recall.tasks import task_named
from eval import options, words
from eval.findings import Fields, Findings, names_of, require_folder, write_findings
from eval.heat_maps import heat_maps
from eval.loading import load_model, questions

NAMES = "; ".join(f"{name}: {task.says}" for name, task in TASKS.items())
KIND = "recall"


@report_user_errors()
def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders: a teacher, students; any order.")],
    task: Annotated[list[str], typer.Option(help=f"May be given again, or all. {NAMES}.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, such as 256,512; shorter ones are filled up. 0: no filling.")
    ] = "0",
    items: Annotated[str, typer.Option(help="Pairs, entries, words, bits or moves, such as 2,4,8.")] = "2,4,8",
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json and a picture TASK.png for each task.")] = Path(
        "runs/recall"
    ),
    surface: Annotated[
        Surface,
        typer.Option(help="text, through the model's tokenizer; or ids, for a model trained on the tasks' own."),
    ] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Examples a cell.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other examples; every model gets the same.")] = 0,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
) -> None:
    """Ask each MODEL for what stands in its prompt, and tell how often it writes it and how often it prefers it.

    The two are not the same: among four choices even a guess is right a quarter of the time, and a model may prefer
    an answer that it would never write. Prompts, choices and answers are drawn from --seed.
    """
    quiet_unless_watched()
    chosen = list(TASKS) if task == ["all"] else list(dict.fromkeys(task))
    for name in chosen:
        task_named(name)
    numbers, sizes = _numbers(items, "--items", 1), _numbers(lengths, "--lengths", 0)
    names = names_of(models)
    require_folder(output)
    found: dict[str, dict[str, list[Cell]]] = {name: {} for name in chosen}
    for name, path in names.items():
        model = load_model(path, device)
        for one in chosen:
            draw = questions(model, path, one, surface, samples=samples, seed=seed)
            found[one][name] = sweep(model, draw, numbers, sizes, batch_size)
            print(_told(one, name, found[one][name]), flush=True)
    _write(output, names, {"surface": surface, "samples": samples, "seed": seed}, found)


def _told(task: str, name: str, cells: list[Cell]) -> str:
    """A table of one task and model."""
    lines = [f"{task}, {name}", "  items  length  written  preferred      gap  log p   rank"]
    for cell in cells:
        length = f"{cell.length}" if cell.length else f"~{cell.tokens:.0f}"
        shares = [words.percent(share) for share in (cell.written, cell.chosen, cell.gap)]
        lines.append(
            f"{cell.items:>7}{length:>8}{shares[0]:>9}{shares[1]:>11}{shares[2]:>9}"
            f"{words.plain(cell.log_probability, 2):>7}{cell.rank:>7.2f}"
        )
    return "\n".join(lines)


def _write(output: Path, models: dict[str, str], settings: Fields, found: dict[str, dict[str, list[Cell]]]) -> None:
    tasks = {task: {name: [asdict(cell) for cell in cells] for name, cells in by.items()} for task, by in found.items()}
    file = write_findings(output, Findings(KIND, models, settings, tasks))
    with explained_full_disk(output):
        for task, by_model in found.items():
            heat_maps(f"{task}: {TASKS[task].says}", by_model, output / f"{task}.png")
    print(f"{file} and {words.listed(list(found), lambda task: f'{task}.png')} beside it")


def _numbers(text: str, option: str, least: int) -> list[int]:
    """Whole numbers between commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option} {text}: give whole numbers from {least} on with commas between them, such as 4,8")
    return sorted({int(part) for part in parts})


if __name__ == "__main__":
    typer.run(main)
