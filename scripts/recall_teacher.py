"""The teacher of ``train_teacher --task recall``: a small Llama that looks up what its prompt says, and nothing else.

Rows of associative recall and of phone books in token ids (``distill.recall.rows``), half and half, are made anew at
every step, so that none comes twice. First their answers alone are scored; in the end, by turns, every token of rows
in which the answers stand. So the teacher is a language model of them: what it predicts where nothing is asked is what
may come there, and not arbitrary. What it has learned is then measured on rows of other seeds, by generation through
its cache. Beside the model stands a text of such rows, one a line, to distil it on: the tokenizer's words are the ids.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaForCausalLM

from distill.data.blocks import IGNORED
from distill.recall import examine, row_examples
from distill.recall.rows import Row
from scripts.recall_rows import LONG, LONGEST, SHORT, VOCABULARY, Vocabulary, drawn, word_tokenizer, write_text
from scripts.teacher_folder import write_folder
from scripts.teacher_training import Batch, new_llama, optimizers_for, say, train, wsd

SHORT_STEPS = 0.6  # fraction of the steps that train on short rows: there looking up is discovered
LANGUAGE_RATE = 0.2  # of the learning rates, when every token is scored


def main(
    output: Annotated[Path, typer.Option(help="Folder of the finished model.")] = Path("teachers/recall"),
    work: Annotated[Path, typer.Option(help="Folder of the text to distil it on.")] = Path("runs/recall-teacher"),
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on, answers alone.")] = 4000,
    language_steps: Annotated[int, typer.Option(min=1, help="Batches after them, every token in turn.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW: embedding, norms.")] = 2.5e-3,
    matrix_lr: Annotated[float, typer.Option(help="Highest learning rate of Muon: the matrices.")] = 1e-2,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps that warm up.")] = 0.05,
    decay: Annotated[float, typer.Option(help="Fraction of the steps that decay to zero.")] = 0.5,
    vocabulary: Vocabulary = VOCABULARY,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 64,
    layers: Annotated[int, typer.Option(min=2, help="Decoder layers; looking up takes two.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 2,
    intermediate: Annotated[int, typer.Option(help="Width of the MLP.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Prompts a cell that it is examined on at the end.")] = 256,
    text_rows: Annotated[int, typer.Option(min=1, help="Rows of the text to distil it on.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the rows.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train a small Llama on associative recall and phone books, into a Hugging Face folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    # Without an end of text: the ids are all the task's own.
    model = new_llama(vocabulary, hidden, layers, heads, kv_heads, intermediate, positions=LONGEST)
    tokenizer = word_tokenizer(vocabulary)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters; {batch_size} rows a step")

    def answers(step: int) -> Batch:
        cells = SHORT if step < SHORT_STEPS * steps else LONG
        rows = drawn(cells, batch_size, vocabulary, np.random.default_rng([seed, step]))
        return padded(rows, answers_alone=True)

    def everything(step: int) -> Batch:
        # By turns, or the answers, of which there are few, would be learned less well again.
        rows = drawn(LONG, batch_size, vocabulary, np.random.default_rng([seed, steps + step]))
        return padded(rows, answers_alone=step % 2 == 1)

    for number, batch, factor in ((steps, answers, 1.0), (language_steps, everything, LANGUAGE_RATE)):
        say(f"{'answers alone' if batch is answers else 'every token'}: {number} steps")
        optimizers = optimizers_for(model, factor * lr, factor * matrix_lr)
        for step, loss in train(
            model, optimizers, partial(wsd, steps=number, warmup=warmup, decay=decay), batch, number
        ):
            if step % 50 == 0 or step == number:
                say(f"step {step}: loss {loss:.4f}")
    facts = {
        "made by": f"`{' '.join(['python -m scripts.train_teacher --task recall', *sys.argv[1:]])}`",
        "architecture": f"LlamaForCausalLM, {parameters:,} parameters, {layers} layers of width {hidden}, "
        f"{heads} query and {kv_heads} key/value heads, vocabulary {vocabulary}",
        "trained": f"{steps} steps of {batch_size} rows on answers alone, {language_steps} on these and all tokens by "
        f"turns; seed {seed}",
        **dict(told(model, vocabulary, samples, seed)),
    }
    write_folder(output, model.eval(), tokenizer, card(output.name, facts))
    write_text(work / "rows.txt", text_rows, vocabulary, seed)
    say(f"{output}: the model; {work / 'rows.txt'}: {text_rows:,} rows to distil it on")


def padded(rows: Iterator[Row], *, answers_alone: bool) -> Batch:
    """Rows of one batch, (B, T) int64; labels stand one place behind what is read, as in ``distill.data``.

    Args:
        answers_alone: score nothing but the answers; otherwise every token of rows in which the answers stand.
    """
    made = [(row.ids, row.labels()) if answers_alone else (row.answered(), None) for row in rows]
    width = 1 + max(len(ids) for ids, _ in made)
    ids_BT = torch.zeros(len(made), width, dtype=torch.long)
    labels_BT = torch.full((len(made), width), IGNORED)
    for number, (ids, labels_T) in enumerate(made):
        ids_BT[number, : len(ids)] = torch.tensor(ids)
        if labels_T is None:
            labels_BT[number, : len(ids)] = torch.tensor(ids)
        else:
            labels_BT[number, 1 : len(ids) + 1] = torch.from_numpy(labels_T)
    return {"input_ids": ids_BT, "labels": labels_BT, "position_ids": torch.arange(width).expand(len(made), -1)}


def told(model: LlamaForCausalLM, vocabulary: int, samples: int, seed: int) -> Iterator[tuple[str, str]]:
    """What share of each cell the model answers."""
    for task, items, length in LONG:
        examples = row_examples(task, items, length, samples=samples, seed=seed, vocabulary=vocabulary)
        results = examine(model, examples, batch_size=64)
        written = sum(result.written for result in results) / len(results)
        first = sum(result.rank == 1 for result in results) / len(results)
        name = f"{task}, {items} items, {f'length {length}' if length else 'as long as needed'}"
        say(f"{name}: {100 * written:.1f}% written, {100 * first:.1f}% chosen of {samples}")
        yield name, f"{100 * written:.1f}% written, {100 * first:.1f}% chosen"


def card(name: str, facts: dict[str, str]) -> str:
    """README.md of the teacher."""
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, recall, synthetic, tiny]
---

# {name}

A small Llama that looks up values of keys and numbers of names in its prompt, in token ids of its own
(`distill/recall/rows.py`), and nothing else: it is there to be distilled, and to see what its students still recall.

| | |
|---|---|
{table}

Written: the whole answer by greedy decoding. Chosen: the likeliest of four.
"""
