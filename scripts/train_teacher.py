"""Train the small Llama that the quickstart distils: a language model of the Python standard library.

    OMP_NUM_THREADS=1 python -m scripts.train_teacher

Everything comes from the running Python: the text (``distill.data``'s ``python-stdlib``), a byte-level BPE
tokenizer trained on it, and the weights. A tenth of the files, chosen by a hash of their names, is seen by
neither; on it the model is compared with a Kneser-Ney n-gram model of the same tokens. The output folder is
rewritten whole, now and then, while the model improves.
"""

import math
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
import transformers
import typer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
from scripts.ngram import KneserNey

PROMPTS = ("def ", "import ", "class Foo(", "    def __init__(self", "for i in range(", "if not isinstance(")
HELD_OUT = 0.1
NGRAM_ORDERS = (3, 4, 5, 6)
EARLY_EVALUATION = 64_000  # held-out tokens looked at while training goes on


@dataclass(frozen=True)
class HeldOut:
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


def shifted_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Sum of the cross entropy over the scored positions of a batch, and their number."""
    logits_BTV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((labels != IGNORED).sum())


@torch.no_grad()
def evaluate(model: nn.Module, blocks: Blocks, batch_size: int, max_tokens: int | None = None) -> HeldOut:
    """The model's loss on (the first ``max_tokens`` of) the held-out blocks."""
    model.eval()
    total, scored = 0.0, 0
    for batch in evaluation_batches(blocks, batch_size, max_tokens):
        loss, count = shifted_loss(model, batch)
        total, scored = total + loss.item(), scored + count
    model.train()
    return held_out(total / scored, blocks)


def held_out(loss: float, blocks: Blocks) -> HeldOut:
    """Restate a loss per token in bits per byte: a text's tokens without the BOS that no one has to guess."""
    text_tokens = blocks.n_tokens - blocks.n_documents
    return HeldOut(loss, loss / math.log(2) * text_tokens / blocks.utf8_bytes)


def ngram_baselines(train: Blocks, test: Blocks, vocabulary: int) -> dict[int, HeldOut]:
    """Held-out loss of Kneser-Ney models by order, on exactly the tokens that ``evaluate`` scores.

    Only the context differs, in the n-gram's favour: it may look back across the border of a block.
    """
    scored = torch.cat([row["labels"] != IGNORED for row in test])[: test.n_tokens].numpy()
    baselines = {}
    for n in NGRAM_ORDERS:
        model = KneserNey(list(train.documents()), n, vocabulary)
        # The BOS, which is never scored, gets a place so that the rows line up with the tokens.
        logs = np.concatenate([np.append(0.0, model.log_probabilities(d)) for d in test.documents()])
        baselines[n] = held_out(float(-logs[scored].mean()), test)
    return baselines


def optimizers_for(model: nn.Module, lr: float, matrix_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms.

    In trials on this text Muon reached in 1.2M tokens what AdamW alone had not reached in 2.2M.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adamw]


def wsd(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm up, stay, and decay linearly to nothing (fractions of all steps)."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, new_tokens: int, **sampling: Any) -> str:
    """The prompt with its continuation."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, **sampling
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def samples(model: LlamaForCausalLM, tokenizer: Any, seed: int) -> str:
    """Greedy and sampled continuations of the prompts, as Markdown."""
    model.eval()
    torch.manual_seed(seed)
    sections = []
    for prompt in PROMPTS:
        greedy = complete(model, tokenizer, prompt, 48, do_sample=False)
        drawn = complete(model, tokenizer, prompt, 96, do_sample=True, temperature=0.8, top_p=0.95)
        sections.append(f"### `{prompt}`\n\nGreedy:\n\n```python\n{greedy}\n```\n")
        sections.append(f"Sampled (temperature 0.8, top-p 0.95):\n\n```python\n{drawn}\n```\n")
    model.train()
    return "\n".join(sections)


def export(folder: Path, model: LlamaForCausalLM, tokenizer: Any, card: str) -> None:
    """Write the Hugging Face folder beside its place, then swap it in."""
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors keeps its files to their owner
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def model_card(facts: dict[str, str], completions: str) -> str:
    """README.md of the teacher: how it was made, how good it is, what it writes."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, code, python, tiny]
---

# stdlib-1m

A Llama of 0.9 million parameters that has read the Python standard library and nothing else: small enough
to lie in a repository, large enough to be worth distilling. It is the teacher of the quickstart and of the
tests, not a coding assistant.

| | |
|---|---|
{table}

The held-out files are chosen by a hash of their names; neither the weights nor the tokenizer saw them. The
n-gram model is interpolated modified Kneser-Ney over the same tokens, trained on the same files and scored on
the same positions; the order shown is the best of {", ".join(map(str, NGRAM_ORDERS))}.

Licence: the weights are published under Apache-2.0. They were trained on the Python standard library, which
is distributed under the PSF License Agreement (https://docs.python.org/3/license.html).

## What it writes

{completions}"""


def main(
    output: Annotated[Path, typer.Option(help="Folder of the finished model.")] = Path("teachers/stdlib-1m"),
    work: Annotated[Path, typer.Option(help="Folder of the prepared data.")] = Path("runs/train-teacher"),
    tokens: Annotated[int, typer.Option(help="Tokens to train on, repetitions included.")] = 10_000_000,
    block: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW: embedding, norms.")] = 2.5e-3,
    matrix_lr: Annotated[float, typer.Option(help="Highest learning rate of Muon: the matrices.")] = 1e-2,
    warmup: Annotated[float, typer.Option(help="Fraction of the steps that warm up.")] = 0.02,
    decay: Annotated[float, typer.Option(help="Fraction of the steps that decay to zero.")] = 0.4,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = 1024,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 128,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.")] = 2,
    intermediate: Annotated[int, typer.Option(help="Width of the MLP.")] = 384,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order and the samples.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    export_every: Annotated[int, typer.Option(help="Steps between two exports; 0: only the last.")] = 800,
    ngram: Annotated[bool, typer.Option(help="Compare with n-gram models at the end.")] = True,
) -> None:
    """Train a small Llama on the standard library of the running Python, into a Hugging Face folder."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train_documents, test_documents = split_documents(read_documents("python-stdlib"), fraction=HELD_OUT)
    tokenizer = train_tokenizer(train_documents, vocabulary, block)
    prepare(train_documents, test_documents, tokenizer, work / "data", block=block)
    train, test = Blocks(work / "data", "train", block), Blocks(work / "data", "held_out", block)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            max_position_embeddings=block,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    n_parameters = sum(p.numel() for p in model.parameters())
    steps = steps_for(tokens, batch_size, block)
    print(f"{n_parameters:,} parameters; {train.n_tokens:,} training and {test.n_tokens:,} held-out tokens")
    print(f"{steps} steps of {batch_size * block:,} tokens: {tokens / train.n_tokens:.1f} epochs", flush=True)
    facts = {
        "made by": f"`{' '.join(['python -m scripts.train_teacher', *sys.argv[1:]])}`",
        "architecture": f"LlamaForCausalLM, {n_parameters:,} parameters, {layers} layers of width {hidden}, "
        f"{heads} query and {kv_heads} key/value heads, context {block}, vocabulary {vocabulary}",
        "text": f"python-stdlib of Python {platform.python_version()}: {len(train_documents)} files, "
        f"{train.utf8_bytes:,} bytes, {train.n_tokens:,} tokens; held out: {len(test_documents)} files, "
        f"{test.utf8_bytes:,} bytes, {test.n_tokens:,} tokens",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, {platform.machine()}, {threads} thread(s)",
    }

    def export_now(step: int, *, last: bool) -> None:
        result = evaluate(model, test, batch_size, None if last else EARLY_EVALUATION)
        print(f"step {step}/{steps}: held out {result}; writing {output}", flush=True)
        trained = {"trained": f"{step} of {steps} steps of {batch_size * block:,} tokens, seed {seed}"}
        card = model_card(facts | trained | {"held out": str(result)} | baseline, samples(model, tokenizer, seed))
        export(output, model, tokenizer, card)

    baseline: dict[str, str] = {}
    if ngram:
        results = ngram_baselines(train, test, vocabulary)
        for n, result in results.items():
            print(f"{n}-gram, modified Kneser-Ney: held out {result}", flush=True)
        best = min(results, key=lambda n: results[n].loss)
        baseline = {f"held out, {best}-gram": str(results[best])}

    model.train()
    # Half-length sequences until the decay: attention costs half, and the decay teaches the far half.
    short = TrainingBatches(Blocks(work / "data", "train", block // 2), 2 * batch_size, seed)
    long = TrainingBatches(train, batch_size, seed)
    optimizers = optimizers_for(model, lr, matrix_lr)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    started = time.perf_counter()
    for step in range(steps):
        factor = wsd(step, steps, warmup, decay)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = factor * group["peak_lr"]
        batches = short if step < (1 - decay) * steps else long
        torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the CPU has them
        loss_sum, count = shifted_loss(model, batches.batch(step))
        loss = loss_sum / count
        loss.backward()
        torch.set_float32_matmul_precision("highest")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * batch_size * block / (time.perf_counter() - started)
            left = (steps - step - 1) * batch_size * block / speed / 60
            print(f"step {step}: loss {loss.item():.4f}, {speed:,.0f} tokens/s, {left:.0f} min left", flush=True)
        if export_every and (step + 1) % export_every == 0 and step + 1 < steps:
            export_now(step + 1, last=False)
    export_now(steps, last=True)
    print((output / "README.md").read_text())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
