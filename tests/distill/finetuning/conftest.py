"""A hybrid of the public teacher whose mixers look trained, and chats cut from real stories."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from distill import convert
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


@pytest.fixture
def recipe(student, stories_text, write_chats, tmp_path) -> Path:
    """A recipe of six steps whose run_dir is ``run`` beside it."""
    stories = [text for text in stories_text.read_text(encoding="utf-8")[:40_000].split("\n\n") if len(text) > 60][:60]
    write_chats(*(chat(("user", text[:30]), ("assistant", text[30:200])) for text in stories))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    path = tmp_path / "tuning.yaml"
    path.write_text(RECIPE.format(folder=tmp_path, student=student))
    return path
