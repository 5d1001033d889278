"""Text that is trained on and never held out: what is held out stays, bit for bit, as it would be without it."""

import json
from pathlib import Path

import pytest

from distill.data import pack, prepare_recipe_text
from distill.errors import UserError
from distill.recipe import Data
from tests.distill.data.folders import files_of, killed_at, n_parts, sealing, tokens_of

BLOCK = 64
TAIL = {"held_out": {"fraction": 0.2, "by": "tail"}}
OPTIONS = [{}, TAIL, {"limit": 30_000}]


@pytest.fixture
def make(library, tokenizer, tmp_path, monkeypatch):
    """Prepare real text, with or without more that was written in two files."""
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 3_000)
    monkeypatch.setattr(pack, "PART_CHARACTERS", 15_000)
    write(tmp_path / "real.jsonl", [piece for document in library for piece in document.text.split("\n\n\n")])
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", written(name))

    def make(name: str, *more: str, **options) -> dict[str, bytes]:
        source, more = str(tmp_path / "real.jsonl"), tuple(str(tmp_path / file) for file in more)
        prepare_recipe_text(Data(source=source, training_only=more, block=BLOCK, **options), tokenizer, tmp_path / name)
        return files_of(tmp_path / name)

    return make


def written(name: str) -> list[str]:
    return [f"{name}{i} = " + "x" * 900 for i in range(40)]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize("options", OPTIONS, ids=["hash", "tail", "limit"])
def test_it_is_trained_on_and_what_is_held_out_stays(make, tmp_path, tokenizer, options):
    without = make("without", **options)
    added = make("with", "a.jsonl", "b.jsonl", **options)
    assert added["held_out.tokens"] == without["held_out.tokens"]
    assert added["held_out.starts"] == without["held_out.starts"]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens_of(tmp_path / "with")]
    assert texts[-80:] == written("a") + written("b")
    assert tokens_of(tmp_path / "with")[:-80] == tokens_of(tmp_path / "without")


@pytest.mark.parametrize("options", [{}, TAIL], ids=["hash", "tail"])
def test_it_may_be_all_that_is_trained_on(make, tmp_path, tokenizer, options):
    without = make("without", **options)
    alone = make("alone", "a.jsonl", train_on_source=False, **options)
    assert alone["held_out.tokens"] == without["held_out.tokens"]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens_of(tmp_path / "alone")]
    assert texts == written("a")


@pytest.mark.parametrize(
    "options", [{}, {"limit": 30_000}, {"train_on_source": False, **TAIL}], ids=["hash", "limit", "alone"]
)
def test_what_a_kill_interrupts_ends_with_the_same_bytes(make, tmp_path, options):
    undisturbed = make("undisturbed", "a.jsonl", "b.jsonl", **options)
    kills = 0
    # Each process dies before the second part it makes, so that one or another dies in either kind of text.
    while killed_at(2, sealing, lambda: make("data", "a.jsonl", "b.jsonl", **options)):
        kills += 1
        assert n_parts(tmp_path / "data") == kills
    assert kills > 3
    assert make("data", "a.jsonl", "b.jsonl", **options) == undisturbed


def test_text_that_comes_or_goes_is_noticed(make):
    without, added = make("data"), make("data", "a.jsonl")
    assert len(added["train.tokens"]) > len(without["train.tokens"])
    assert make("data") == without


def test_the_request_of_a_recipe_without_it_is_what_it_was_before_there_was_any(make, tmp_path):
    """So that what older versions prepared is not prepared again."""
    from distill.data.recipe_text import recipe_text

    path = tmp_path / "real.jsonl"
    found = path.stat()
    request = recipe_text(Data(source=str(path), block=BLOCK)).request()
    assert request == [["text", None, "hash", 0.1], [["real.jsonl", found.st_size, found.st_mtime_ns]]]


def test_mistakes_are_named(make, tmp_path):
    with pytest.raises(UserError, match=r"data\.training_only '.*none\.jsonl': no such file or folder"):
        make("data", "none.jsonl")
    with pytest.raises(ValueError, match=r"training_only: .*real\.jsonl is in source too"):
        make("data", "real.jsonl")
    with pytest.raises(ValueError, match="train_on_source: false needs training_only"):
        make("data", train_on_source=False)
