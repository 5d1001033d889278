"""Train the small Llama that the quickstart distils: a language model of the Python standard library.

    OMP_NUM_THREADS=1 python -m scripts.train_teacher
    OMP_NUM_THREADS=1 python -m scripts.train_teacher --task recall

The second line trains another one, which looks up what its prompt says (``scripts/recall_teacher.py``). Of the first,
everything comes from the running Python: the text (``distill.data``'s ``python-stdlib``), a byte-level BPE
tokenizer trained on it, and the weights. A tenth of the files, chosen by a hash of their names, is seen by
neither; on it the model is compared with a Kneser-Ney n-gram model of the same tokens. The output folder is
rewritten whole, now and then, while the model improves.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import transformers
import typer
from torch import nn
from transformers import PreTrainedTokenizerFast

from distill.data import (
    Blocks,
    Document,
    TrainingBatches,
    evaluation_batches,
    prepare,
    read_documents,
    split_documents,
    steps_for,
)
from distill.data.blocks import IGNORED
from distill.errors import UserError
from distill.recipe_fields import read_tokens
from scripts.ngram import KneserNey
from scripts.recall_teacher import main as recall
from scripts.teacher_folder import model_card, samples, write_folder
from scripts.teacher_training import Batch, new_llama, optimizers_for, say, shifted_loss, train, wsd

HELD_OUT = 0.1  # fraction of the files
NGRAM_ORDERS = (3, 4, 5, 6)
HALF_LENGTH = 0.7  # fraction of the steps that train on half-length sequences
EARLY_EVALUATION = 64_000  # held-out tokens looked at while training goes on


@dataclass(frozen=True)
class Score:
    """Loss on the held-out files: mean nats a scored token, and bits a byte of text."""

    loss: float
    bits_per_byte: float

    def __str__(self) -> str:
        perplexity = math.exp(self.loss)
        return f"{self.loss:.4f} nats/token, perplexity {perplexity:.2f}, {self.bits_per_byte:.4f} bits/byte"


def train_tokenizer(documents: list[Document], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts ``<bos>`` before a text, as Llama's does."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents), trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Blocks, batch_size: int, max_tokens: int | None = None) -> Score:
    """The model's loss on (the first ``max_tokens`` of) the held-out blocks."""
    model.eval()
    total, scored = 0.0, 0
    for batch in evaluation_batches(blocks, batch_size, max_tokens):
        loss, count = shifted_loss(model, batch)
        total, scored = total + loss.item(), scored + count
    return score(total / scored, blocks)


def score(loss: float, blocks: Blocks) -> Score:
    """A loss per token with its bits per byte: the BOS of each document is no text, and not to be guessed."""
    text_tokens = blocks.n_tokens - blocks.n_documents
    return Score(loss, loss / math.log(2) * text_tokens / blocks.utf8_bytes)


def ngram_baselines(train_blocks: Blocks, test: Blocks, vocabulary: int) -> dict[int, Score]:
    """Held-out scores of Kneser-Ney models by order, on exactly the tokens that ``evaluate`` scores.

    Only the context differs, in the n-gram's favour: it may look back across the border of a block.
    """
    scored = torch.cat([row["labels"] != IGNORED for row in test])[: test.n_tokens].numpy()
    scores = {}
    for n in NGRAM_ORDERS:
        model = KneserNey(list(train_blocks.documents()), n, vocabulary)
        # The BOS, which is never scored, gets a place so that the rows line up with the tokens.
        logs = np.concatenate([np.append(0.0, model.log_probabilities(d)) for d in test.documents()])
        scores[n] = score(float(-logs[scored].mean()), test)
    return scores


def main(
    output: Annotated[Path, typer.Option(help="Folder of the finished model.")] = Path("teachers/stdlib-1m"),
    work: Annotated[Path, typer.Option(help="Folder of the prepared data.")] = Path("runs/train-teacher"),
    tokens: Annotated[str, typer.Option(help="Tokens to train on, repetitions included.")] = "22M",
    block: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW: embedding, norms.")] = 2.5e-3,
    matrix_lr: Annotated[float, typer.Option(help="Highest learning rate of Muon: the matrices.")] = 1e-2,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps that warm up.")] = 0.02,
    decay: Annotated[float, typer.Option(help="Fraction of the steps that decay to zero.")] = 0.8,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = 1024,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 2,
    intermediate: Annotated[int, typer.Option(help="Width of the MLP.")] = 384,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order and the samples.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    export_every: Annotated[int, typer.Option(help="Steps between two exports; 0: only the last.")] = 2000,
    ngram: Annotated[bool, typer.Option(help="Compare with n-gram models first.")] = True,
) -> None:
    """Train a small Llama on the standard library of the running Python, into a Hugging Face folder.

    With --task recall, one that looks up what its prompt says; --task recall --help has its options.
    """
    wanted = read_tokens("--tokens", tokens)
    tokens_per_step, steps = batch_size * block, steps_for(wanted, batch_size, block)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train_documents, test_documents = split_documents(read_documents("python-stdlib"), fraction=HELD_OUT)
    tokenizer = train_tokenizer(train_documents, vocabulary, block)
    prepare(train_documents, test_documents, tokenizer, work / "data", block=block)
    full, full_test = (Blocks(work / "data", split, block) for split in ("train", "held_out"))
    # Half-length sequences at first: attention costs half, and the last steps teach the far half.
    half, half_test = (Blocks(work / "data", split, block // 2) for split in ("train", "held_out"))
    half_batches = TrainingBatches(half, 2 * batch_size, seed)
    full_batches = TrainingBatches(full, batch_size, seed)

    model = new_llama(
        vocabulary,
        hidden,
        layers,
        heads,
        kv_heads,
        intermediate,
        positions=block,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    n_parameters = sum(p.numel() for p in model.parameters())
    say(f"{n_parameters:,} parameters; {full.n_tokens:,} training and {full_test.n_tokens:,} held-out tokens")
    say(f"{steps} steps of {tokens_per_step:,} tokens: {wanted / full.n_tokens:.1f} epochs")
    facts = {
        "made by": f"`{' '.join(['python -m scripts.train_teacher', *sys.argv[1:]])}`",
        "architecture": f"LlamaForCausalLM, {n_parameters:,} parameters, {layers} layers of width {hidden}, "
        f"{heads} query and {kv_heads} key/value heads, context {block}, vocabulary {vocabulary}",
        "text": f"python-stdlib of Python {platform.python_version()}: {len(train_documents)} files, "
        f"{full.utf8_bytes:,} bytes, {full.n_tokens:,} tokens; held out: {len(test_documents)} files, "
        f"{full_test.utf8_bytes:,} bytes, {full_test.n_tokens:,} tokens",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, {platform.machine()}, {threads} thread(s)",
    }
    if ngram:
        scores = ngram_baselines(full, full_test, vocabulary)
        for n, ngram_score in scores.items():
            say(f"{n}-gram, modified Kneser-Ney: held out {ngram_score}")
        best = min(scores, key=lambda n: scores[n].loss)
        facts[f"held out, the best n-gram ({best}-gram)"] = str(scores[best])

    def batch(step: int) -> Batch:
        return (half_batches if step < HALF_LENGTH * steps else full_batches).batch(step)

    def export(step: int) -> str:
        """Evaluate and write the model as it is; returns the card."""
        if step == steps:
            found = {f"held out, blocks of {b.block}": evaluate(model, b, 8) for b in (full_test, half_test)}
        else:
            blocks = half_test if step < HALF_LENGTH * steps else full_test
            found = {f"held out, first {EARLY_EVALUATION:,} tokens": evaluate(model, blocks, 8, EARLY_EVALUATION)}
        for name, result in found.items():
            say(f"step {step} of {steps}, {name}: {result}")
        trained = {"trained": f"{step} of {steps} steps of {tokens_per_step:,} tokens, seed {seed}"}
        rows = facts | trained | {name: str(result) for name, result in found.items()}
        card = model_card(output.name, rows, samples(model, tokenizer, seed))
        write_folder(output, model, tokenizer, card)
        return card

    optimizers = optimizers_for(model, lr, matrix_lr)
    started = time.perf_counter()
    for step, loss in train(model, optimizers, lambda s: wsd(s, steps, warmup, decay), batch, steps):
        if step % 50 == 0 or step == steps:
            speed = step * tokens_per_step / (time.perf_counter() - started)
            minutes = (steps - step) * tokens_per_step / speed / 60
            say(f"step {step}: loss {loss:.4f}, {speed:,.0f} tokens/s, {minutes:.0f} min left")
        if export_every and step % export_every == 0 and step < steps:
            export(step)
    say(export(steps))


def program(arguments: list[str]) -> tuple[Callable[..., None], list[str]]:
    """What ``--task`` asks for, and the arguments that are left for it."""
    parser = argparse.ArgumentParser("scripts.train_teacher", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=("stdlib", "recall"), default="stdlib")
    known, left = parser.parse_known_args(arguments)
    return (recall if known.task == "recall" else main), left


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        chosen, sys.argv[1:] = program(sys.argv[1:])
        typer.run(chosen)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
