"""What each converted layer of a student does: its scores without what the layer's mixer puts out.

python -m eval.ablation runs/quickstart/logits --teacher teachers/stdlib-1m --text python-stdlib
python -m eval.ablation STUDENT --teacher TEACHER --text corpus/*.jsonl --task associative --task phonebook --items 4

With a teacher also the baseline that nobody trained: the teacher itself with a sliding window and sinks in the layers
where the student has mixers (``distill.windowed``), by default as long as the student's state is large.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from distill.ablation import By, ablated, mean_outputs
from distill.data.pack import tokenizer_hash
from distill.errors import UserError
from distill.evaluation import Batch, evaluate
from distill.layout import ATTENTION, mixer_layers
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recall import TASKS
from distill.recall.sweep import Draw, Surface, sweep
from distill.recall.tasks import task_named
from distill.student import is_student
from distill.window import SINKS
from eval import options, words
from eval.findings import Fields, Findings, names_of, require_folder, write_findings
from eval.loading import Text, load_model, load_tokenizer, questions, read_batches
from eval.sections.ablation import sentences

KIND = "ablation"


@report_user_errors()
def main(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Its folder.")],
    source: options.Source,
    teacher: Annotated[
        str | None, typer.Option(help="The folder of its teacher, for KL, agreement and the baseline.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the baseline's window; as many bytes as the state by default.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that the baseline sees besides.")] = SINKS,
    task: Annotated[
        list[str] | None, typer.Option(help=f"A recall task too: {', '.join(TASKS)}. May be given again.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Of a recall task.")] = 4,
    length: Annotated[int, typer.Option(min=0, help="Tokens of its prompts; 0: no filling.")] = 0,
    surface: Annotated[Surface, typer.Option(help="text, or ids, as for eval.recall.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Its examples.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of its examples.")] = 0,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json.")] = Path("runs/ablation"),
    block: options.Block = 1024,
    batch_size: options.BatchSize = 8,
    tokens: options.Tokens = 32_000,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    device: options.Device = "auto",
) -> None:
    """Score STUDENT as it is and with one after the other of its mixers ablated, all of them, and all its attention.

    A mixer's output is replaced by zeros, and by its own mean over the text. Where neither changes anything, the mixer
    does nothing, and the layers that kept attention do its work.
    """
    quiet_unless_watched()
    tasks = list(dict.fromkeys(task or ()))
    for name in tasks:
        task_named(name)
    baseline = None if teacher is None else _baseline(teacher, student, window, sinks)
    models = names_of([path for path in (student, teacher, baseline) if path is not None])
    require_folder(output)
    if teacher is not None and tokenizer_hash(load_tokenizer(student)) != tokenizer_hash(load_tokenizer(teacher)):
        raise UserError(f"{student} and {teacher} have different tokenizers, so their tokens cannot be compared")
    ours = load_model(student, device)
    _require_mixers(ours, student)
    theirs = None if teacher is None else load_model(teacher, device)
    batches = read_batches(Text(source, block, batch_size, tokens, text_key, separator), student)
    draws = {name: questions(ours, student, name, surface, samples=samples, seed=seed) for name in tasks}

    def scores(model: PreTrainedModel) -> Fields:
        return score(model, theirs, batches, draws, (items, length, batch_size))

    results: Fields = {"layers": ours.config.distill["layers"], "intact": scores(ours), "ablated": []}
    for what, layers, name, by in variants(ours, batches):
        with ablated(ours, layers, by):
            results["ablated"].append({"what": what, "layers": layers, "by": name, **scores(ours)})
        print(f"{what}, by {name}: loss {words.plain(results['ablated'][-1]['loss'], 4)}", flush=True)
    if theirs is not None and baseline is not None:
        results["teacher"] = scores(theirs)
        results["baseline"] = {"name": list(models)[-1], **scores(load_model(baseline, device))}
    print("\n".join(["", *sentences(results)]))
    settings = {"text": list(source), "block": block, "tokens": tokens, "window": window, "sinks": sinks}
    recall = {"tasks": tasks, "items": items, "length": length, "samples": samples, "seed": seed, "surface": surface}
    print(write_findings(output, Findings(KIND, models, settings | (recall if tasks else {}), results)))


def variants(student: PreTrainedModel, batches: Sequence[Batch]) -> Iterator[tuple[str, list[int], str, By]]:
    """What is ablated, the layers, the name of what takes their output's place, and that itself."""
    kinds = student.config.distill["layers"]
    mixers, kept = mixer_layers(student.config), [index for index, kind in enumerate(kinds) if kind == ATTENTION]
    means = mean_outputs(student, range(len(kinds)), batches)
    groups = [(f"layer {index}", [index]) for index in mixers]
    groups += [("all mixers", mixers)] if len(mixers) > 1 else []
    groups += [("all attention", kept)] if kept else []
    for what, layers in groups:
        yield what, layers, "zero", "zero"
        yield what, layers, "mean", means


def score(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    draws: dict[str, Draw],
    cell: tuple[int, int, int],
) -> Fields:
    """Loss, KL and agreement on a text, and the share written in each recall task.

    Args:
        cell: items, length and batch size of the tasks.
    """
    metrics = asdict(evaluate(model, teacher, batches))
    items, length, batch_size = cell
    recall = {}
    for name, draw in draws.items():
        (found,) = sweep(model, draw, [items], [length], batch_size)
        recall[name] = {"written": found.written, "chosen": found.chosen, "log_probability": found.log_probability}
    return {name: metrics[name] for name in ("loss", "kl", "agreement", "tokens")} | (
        {"recall": recall} if recall else {}
    )


def _baseline(teacher: str, student: str, window: int | None, sinks: int) -> str:
    return f"{teacher}@like={student},sinks={sinks}" + ("" if window is None else f",window={window}")


def _require_mixers(model: Any, path: str) -> None:
    if not is_student(model) or not mixer_layers(model.config):
        kind = "has attention in every layer" if is_student(model) else f"is a {type(model).__name__} and no student"
        raise UserError(f"{path} {kind}: there is no mixer to ablate; give a student with at least one")


if __name__ == "__main__":
    typer.run(main)
