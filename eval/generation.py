"""What models write, beside what they prefer; how much they repeat themselves; and samples.

python -m eval.generation teachers/stdlib-1m runs/quickstart/logits --text python-stdlib
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.by_position import longest_context
from distill.continuing import Cut, continued, greedily, shared
from distill.decoding import Sampling, decode, ends_of
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.programs import quiet_unless_watched, report_user_errors
from distill.prompts import left_padded, until
from distill.recall.scoring import Ids
from distill.repetition import distinct, longest_repeat, repeated
from eval import options, words
from eval.cuts import cuts
from eval.findings import Fields, Findings, names_of, require_folder, write_findings
from eval.loading import load_model, load_tokenizer

KIND = "generation"
TEXT = "the text itself"
QUOTED = 3  # prompts whose continuations are shown
GRAMS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Settings:
    """What is asked of every model."""

    lengths: list[int]
    sample_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int


@report_user_errors()
def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders; the first is the teacher.")],
    source: options.Source,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts, cut out of the text.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to continue each with, greedily.")] = 32,
    sample_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the texts that are sampled.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the samples.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the samples.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and samples.")] = 0,
    batch_size: options.BatchSize = 16,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json.")] = Path("runs/generation"),
    device: options.Device = "auto",
) -> None:
    """Let each MODEL continue prompts from a text, best one that no model was trained on.

    How often it writes the text, or what the first MODEL writes, stands beside how often it prefers the text to others:
    the two fall apart before any likelihood shows it.
    """
    quiet_unless_watched()
    names = names_of(models)
    require_folder(output)
    first, *_ = names.values()
    tokenizer = load_tokenizer(first)
    after = max(new_tokens, sample_tokens)
    given = cuts(source, tokenizer, prompt_tokens, after, prompts, seed, text_key=text_key, separator=separator)
    asked = Settings(_lengths(new_tokens), sample_tokens, temperature, top_p, seed, batch_size)
    found: Fields = {TEXT: _repetition([cut.after[:sample_tokens] for cut in given])}
    quotes: list[Fields] = [{"prompt": _text(tokenizer, cut.prompt), "texts": {}} for cut in given[:QUOTED]]
    greedy: dict[str, list[Ids]] = {}
    results: Fields = {}
    for name, path in names.items():
        model = load_model(path, device)
        _require_fit(model, path, tokenizer, prompt_tokens + 1 + after)
        greedy[name] = greedily(model, given, new_tokens, batch_size)
        results[name] = _continuations(model, given, greedy[name], next(iter(greedy.values())), asked)
        sampled = _sampled(model, given, asked)
        found[name] = _repetition(sampled)
        for quote, cut, ids in zip(quotes, given, greedy[name], strict=False):
            quote["texts"] |= {name: _text(tokenizer, ids), TEXT: _text(tokenizer, cut.after[:new_tokens])}
        print(_told(name, results[name], found[name]), flush=True)
    settings = asdict(asked) | {"source": list(source), "prompts": len(given), "prompt_tokens": prompt_tokens}
    answer = {"continued": results, "repetition": found, "samples": quotes}
    print(write_findings(output, Findings(KIND, names, settings, answer)))


def _continuations(
    model: PreTrainedModel, given: Sequence[Cut], wrote: list[Ids], firsts: list[Ids], asked: Settings
) -> list[Fields]:
    """A row a length, with the share of prompts that the model continues as the first model does."""
    rows = continued(model, given, wrote, asked.lengths, seed=asked.seed, batch_size=asked.batch_size)
    return [asdict(row) | {"same": shared(wrote, firsts, row.tokens)} for row in rows]


def _sampled(model: PreTrainedModel, given: Sequence[Cut], asked: Settings) -> list[Ids]:
    ends, found = ends_of(model), []
    with evaluating(model):
        for start in range(0, len(given), asked.batch_size):
            inputs = left_padded(
                [cut.prompt for cut in given[start : start + asked.batch_size]], device=device_of(model)
            )
            sampling = Sampling(asked.temperature, asked.top_p, asked.seed + start)
            new_BT = decode(model, inputs, asked.sample_tokens, sampling=sampling)
            found += [tuple(until(row, ends)) for row in new_BT.tolist()]
    return found


def _repetition(texts: Sequence[Ids]) -> Fields:
    """Means over texts of how each repeats itself, and how different all are."""
    long = [ids for ids in texts if len(ids) >= max(GRAMS)] or [(0,) * max(GRAMS)]
    return {
        "repeated": {str(n): sum(repeated(ids, n) for ids in long) / len(long) for n in GRAMS},
        "longest_repeat": sum(map(longest_repeat, long)) / len(long),
        "distinct": {str(n): distinct(texts, n) for n in GRAMS},
        "tokens": sum(map(len, texts)) / len(texts),
    }


def _lengths(longest: int) -> list[int]:
    """1, 4, 16, … and the longest."""
    return sorted({*(4**power for power in range(10) if 4**power < longest), longest})


def _require_fit(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    vocabulary, limit = model.config.get_text_config().vocab_size, longest_context(model)
    if len(tokenizer) > vocabulary:
        raise UserError(f"{path} predicts {vocabulary} tokens, and the first model's tokenizer has {len(tokenizer)}")
    if limit is not None and tokens > limit:
        raise UserError(
            f"{tokens} tokens are more than the {limit} positions that {path} knows; give smaller --prompt-tokens,"
            " --new-tokens or --sample-tokens"
        )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _told(name: str, rows: Sequence[Fields], repetition: Fields) -> str:
    lines = [name, "  tokens  written  preferred      gap  as the first"]
    for row in rows:
        shares = [words.percent(row[key]) for key in ("written", "preferred", "gap", "same")]
        lines.append(f"{row['tokens']:>8}{shares[0]:>9}{shares[1]:>11}{shares[2]:>9}{shares[3]:>14}")
    four = max(GRAMS)
    lines.append(
        f"  samples repeat {words.percent(repetition['repeated'][str(four)])} of their {four}-grams and have"
        f" {words.percent(repetition['distinct']['2'])} different pairs"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
