"""Before anything else, if you like: the teacher writes text for its student to train on.

    python -m stages.write recipe.yaml --tokens 4M --output written.jsonl
    python -m stages.run recipe.yaml data.training_only=written.jsonl

Documents begin with BOS alone, or with ``--prompt-tokens`` of a training document, never of a held-out one. Whenever it
is killed, the same command goes on. What the recipe says of ``data.training_only`` is not read: it may name the very
text that is to be written.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distill.data.recipe_text import recipe_text
from distill.engines import processes
from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recipe_fields import read_tokens
from distill.run import Run, open_run
from distill.writing import Writing, beginnings_of_training_documents, write_documents
from stages.command import Overrides, RecipePath


def main(
    recipe: RecipePath,
    overrides: Overrides = None,
    tokens: Annotated[str, typer.Option(help="How much text is enough, such as 4M.")] = "1M",
    output: Annotated[Path, typer.Option(help="Where it goes: a .jsonl file.")] = Path("written.jsonl"),
    length: Annotated[int | None, typer.Option(help="Tokens a document at most; data.block unless given.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Begin with so many tokens of a training document.")] = 0,
    temperature: Annotated[float, typer.Option(help="1 draws from the teacher's own predictions.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Documents at once; another number writes others.")] = 64,
) -> None:
    """Let a recipe's teacher write text for its student to train on."""
    quiet_unless_watched()
    with report_user_errors():
        run = open_run(recipe, [*(overrides or []), "data.training_only=[]"])
        wanted = read_tokens("--tokens", tokens)
        writing = Writing(length or run.recipe.data.block, prompt_tokens, temperature, top_p, seed, batch_size)
        rows, beginning = _rows(run, writing, wanted)
        written = write_documents(
            run.teacher,
            run.tokenizer,
            rows,
            writing,
            output,
            tokens=wanted,
            key=run.recipe.data.text_key,
            identity=f"{run.origin.sha256} {run.recipe.teacher.dtype}",
        )
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"{output}: {written.tokens:,} tokens in {written.documents:,} documents, {beginning}\n"
            f"{written.ended / written.documents:.1%} were ended by the teacher, the others cut at {writing.length}"
            f" tokens; {written.drawn_as_encoded / written.documents:.1%} encode to the ids that were drawn"
        )


def _rows(run: Run, writing: Writing, tokens: int) -> tuple[list[list[int]], str]:
    """What documents begin with, as ids and in words."""
    if processes.world() > 1:
        raise UserError("text is written by one process; start it with python -m stages.write")
    data, bos = run.recipe.data, run.tokenizer.bos_token_id
    if data.images is not None:
        raise UserError("data.images: text is written by teachers of text alone")
    if not writing.prompt_tokens:
        if bos is None:
            raise UserError("the teacher's tokenizer has no BOS to begin with; give --prompt-tokens")
        return [[bos]], "begun from nothing"
    number = -(-tokens // (writing.length - writing.prompt_tokens)) + writing.batch_size
    rows = beginnings_of_training_documents(recipe_text(data), run.tokenizer, number, writing.prompt_tokens, data.bos)
    return rows, f"begun with {writing.prompt_tokens} tokens of {len(rows):,} training documents"


if __name__ == "__main__":
    typer.run(main)
