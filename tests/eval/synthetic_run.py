"""A run directory as the stages leave it, measured on real tiny models in a second.

The students are the teacher with noise on its weights, less of it after every stage.
"""

import copy
import json
import math
import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.completions import completions
from distill.evaluation import evaluate, layer_distances
from distill.evaluation_record import Evaluation, MatrixPair, Sample, write_evaluation

NOISE = {"convert": 0.4, "mixing": 0.3, "hidden": 0.1, "logits": 0.03}
TOKENS = {"convert": 0, "mixing": 60_000, "hidden": 120_000, "logits": 300_000}
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen; <b>Winston</b> & co. slipped in. " * 4
PROMPTS = ["It was a", 'The <b>clocks</b> & "co."']
BLOCK = 40

RECIPE = """\
name: tiny
run_dir: runs/tiny
teacher: {path: teachers/tiny-llama, dtype: float32}
student: {mixer: mamba2, keep_attention: [1]}
data: {source: [text/day.txt], block: 40}
stages:
  mixing: {tokens: 60K}
  hidden: {tokens: 120K}
  logits: {tokens: 300K}
"""


def write_run(folder: Path, stages: tuple[str, ...] = tuple(NOISE)) -> Path:
    """Write a run with the given stages done; the recipe asks for all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    tokenizer = characters()
    teacher = tiny_teacher(len(tokenizer))
    batches = [packed(tokenizer(TEXT)["input_ids"])]
    write_evaluation(folder / "teacher", Evaluation(evaluate(teacher, None, batches)))
    told = completions(teacher, tokenizer, PROMPTS, 12)
    for stage in stages:
        student = noisy(teacher, NOISE[stage])
        said = completions(student, tokenizer, PROMPTS, 12)
        evaluation = Evaluation(
            evaluate(student, teacher, batches),
            tuple(layer_distances(student, teacher, batches)),
            tuple(Sample(*texts) for texts in zip(PROMPTS, said, told, strict=True)),
        )
        write_evaluation(folder / stage, evaluation, matrices(student, teacher, batches[0]["input_ids"][:1]))
        write_training(folder / stage, stage, evaluation)
    (folder / "convert" / "conversion.json").write_text(json.dumps(CONVERSION))
    return folder


CONVERSION = {
    "layers": ["mamba2", "attention", "mamba2"],
    "parameters_after": {"mixer": 9000, "attention": 1500, "mlp": 2500},
    "state_bytes": 17_408,
    "kv_bytes_per_token": 256,
    "teacher_kv_bytes_per_token": 768,
}


def write_training(folder: Path, stage: str, evaluation: Evaluation) -> None:
    """stage.json, and for a trained stage a metrics.jsonl of fifty noisy steps."""
    tokens = TOKENS[stage]
    record = {
        "stage": stage,
        "parent": None,
        "tokens": tokens,
        "seconds": tokens / 4000,
        "versions": {"torch": "2.13.0"},
    }
    (folder / "stage.json").write_text(json.dumps(record))
    if not tokens:
        return
    noise = random.Random(stage)
    rows = [{"kind": "eval", "step": 0, "tokens": 0, "loss": 3 * evaluation.metrics.loss, "kl": 3.0}]
    for step in range(1, 51):
        loss = 5 * math.exp(-step / 12) + 0.5 + 0.2 * noise.random()
        rows.append({"kind": "train", "step": step, "tokens": step * tokens // 50, "loss": loss, "lr": 1e-3})
        if step % 10 == 0:
            rows.append({"kind": "eval", "step": step, "tokens": step * tokens // 50, "loss": loss, "kl": loss / 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def characters() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    vocabulary = {token: index for index, token in enumerate(["<s>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_teacher(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def noisy(teacher: LlamaForCausalLM, scale: float) -> LlamaForCausalLM:
    torch.manual_seed(1)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter += scale * 0.3 * torch.randn_like(parameter)
    return student


def packed(ids: list[int]) -> dict[str, torch.Tensor]:
    """One document, cut into blocks."""
    input_ids = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    labels = input_ids.clone()
    labels[:, 0] = -100
    positions = torch.arange(BLOCK).expand_as(input_ids)
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels, "valid": valid}


@torch.no_grad()
def matrices(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids_1T: torch.Tensor) -> list[MatrixPair]:
    ours, theirs = (model(ids_1T, use_cache=False, output_attentions=True).attentions for model in (student, teacher))
    # The sign makes it what a state-space mixer can do and attention cannot.
    return [MatrixPair.of(layer, 1, theirs[layer][0, 1], ours[layer][0, 1] - 0.02) for layer in (0, 2)]
