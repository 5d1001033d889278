"""The teacher's training script end to end at a toy size, and the teacher that it left in the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "teachers" / "stdlib-1m"

SMALL = "--tokens 8.192K --block 64 --batch-size 8 --hidden 16 --layers 1 --heads 2 --kv-heads 1 --intermediate 32"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.train_teacher", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_script_trains_and_writes_an_ordinary_folder(tmp_path):
    output, work = tmp_path / "teacher", tmp_path / "work"
    arguments = [*SMALL.split(), "--vocabulary", "320", "--no-ngram", "--export-every", "9"]
    done = run("--output", output, "--work", work, *arguments)
    assert done.returncode == 0, done.stderr
    assert "step 9 of 16, held out, first 64,000 tokens" in done.stdout
    assert "step 16 of 16, held out, blocks of 64" in done.stdout
    assert "blocks of 32" in done.stdout

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"][1:]) == "def f(x):\n    return x"
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "### `def `" in card
    assert (work / "data" / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    done = run("--output", tmp_path / "t", "--work", tmp_path / "w", "--tokens", "1", "--no-ngram")
    assert done.returncode == 2
    assert done.stderr.startswith("1 tokens are less than one step")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def teacher():
    if not TEACHER.is_dir():
        pytest.skip("teachers/stdlib-1m is not there")
    return AutoModelForCausalLM.from_pretrained(TEACHER).eval(), AutoTokenizer.from_pretrained(TEACHER)


def test_the_teacher_in_the_repository_is_small(teacher):
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 4 * 2**20
    assert len(teacher[1]) == teacher[0].config.vocab_size == 1024


@torch.no_grad()
def test_the_teacher_in_the_repository_knows_python(teacher):
    model, tokenizer = teacher

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids, labels=ids).loss)

    code = "\ndef main(args=None):\n    if args is None:\n        args = sys.argv[1:]\n    return 0\n"
    words = code.split(" ")
    assert loss(code) < loss(" ".join(reversed(words))) - 1
    ids = tokenizer("    def __init__(", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]) == "self"


@pytest.mark.slow
def test_the_recall_teacher_is_examined_and_written_with_a_text_to_distil_it_on(tmp_path):
    output, work = tmp_path / "teacher", tmp_path / "work"
    shape = (
        "--vocabulary 320 --hidden 16 --heads 2 --kv-heads 1 --intermediate 32 --batch-size 4 --text-rows 5 --samples 4"
    )
    done = run("--task", "recall", "--output", output, "--work", work, "--steps", "4", *shape.split())
    assert done.returncode == 0, done.stderr
    assert "step 4: loss" in done.stdout
    assert "associative, 32 items, length 128: " in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(output)
    rows = (work / "rows.txt").read_text().splitlines()
    assert len(rows) == 5
    for row in rows:
        assert tokenizer(row)["input_ids"] == [int(word) for word in row.split()]
    assert AutoModelForCausalLM.from_pretrained(output).config.eos_token_id is None
    assert "| phonebook, 18 items, as long as needed |" in (output / "README.md").read_text()
