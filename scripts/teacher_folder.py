"""What ``train_teacher`` leaves behind: a Hugging Face folder with a card that shows what the model writes."""

from pathlib import Path
from typing import Any

import torch

from distill.atomic import whole_folder

PROMPTS = ("def ", "import ", "class Foo(", "    def __init__(self", "for i in range(", "if not isinstance(")


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, new_tokens: int, **sampling: Any) -> str:
    """The prompt with its continuation."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, **sampling
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def samples(model: Any, tokenizer: Any, seed: int) -> str:
    """Greedy and sampled continuations of the prompts, as Markdown."""
    model.eval()
    torch.manual_seed(seed)
    sections = []
    for prompt in PROMPTS:
        greedy = complete(model, tokenizer, prompt, 48, do_sample=False)
        drawn = complete(model, tokenizer, prompt, 96, do_sample=True, temperature=0.8, top_p=0.95)
        sections.append(f"### `{prompt}`\n\nGreedy:\n\n```python\n{greedy}\n```\n")
        sections.append(f"Sampled (temperature 0.8, top-p 0.95):\n\n```python\n{drawn}\n```\n")
    return "\n".join(sections)


def model_card(name: str, facts: dict[str, str], completions: str) -> str:
    """README.md of the teacher: how it was made, how good it is, what it writes."""
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, code, python, tiny]
---

# {name}

A small Llama that has read the Python standard library and nothing else: small enough to lie in a repository,
large enough to be worth distilling. It is the teacher of the quickstart and of the tests, not a coding
assistant.

| | |
|---|---|
{table}

The held-out files are chosen by a hash of their names; neither the weights nor the tokenizer saw them. The
n-gram model is interpolated modified Kneser-Ney over the same tokens, trained on the same files and scored on
the same positions (`scripts/ngram.py`).

Licence: the weights are published under Apache-2.0. They were trained on the Python standard library, which
is distributed under the PSF License Agreement (https://docs.python.org/3/license.html).

## What it writes

{completions}"""


def write_folder(folder: Path, model: Any, tokenizer: Any, card: str) -> None:
    """Write weights, configuration, tokenizer and card; what stood at ``folder`` gives way when all of it is there."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors keeps its files to their owner
