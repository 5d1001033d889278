"""Which heads of a teacher look things up, and so might keep attention beside a mixer (`student.keep_heads`).

    python -m scripts.rank_heads teachers/recall --surface ids --task associative --task phonebook --items 12 --keep 2
    python -m scripts.rank_heads teachers/stdlib-1m --keep 4

Each head alone is made to see no more than a mixer's convolution does, and the tasks are asked again; without a task,
repeated random tokens are.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from distill.decoding import ends_of
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recall import TASKS
from distill.recall.sweep import Surface
from distill.recall.tasks import task_named
from distill.selection.heads import REACH, Ask, Found, Head, asking_recall, asking_repeated, most_missed, rank_heads
from distill.writing import check_length
from eval.loading import load_model, questions
from scripts.measure import record, require_file, show

REPETITIONS = 128  # tokens of a row, unless --length says otherwise


@report_user_errors()
def main(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Its folder, or its id on the Hub.")],
    task: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(TASKS)}; may be given again. None: repeated tokens.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Of every task.")] = 8,
    length: Annotated[
        int,
        typer.Option(min=0, help=f"Tokens of prompts (0: no filling), or of rows of repetitions (0: {REPETITIONS})."),
    ] = 0,
    surface: Annotated[Surface, typer.Option(help="text, or ids for a teacher trained on the tasks' own.")] = "text",
    samples: Annotated[int, typer.Option(min=1, help="Examples of each task, or rows.")] = 32,
    keep: Annotated[int, typer.Option(min=1, help="How many heads to name for keep_heads.")] = 1,
    reach: Annotated[int, typer.Option(min=0, help="Tokens that a head still sees; 0 silences it.")] = REACH,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the ranking here, as JSON.")] = None,
) -> None:
    """Rank all heads by what is lost where each sees no further."""
    quiet_unless_watched()
    require_file(output)
    names = list(dict.fromkeys(task or ()))
    for name in names:
        task_named(name)
    model = load_model(teacher, device)
    if names:
        check_length(model, length)
        examples = [
            one
            for name in names
            for one in questions(model, teacher, name, surface, samples=samples, seed=seed)(items, length)
        ]
        ask = asking_recall(examples)
    else:
        ask = _repetitions(model, samples, length or REPETITIONS, seed)
    intact, ranking = rank_heads(model, ask, reach=reach)
    chosen = most_missed(ranking, keep)
    columns = ("layer", "head", "lost, nats", *["written"] * bool(names))
    show(f"heads of {teacher}", columns, map(_row, ranking))
    setting = ", ".join(f"{layer}: {heads}" for layer, heads in chosen.items())
    print(f"\nall heads: log p {intact.log_probability:.3f}" + (f", written {_written(intact)}" if names else ""))
    print(f"student: {{keep_heads: {{{setting}}}}}     # {keep} of {len(ranking)}, {keep / len(ranking):.1%}")
    if output:
        heads = [asdict(one) for one in ranking]
        record(
            output,
            {"teacher": teacher, "tasks": names, "reach": reach, "seed": seed, "heads": heads, "keep_heads": chosen},
        )


def _repetitions(model: PreTrainedModel, rows: int, length: int, seed: int) -> Ask:
    """Any id of the vocabulary but the special ones."""
    check_length(model, length)
    config = model.config.get_text_config()
    special = _special(model)
    ids = [one for one in range(config.vocab_size) if one not in special]
    return asking_repeated(ids, rows=rows, length=length, bos=config.bos_token_id, seed=seed)


def _special(model: PreTrainedModel) -> set[int | None]:
    """Ids that begin, end and fill a text, of which each may be several."""
    config = model.config.get_text_config()
    given = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    return {*ends_of(model), *(one for ids in given for one in (ids if isinstance(ids, list) else [ids]))}


def _row(one: Head) -> tuple[str, ...]:
    lost = f"{round(one.lost, 3) + 0.0:+.3f}"  # no -0.000
    return str(one.layer), str(one.head), lost, *([] if one.without.written is None else [_written(one.without)])


def _written(found: Found) -> str:
    return f"{found.written:.0%}"


if __name__ == "__main__":
    typer.run(main)
