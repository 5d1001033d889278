"""What a teacher writes: drawn as it predicts, begun as asked, counted as it is, and the same after any kill."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from distill.conversion import load_teacher
from distill.data.recipe_text import recipe_text
from distill.data.splits import HELD_OUT, TRAIN, Extent
from distill.errors import UserError
from distill.recipe import Data
from distill.writing import (
    Writing,
    Written,
    beginnings_of_training_documents,
    special_ids,
    write_documents,
)
from stages import write
from tests.conftest import CHECKOUT
from tests.distill.data.folders import killed_at, touching_files

SMALL = Writing(length=12, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(CHECKOUT / "teachers" / "stdlib-1m")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKOUT / "teachers" / "stdlib-1m")


@pytest.fixture
def make(teacher, tokenizer, tmp_path):
    def make(name: str, writing: Writing = SMALL, tokens: int = 100, rows: list[list[int]] | None = None) -> Written:
        out = tmp_path / f"{name}.jsonl"
        return write_documents(teacher, tokenizer, rows or [[tokenizer.bos_token_id]], writing, out, tokens=tokens)

    return make


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_what_is_told_is_what_is_there(make, tokenizer, tmp_path):
    written = make("a")
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts_of(tmp_path / "a.jsonl")]
    assert (written.documents, written.tokens) == (len(encoded), sum(map(len, encoded)))
    assert 100 <= written.tokens < 100 + 4 * 12
    assert max(map(len, encoded)) <= 11  # BOS is one of the twelve
    assert json.loads((tmp_path / "a.json").read_text()).items() >= asdict(written).items()


def test_the_likeliest_tokens_alone_are_what_the_teacher_writes_greedily(make, teacher, tokenizer, tmp_path):
    prompts = ["import ", "def f(", "class A"]
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"][:2] for prompt in prompts]
    make("a", replace(SMALL, top_p=1e-9, batch_size=3), tokens=30, rows=rows)
    wanted = [list(row) for row in rows]
    for ids in wanted:
        while len(ids) < 12:
            with torch.no_grad():
                ids.append(int(teacher(torch.tensor([ids])).logits[0, -1].argmax()))
    assert not special_ids(tokenizer) & {token for ids in wanted for token in ids}
    assert texts_of(tmp_path / "a.jsonl") == [tokenizer.decode(ids) for ids in wanted]


def test_tokens_come_as_often_as_the_teacher_expects_them(teacher, tokenizer, make, tmp_path):
    row = [tokenizer.bos_token_id, *tokenizer("import", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        expected_V = teacher(torch.tensor([row])).logits[0, -1].softmax(-1)
    make("a", Writing(length=len(row) + 1, batch_size=1500), tokens=1, rows=[row])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts_of(tmp_path / "a.jsonl")]
    likeliest = int(expected_V.argmax())
    share = sum(document[len(row) - 1 :] == [likeliest] for document in ids) / 1500
    p = float(expected_V[likeliest])
    assert 0.1 < p < 0.9
    assert abs(share - p) < 4 * (p * (1 - p) / 1500) ** 0.5


def test_documents_end_at_any_special_token_and_hold_none(make, teacher, tokenizer, tmp_path):
    bos = tokenizer.bos_token_id

    def as_likely_as_all_others(module, inputs, logits_BTV):
        logits_BTV[..., bos] = logits_BTV.logsumexp(-1) - 1.5
        return logits_BTV

    handle = teacher.lm_head.register_forward_hook(as_likely_as_all_others)
    try:
        written = make("a")
    finally:
        handle.remove()
    assert 0 < written.ended < written.documents
    marks = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    assert not [text for text in texts_of(tmp_path / "a.jsonl") for mark in marks if mark in text]


def test_prompts_begin_training_documents_and_never_held_out_ones(library_text, tokenizer):
    source = recipe_text(Data(source=str(library_text), separator="\n\n\n", held_out={"fraction": 0.5}))
    rows = beginnings_of_training_documents(source, tokenizer, 1000, 8, bos=True)
    assert {len(row) for row in rows} == {9}
    by_split: dict[str, set] = {TRAIN: set(), HELD_OUT: set()}
    for document, split, _ in source.read(None, Extent()):
        by_split[split].add(tuple(tokenizer(document.text, add_special_tokens=False)["input_ids"][:8]))
    begun = {tuple(row[1:]) for row in rows}
    assert begun <= by_split[TRAIN]
    held_out_alone = by_split[HELD_OUT] - by_split[TRAIN]
    assert held_out_alone
    assert not begun & held_out_alone
    assert beginnings_of_training_documents(source, tokenizer, 3, 8, bos=True) == rows[:3]
    with pytest.raises(UserError, match="more than 1000000 tokens"):
        beginnings_of_training_documents(source, tokenizer, 3, 1_000_000, bos=True)


@pytest.fixture
def library_text(tmp_path) -> Path:
    path = tmp_path / "library.txt"
    path.write_text((Path(os.__file__).parent / "shutil.py").read_text())
    return path


def test_a_kill_at_any_operation_on_files_changes_nothing(make, tmp_path):
    """Each process goes on from the last one's batches and dies one operation later than it."""
    make("undisturbed")
    kills = 0
    while killed_at(kills + 1, touching_files, lambda: make("data")):
        kills += 1
    assert kills > 20
    make("data")
    for ending in ("jsonl", "json"):
        same = [(tmp_path / f"{name}.{ending}").read_bytes() for name in ("data", "undisturbed")]
        assert same[0] == same[1]
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_written_again_and_other_settings_are_refused(make, tmp_path):
    written = make("a")
    before = (tmp_path / "a.jsonl").stat().st_mtime_ns
    assert make("a") == written
    assert (tmp_path / "a.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a\.jsonl is there already"):
        make("a", replace(SMALL, seed=4))
    (tmp_path / "b.jsonl").write_text("somebody's")
    with pytest.raises(UserError, match=r"b\.jsonl is there already"):
        make("b")


def test_seeds_and_batches_differ(make, tmp_path):
    make("a")
    make("b", replace(SMALL, seed=4))
    texts = texts_of(tmp_path / "a.jsonl")
    assert texts != texts_of(tmp_path / "b.jsonl")
    assert texts[:4] != texts[4:8]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"length": 9, "prompt_tokens": 8}, "length is 9; it must be more than BOS and the prompt"),
    ],
)
def test_impossible_settings_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        replace(SMALL, **change)


def test_more_than_the_teacher_reads_is_refused(make):
    with pytest.raises(UserError, match="length is 100000; the teacher knows"):
        make("a", replace(SMALL, length=100_000))


def test_the_program_writes_what_its_recipe_will_train_on(library_text, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "written.jsonl"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "teacher": {"path": str(CHECKOUT / "teachers" / "stdlib-1m")},
        "data": {"source": str(library_text), "separator": "\n\n\n", "block": 16, "training_only": str(out)},
        "stages": {"logits": {"tokens": 1024}},
    }
    recipe.write_text(yaml.safe_dump(settings))
    write.main(recipe, [], tokens="100", output=out, prompt_tokens=4, batch_size=4)
    said = capsys.readouterr().out
    assert f"{sum(1 for _ in out.open())} documents, begun with 4 tokens of" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        write.main(recipe, [], tokens="many", output=out)
    assert "--tokens many: give tokens" in capsys.readouterr().err
