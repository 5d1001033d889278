"""What tuning on a narrow text costs a student elsewhere, without a teacher and beside one (docs/experiments.md).

    python -m scripts.forgetting runs/stories260k/logits tinyshakespeare.txt tinystories.txt TEACHER --steps 100

The last tenth of both texts is never trained on; what is printed are losses there, before and after tuning on the rest
of the first text.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.finetuning.job import open_job
from distill.finetuning.recipe import FinetuneRecipe
from distill.finetuning.trainer import tune
from distill.programs import report_user_errors
from distill.student import load_model

BLOCK = 256


@report_user_errors()
def main(
    model: Annotated[Path, typer.Argument(help="A student's folder.")],
    narrow: Annotated[Path, typer.Argument(help="The text that is tuned on.")],
    general: Annotated[Path, typer.Argument(help="A text of the kind that the student knows.")],
    teacher: Annotated[Path, typer.Argument(help="Whose predictions are mixed in.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps a run.")] = 100,
    weight: Annotated[list[float] | None, typer.Option(help="Of the teacher; may be given again.")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate, of all weights.")] = 1e-3,
) -> None:
    """Print a table: a line before tuning, and one for every weight."""
    torch.set_num_threads(1)
    rest, held_out = divided(narrow)
    _, elsewhere = divided(general)
    print(f"| teacher's weight, {steps} steps | loss on what is tuned on | loss on what was known |")
    print("|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rest.txt")
        source.write_text(rest, encoding="utf-8")
        show("before", model, held_out, elsewhere)
        for share in weight or [0.0, 0.5]:
            recipe = FinetuneRecipe.model_validate(
                {
                    "name": "forgetting",
                    "run_dir": f"{folder}/{share}",
                    "model": str(model),
                    "method": "full",
                    "device": "cpu",
                    "data": {"source": str(source), "format": "text", "separator": "\n\n", "max_length": BLOCK},
                    "training": {"steps": steps, "batch_size": 4, "lr": lr},
                    "teacher": {"path": str(teacher), "weight": share} if share else None,
                }
            )
            job = open_job(recipe)
            tune(job)
            show(f"{share:g}", job.folder, held_out, elsewhere)


def divided(path: Path) -> tuple[str, str]:
    """A text without the last tenth of its characters, and these.

    Raises:
        UserError: there is no such text, or too little of it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file in UTF-8") from error
    tenth = len(text) // 10
    if not tenth:
        raise UserError(f"{path} has {len(text)} characters, too few to hold a tenth out; give a longer text")
    return text[:-tenth], text[-tenth:]


def show(name: str, folder: Path, narrow: str, general: str) -> None:
    model, tokenizer = load_model(folder).eval(), AutoTokenizer.from_pretrained(folder)
    print(f"| {name} | {loss(model, tokenizer, narrow):.3f} | {loss(model, tokenizer, general):.3f} |", flush=True)


@torch.no_grad()
def loss(model: Any, tokenizer: Any, text: str, most: int = 96) -> float:
    """A mean over the tokens of ``most`` blocks; raises UserError where the text is shorter than one."""
    ids_T = torch.tensor(tokenizer(text)["input_ids"])
    ids_BT = ids_T[: min(most, len(ids_T) // BLOCK) * BLOCK].view(-1, BLOCK)
    if not len(ids_BT):
        raise UserError(f"a tenth of a text is {len(ids_T)} tokens, less than one block of {BLOCK}; give a longer text")
    total = 0.0
    for part_BT in ids_BT.split(16):
        logits_NV = model(part_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits_NV, part_BT[:, 1:].flatten(), reduction="sum"))
    return total / ids_BT[:, 1:].numel()


if __name__ == "__main__":
    typer.run(main)
