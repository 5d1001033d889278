"""How alike a student and its teacher are on a text, and in which layers they part.

python -m eval.agreement runs/quickstart/logits teachers/stdlib-1m --text python-stdlib
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from distill.data.pack import tokenizer_hash
from distill.errors import UserError
from distill.evaluation import Metrics, evaluate, layer_distances, perplexity, perplexity_ratio
from distill.evaluation_record import json_numbers
from distill.programs import report_user_errors
from eval import options, words
from eval.loading import Text, load_model, load_tokenizer, read_batches


@report_user_errors()
def main(
    student: Annotated[str, typer.Argument(help="The student's folder.")],
    teacher: Annotated[str, typer.Argument(help="The folder of the teacher it was converted from.")],
    source: options.Source,
    block: options.Block = 1024,
    batch_size: options.BatchSize = 8,
    tokens: options.Tokens = 64_000,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Print losses, KL, top-1 agreement, and each layer's distance from the teacher's."""
    if tokenizer_hash(load_tokenizer(student)) != tokenizer_hash(load_tokenizer(teacher)):
        raise UserError(f"{student} and {teacher} have different tokenizers, so their tokens cannot be compared")
    batches = read_batches(Text(source, block, batch_size, tokens, text_key, separator), student)
    ours, theirs = load_model(student, device), load_model(teacher, device)
    metrics, distances = evaluate(ours, theirs, batches), layer_distances(ours, theirs, batches)
    if as_json:
        print(json.dumps(json_numbers(asdict(metrics) | {"layer_distances": distances})))
        return
    print(_told(metrics))
    for layer, distance in enumerate(distances):
        print(f"layer {layer:<4}  {words.percent(distance)} off")


def _told(metrics: Metrics) -> str:
    assert metrics.teacher_loss is not None, "there was a teacher"
    ratio = perplexity_ratio(metrics.teacher_loss, metrics.loss)
    return "\n".join(
        [
            f"agreement   {words.percent(metrics.agreement)} of next tokens",
            f"KL          {words.plain(metrics.kl, 4)} nats per token",
            f"perplexity  {words.plain(metrics.perplexity)}, teacher {words.plain(perplexity(metrics.teacher_loss))} "
            f"({words.times(ratio)})",
            f"loss        {words.plain(metrics.loss, 4)}, teacher {words.plain(metrics.teacher_loss, 4)}",
            f"scored      {metrics.tokens:,} tokens",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
