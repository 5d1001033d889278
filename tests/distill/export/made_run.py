"""A finished run in miniature, as stages leave it: data, records, evaluations, a student that nobody trained."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distill import convert, handover
from distill.data import Document, prepare
from distill.evaluation import Metrics
from distill.evaluation_record import Evaluation, write_evaluation
from distill.handover import Parent, StageRecord
from tests.conftest import CHECKOUT, SHAPE

STDLIB = CHECKOUT / "teachers" / "stdlib-1m"
WORDS = "def read(self, size):\n    return self.buffer[size:]\n\n\nclass Reader:\n    pass\n"

RECIPE = """\
name: made
run_dir: /home/somebody/runs/made
seed: 0
teacher: {{path: {teacher}, dtype: float32}}
student: {{mixer: mamba2, keep_attention: [1]}}
data: {{source: [/home/somebody/corpus/books.jsonl, "dataset:org/texts:en"], block: 32}}
stages:
  mixing: {{tokens: 1000}}
  logits: {{tokens: 2000}}
evaluation: {{tokens: 500, batch_size: 4, prompts: ["/usr/bin/env"]}}
"""


def teacher() -> PreTrainedModel:
    """Random, with the vocabulary of a tokenizer that lies in this checkout."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 1024, "tie_word_embeddings": True})).eval()


def make_run(folder: Path, teacher_path: str = "/home/somebody/models/big-llama", last: str = "logits") -> Path:
    """Write a run_dir with all stages up to ``last``; returns that stage's folder."""
    tokenizer = AutoTokenizer.from_pretrained(STDLIB)
    student = convert(teacher(), keep_attention=[1])
    documents = [Document(f"file-{index}", WORDS * 8) for index in range(4)]
    prepare(documents, documents[:2], tokenizer, folder / "data", block=32)
    write_evaluation(folder / "teacher", Evaluation(Metrics(2.0, 7.389, 480, 2.0, 0.0, 1.0)))
    parent = Parent("teacher", handover.name_digest(teacher_path))
    losses = {"convert": 5.0, "mixing": 4.0, "logits": 2.25}
    for stage in [*losses][: [*losses].index(last) + 1]:

        def save(partial: Path) -> None:
            student.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "recipe.yaml").write_text(RECIPE.format(teacher=teacher_path))

        record = StageRecord(stage, parent, losses[stage] + 1, losses[stage], steps=7, tokens=1234, seconds=42.0)
        if stage == "convert":
            record = replace(record, steps=0, tokens=0)
        parent = handover.write(folder / stage, save, record).as_parent()
        metrics = Metrics(losses[stage], 2.718281828 ** losses[stage], 480, 2.0, 0.125, 0.75)
        write_evaluation(folder / stage, Evaluation(metrics))
    return folder / last
