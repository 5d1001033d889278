"""The command-line options that the measuring programs share."""

from typing import Annotated, Literal

import typer

Source = Annotated[
    list[str],
    typer.Option("--text", help="What to score: python-stdlib, a file, folder or glob, or dataset:org/name."),
]
Block = Annotated[int, typer.Option(min=2, help="Tokens a sequence; never more than the model's positions.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")]
Tokens = Annotated[int, typer.Option(min=2, help="Score about this many tokens from the beginning of the text.")]
TextKey = Annotated[str, typer.Option(help="The column that holds the text in .jsonl, .parquet and datasets.")]
Separator = Annotated[
    str | None, typer.Option(help="What stands between documents in text files, as $'\\n\\n' in bash.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU when there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")]
