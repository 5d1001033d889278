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
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
from distill.programs import report_user_errors
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


@dataclass(frozen=True)
class Text:
    """The standard library of the running Python as blocks of tokens, of full length and of half.

    Attributes:
        files: training and held-out files.
    """

    tokenizer: PreTrainedTokenizerFast
    full: Blocks
    full_test: Blocks
    half: Blocks
    half_test: Blocks
    files: tuple[int, int]

    def described(self) -> str:
        """A row of the card."""
        return (
            f"python-stdlib of Python {platform.python_version()}: {self.files[0]} files, "
            f"{self.full.utf8_bytes:,} bytes, {self.full.n_tokens:,} tokens; held out: {self.files[1]} files, "
            f"{self.full_test.utf8_bytes:,} bytes, {self.full_test.n_tokens:,} tokens"
        )


def prepared(folder: Path, vocabulary: int, block: int) -> Text:
    """Trains the tokenizer, and writes the text into ``folder`` as its tokens."""
    train_documents, test_documents = split_documents(read_documents("python-stdlib"), fraction=HELD_OUT)
    tokenizer = train_tokenizer(train_documents, vocabulary, block)
    prepare(train_documents, test_documents, tokenizer, folder, block=block)
    full, full_test = (Blocks(folder, split, block) for split in ("train", "held_out"))
    half, half_test = (Blocks(folder, split, block // 2) for split in ("train", "held_out"))
    return Text(tokenizer, full, full_test, half, half_test, (len(train_documents), len(test_documents)))


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


def told_of_ngrams(text: Text, vocabulary: int) -> dict[str, str]:
    """Says how well n-gram models do, and returns the best one's line of the card."""
    scores = ngram_baselines(text.full, text.full_test, vocabulary)
    for n, ngram_score in scores.items():
        say(f"{n}-gram, modified Kneser-Ney: held out {ngram_score}")
    best = min(scores, key=lambda n: scores[n].loss)
    return {f"held out, the best n-gram ({best}-gram)": str(scores[best])}


@dataclass(frozen=True)
class Training:
    """One training from its first step to its last: what it reads when, and what it leaves behind.

    Attributes:
        facts: rows of the model's card that are known before the first step.
        batch_size: full-length sequences a step; of half-length ones it is twice as many.
    """

    text: Text
    output: Path
    facts: dict[str, str]
    steps: int
    batch_size: int
    seed: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.text.full.block

    def is_half(self, step: int) -> bool:
        """Whether a step's sequences have half their length: attention costs half, and the last steps teach the far
        half."""
        return step < HALF_LENGTH * self.steps

    def batch(self, step: int) -> Batch:
        """Batch ``step``, counted from 0."""
        if self.is_half(step):
            return TrainingBatches(self.text.half, 2 * self.batch_size, self.seed).batch(step)
        return TrainingBatches(self.text.full, self.batch_size, self.seed).batch(step)

    def progress(self, step: int, loss: float, seconds: float) -> str:
        """A line of the log, ``step`` steps and ``seconds`` after the start."""
        speed = step * self.tokens_per_step / seconds
        minutes = (self.steps - step) * self.tokens_per_step / speed / 60
        return f"step {step}: loss {loss:.4f}, {speed:,.0f} tokens/s, {minutes:.0f} min left"

    def export(self, model: LlamaForCausalLM, step: int) -> str:
        """Evaluate and write the model as it is; returns the card."""
        found = self._scores(model, step)
        for name, result in found.items():
            say(f"step {step} of {self.steps}, {name}: {result}")
        trained = f"{step} of {self.steps} steps of {self.tokens_per_step:,} tokens, seed {self.seed}"
        rows = self.facts | {"trained": trained} | {name: str(result) for name, result in found.items()}
        card = model_card(self.output.name, rows, samples(model, self.text.tokenizer, self.seed))
        write_folder(self.output, model, self.text.tokenizer, card)
        return card

    def _scores(self, model: LlamaForCausalLM, step: int) -> dict[str, Score]:
        """On all held-out tokens after the last step, on some before."""
        text = self.text
        if step == self.steps:
            return {f"held out, blocks of {b.block}": evaluate(model, b, 8) for b in (text.full_test, text.half_test)}
        blocks = text.half_test if self.is_half(step) else text.full_test
        return {f"held out, first {EARLY_EVALUATION:,} tokens": evaluate(model, blocks, 8, EARLY_EVALUATION)}


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
    steps = steps_for(wanted, batch_size, block)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    text = prepared(work / "data", vocabulary, block)
    tokenizer = text.tokenizer
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
    say(f"{n_parameters:,} parameters; {text.full.n_tokens:,} training and {text.full_test.n_tokens:,} held-out tokens")
    say(f"{steps} steps of {batch_size * block:,} tokens: {wanted / text.full.n_tokens:.1f} epochs")
    facts = {
        "made by": f"`{' '.join(['python -m scripts.train_teacher', *sys.argv[1:]])}`",
        "architecture": f"LlamaForCausalLM, {n_parameters:,} parameters, {layers} layers of width {hidden}, "
        f"{heads} query and {kv_heads} key/value heads, context {block}, vocabulary {vocabulary}",
        "text": text.described(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, {platform.machine()}, {threads} thread(s)",
    }
    if ngram:
        facts |= told_of_ngrams(text, vocabulary)
    training = Training(text, output, facts, steps, batch_size, seed)
    optimizers = optimizers_for(model, lr, matrix_lr)
    started = time.perf_counter()
    for step, loss in train(model, optimizers, lambda s: wsd(s, steps, warmup, decay), training.batch, steps):
        if step % 50 == 0 or step == steps:
            say(training.progress(step, loss, time.perf_counter() - started))
        if export_every and step % export_every == 0 and step < steps:
            training.export(model, step)
    say(training.export(model, steps))


def program(arguments: list[str]) -> tuple[Callable[..., None], list[str]]:
    """What ``--task`` asks for, and the arguments that are left for it."""
    parser = argparse.ArgumentParser("scripts.train_teacher", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=("stdlib", "recall"), default="stdlib")
    known, left = parser.parse_known_args(arguments)
    return (recall if known.task == "recall" else main), left


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with report_user_errors():
        chosen, sys.argv[1:] = program(sys.argv[1:])
        typer.run(chosen)
