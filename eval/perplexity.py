"""How well one model predicts a text.

python -m eval.perplexity runs/quickstart/logits --text python-stdlib
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from distill.evaluation import evaluate
from distill.evaluation_record import json_numbers
from distill.programs import report_user_errors
from eval import options, words
from eval.loading import Text, load_model, read_batches


@report_user_errors()
def main(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="A student, or any causal language model.")],
    source: options.Source,
    block: options.Block = 1024,
    batch_size: options.BatchSize = 8,
    tokens: options.Tokens = 64_000,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Print the loss and perplexity of the model in FOLDER on a text."""
    batches = read_batches(Text(source, block, batch_size, tokens, text_key, separator), model)
    metrics = evaluate(load_model(model, device), None, batches)
    if as_json:
        print(json.dumps(json_numbers(asdict(metrics))))
        return
    print(f"perplexity  {words.plain(metrics.perplexity, 3)}")
    print(f"loss        {words.plain(metrics.loss, 4)} nats per token")
    print(f"scored      {metrics.tokens:,} tokens")


if __name__ == "__main__":
    typer.run(main)
