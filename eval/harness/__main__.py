"""Tasks of lm-evaluation-harness on students and teachers, side by side.

python -m eval.harness teachers/stdlib-1m runs/quickstart/logits --task recall --task text_perplexity --items 2
accelerate launch --config_file recipes/launch/ddp.yaml --num_processes 2 -m eval.harness ...     requests divided
"""

import importlib.util
import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from distill.engines import processes
from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors
from eval import options, words
from eval.findings import Findings, names_of, require_folder, write_findings

if TYPE_CHECKING:
    from eval.harness.scores import Score

KIND = "harness"


@report_user_errors()
def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders: a teacher, students; any order.")],
    task: Annotated[list[str], typer.Option(help="A task, tag or group; may be given several times.")],
    tasks_from: Annotated[
        list[Path] | None, typer.Option(help="Folders with task files of your own, beside this project's.")
    ] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Of the recall tasks: pairs, entries, words, …")] = None,
    length: Annotated[int | None, typer.Option(min=0, help="Of their prompts, in the model's tokens.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Questions drawn for each of them.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="They are drawn from.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the tasks, such as text=corpus/*.txt.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many questions of each task.")] = None,
    batch_size: options.BatchSize = 8,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the longest request; by default the model's positions.")
    ] = None,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json.")] = Path("runs/harness"),
    device: options.Device = "auto",
) -> None:
    """Run lm-evaluation-harness tasks on each MODEL: the local ones, which download nothing, and the harness's own.

    Local: recall and recall_written (docs/recall.md), text_perplexity.
    """
    quiet_unless_watched()
    _require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here, several times a task
    # The harness takes seconds to import, which a mistake above need not wait for.
    from eval.harness.model import DistillLM
    from eval.harness.names import manager_of
    from eval.harness.scores import require_data, scores

    names, chosen, folders = names_of(models), list(dict.fromkeys(task)), list(tasks_from or ())
    require_folder(output)
    asked = {"items": items, "length": length, "samples": samples, "seed": seed}
    given = {key: value for key, value in asked.items() if value is not None} | _values(metadata or ())
    managers = {name: manager_of(chosen, folders, given | {"tokenizer": path}) for name, path in names.items()}
    for manager in managers.values():
        require_data(chosen, manager)
    found: dict[str, dict[str, Score]] = {}
    for name, path in names.items():
        lm = DistillLM(path, device=None if device == "auto" else device, max_length=max_length, batch_size=batch_size)
        processes.together(partial(_require_room, lm.max_length, length, path))
        if one := scores(lm, chosen, managers[name], limit):
            found[name] = one
            print(_told(name, one), flush=True)
    if processes.rank() == 0:
        settings = {
            "tasks": chosen,
            "tasks_from": [str(folder) for folder in folders],
            "metadata": given,
            "limit": limit,
            "batch_size": batch_size,
            "max_length": max_length,
        }
        print(write_findings(output, Findings(KIND, names, settings, _by_task(found))))


def _by_task(found: "dict[str, dict[str, Score]]") -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for by_task in found.values() for task in by_task))
    return {task: {model: asdict(by_task[task]) for model, by_task in found.items()} for task in tasks}


def _told(model: str, found: "dict[str, Score]") -> str:
    lines = [model]
    for task, score in found.items():
        values = ", ".join(f"{name} {words.plain(value, 4)}" for name, value in score.metrics.items())
        lines.append(f"  {task:<28} {values}  ({score.samples:,} asked)")
    return "\n".join(lines)


def _values(pairs: "list[str] | tuple[str, ...]") -> dict[str, Any]:
    """KEY=VALUE, the value as YAML reads it; what is no YAML, such as ``*.txt``, is text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        if not given:
            raise UserError(f"--metadata {pair}: give KEY=VALUE, such as text=corpus/*.txt")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[key] = value
    return found


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'distill-ssm[eval]', or lm-eval")


def _require_room(most: int, length: int | None, path: str) -> None:
    """The harness itself would cut the beginnings of longer prompts, where the answers may stand."""
    if length is not None and length > most:
        raise UserError(
            f"--length {length}: {path} has only {most} positions; give a smaller length, or --max-length to go beyond"
        )


if __name__ == "__main__":
    typer.run(main)
