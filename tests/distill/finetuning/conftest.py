"""A hybrid of the public teacher whose mixers look trained, and chats cut from real stories."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from distill import convert
from distill.finetuning.job import Job
from distill.student import mixers_of

TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"""

RECIPE = """\
name: tuning
run_dir: {folder}/run
model: {student}
method: lora
device: cpu
data: {{source: {folder}/chats.jsonl, chat_template: {folder}/template.jinja, max_length: 128}}
training: {{steps: 6, batch_size: 4, lr: 3.0e-3, warmup: 0.0, schedule: constant, checkpoint_every: 2}}
"""


@pytest.fixture(scope="session")
def student(stories_teacher, tmp_path_factory) -> Path:
    """Away from what conversion starts with: rows of zeros, which DoRA would divide by."""
    folder = tmp_path_factory.mktemp("student")
    model = convert(stories_teacher, keep_attention=[1])
    torch.manual_seed(6)
    with torch.no_grad():
        for mixer in mixers_of(model).values():
            mixer.in_proj.weight.add_(0.02 * torch.randn_like(mixer.in_proj.weight))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories_teacher).save_pretrained(folder)
    return folder


def chat(*told: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in told]}


@pytest.fixture
def write_chats(tmp_path) -> Callable[..., None]:
    def write(*rows: object) -> None:
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.fixture(scope="session")
def short_stories(stories_text) -> list[str]:
    text = stories_text.read_text(encoding="utf-8")[:40_000]
    return [story for story in text.split("\n\n") if len(story) > 60][:60]


@pytest.fixture
def recipe(student, short_stories, write_chats, tmp_path) -> Path:
    """A recipe of six steps whose run_dir is ``run`` beside it."""
    write_chats(*(chat(("user", text[:30]), ("assistant", text[30:200])) for text in short_stories))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    path = tmp_path / "tuning.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, student=student))
    return path


PREFER = """\
name: preferring
run_dir: {folder}/run
model: {student}
method: lora
reference: start
beta: 0.1
device: cpu
data: {{source: {folder}/pairs.jsonl, chat_template: {folder}/template.jinja, max_length: 128}}
training: {{steps: 6, batch_size: 4, lr: 3.0e-3, warmup: 0.0, schedule: constant, checkpoint_every: 2}}
"""


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": chat(("user", prompt))["messages"],
        "chosen": chat(("assistant", chosen))["messages"],
        "rejected": chat(("assistant", rejected))["messages"],
    }


@pytest.fixture
def write_pairs(tmp_path) -> Callable[..., None]:
    def write(*rows: object) -> None:
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.fixture
def prefer(student, short_stories, write_pairs, tmp_path) -> Path:
    """A recipe of six steps: how a story goes on is preferred to the beginning of another one, of another length."""
    others = [*short_stories[1:], short_stories[0]]
    both = enumerate(zip(short_stories, others, strict=True))
    write_pairs(*(pair(ours[:30], ours[30:110], other[: 40 + n]) for n, (ours, other) in both))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    path = tmp_path / "preferring.yaml"
    path.write_text(PREFER.format(folder=tmp_path, student=student))
    return path


@pytest.fixture
def dtypes_seen(monkeypatch) -> list[torch.dtype]:
    """What the tuned model's first MLP gave, each time while the test trained it: the precision really computed in."""
    tuning: Any = importlib.import_module("distill.finetuning.trainer")
    seen: list[torch.dtype] = []
    load = tuning.load_base

    def watched(recipe: Any) -> Any:
        base = load(recipe)
        down = base.get_decoder().layers[0].mlp.down_proj
        down.register_forward_hook(lambda module, _inputs, out: seen.append(out.dtype) if module.training else None)
        return base

    monkeypatch.setattr(tuning, "load_base", watched)
    return seen


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """Two are counted where none is: transformers' choice is the one it would make, and tensors stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Job, "on_cpu", False)
