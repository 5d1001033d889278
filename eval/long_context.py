"""How well models predict far beyond the length they were trained on: loss by position in real long documents.

python -m eval.long_context teachers/stdlib-1m runs/quickstart/logits --text python-stdlib --trained 512 --up-to 16
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from distill.by_position import CHUNK, Bucket, by_context, by_position, contexts_for, edges_for, longest_context, losses
from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors
from eval import options, words
from eval.findings import Fields, Findings, names_of, require_folder, write_findings
from eval.loading import load_model, load_tokenizer
from eval.long_documents import long_documents

KIND = "long_context"
LAST = 256  # tokens whose loss is measured from less and more context


@report_user_errors()
def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders: a teacher, students; any order.")],
    source: options.Source,
    trained: Annotated[int, typer.Option(min=2, help="Tokens of the blocks that the models were trained on.")],
    up_to: Annotated[int, typer.Option(min=1, help="Measure up to so many times that length.")] = 16,
    documents: Annotated[int, typer.Option(min=1, help="Read so many documents, each from its beginning.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a forward pass.")] = CHUNK,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json.")] = Path("runs/long_context"),
    device: options.Device = "auto",
) -> None:
    """Feed whole documents of --trained × --up-to tokens to each MODEL and tell the loss by position.

    Every document is one sequence, read through the model's own cache. A teacher with rotary positions is measured
    beyond what it was trained on too; one that has learned a vector for each position ends with them.
    """
    quiet_unless_watched()
    names, longest = names_of(models), trained * up_to
    require_folder(output)
    first = next(iter(names.values()))
    texts = long_documents(
        source, load_tokenizer(first), longest + 1, documents, text_key=text_key, separator=separator
    )
    print(f"{len(texts)} documents of {longest:,} tokens: {words.listed(list(texts))}", flush=True)
    found: Fields = {}
    vocabulary: int | None = None
    for name, path in names.items():
        model = load_model(path, device)
        size = model.config.get_text_config().vocab_size
        if size != (vocabulary := vocabulary or size):
            raise UserError(f"{first} predicts {vocabulary} tokens and {path} {size}: they cannot read the same ids")
        found[name] = _measured(model, list(texts.values()), trained, longest, chunk)
        print(_told(name, found[name], trained), flush=True)
    settings = {
        "source": list(source),
        "documents": list(texts),
        "trained": trained,
        "up_to": up_to,
        "longest": longest,
        "last": _last(longest),
    }
    print(write_findings(output, Findings(KIND, names, settings, found)))


def _measured(model: PreTrainedModel, texts: list[list[int]], trained: int, longest: int, chunk: int) -> Fields:
    limit = longest_context(model)
    reach = min(longest, limit or longest)
    edges = [edge for edge in edges_for(trained, longest) if edge < reach] + [reach]
    buckets = by_position([losses(model, ids[: reach + 1], chunk) for ids in texts], edges)
    last = _last(longest)
    contexts = [size for size in contexts_for(trained, longest - last) if size + last <= reach]
    return {
        "limit": limit,
        "buckets": [asdict(bucket) for bucket in buckets],
        "by_context": [list(pair) for pair in by_context(model, texts, contexts, last, chunk)],
    }


def _last(longest: int) -> int:
    return min(LAST, longest // 4)


def _told(name: str, found: Fields, trained: int) -> str:
    """A model's losses, a line a bucket."""
    lines = [f"{name}{_ends(found['limit'])}", "  context          loss"]
    for bucket in (Bucket(**fields) for fields in found["buckets"]):
        beyond = f"  {words.times(bucket.to / trained)} the length trained on" if bucket.to > trained else ""
        lines.append(f"  up to {bucket.to:>6,}{words.plain(bucket.loss, 4):>9}{beyond}")
    return "\n".join(lines)


def _ends(limit: int | None) -> str:
    return f": knows {limit:,} positions and cannot read further" if limit else ""


if __name__ == "__main__":
    typer.run(main)
