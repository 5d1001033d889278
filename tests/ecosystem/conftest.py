"""A hybrid of the public teacher, with its tokenizer, as a notebook would make one."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from distill import convert


@pytest.fixture
def student(stories_teacher) -> PreTrainedModel:
    return convert(stories_teacher, keep_attention=[1])


@pytest.fixture
def tokenizer(stories_teacher) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories_teacher)


@pytest.fixture
def folder(student, tokenizer, tmp_path) -> Path:
    """The student, saved."""
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def stories(stories_text) -> list[str]:
    """Short stories of different lengths."""
    found = stories_text.read_text(encoding="utf-8")[:40_000].split("\n\n")
    return [text for text in found if len(text) > 50][:60]
