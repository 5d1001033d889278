"""The text of a recipe: streamed, split on the way, cut at a limit; restarted, with real processes and real files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from distill.data import Blocks, pack, prepare, prepare_recipe_text, read_documents, split_documents
from distill.errors import UserError
from distill.recipe import Data, Recipe
from tests.conftest import CHECKOUT
from tests.distill.data.folders import files_of, journal_of, killed_at, n_parts, sealing, tokens_of
from tests.distill.data.test_workers import is_running

BLOCK = 64


@pytest.fixture(scope="module")
def texts(library) -> list[str]:
    """Some hundred functions and classes."""
    return [piece for document in library for piece in document.text.split("\n\n\n")]


@pytest.fixture
def source(texts, tmp_path) -> Path:
    """A folder of Parquet shards of five row groups each, as the Hub has them."""
    folder = tmp_path / "org" / "code"
    folder.mkdir(parents=True)
    for shard in range(4):
        write_shard(folder / f"train-{shard}.parquet", texts[shard::4])
    return folder


def write_shard(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=-(-len(texts) // 5))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 3_000)
    monkeypatch.setattr(pack, "PART_CHARACTERS", 15_000)


@pytest.fixture
def make(source, tokenizer, tmp_path, monkeypatch):
    """Prepare a folder; what it holds then."""
    monkeypatch.chdir(tmp_path)  # so that org/code is to datasets what a repository of the Hub is

    def make(name: str = "data", source: object = source, **options) -> dict[str, bytes]:
        data = Data(source=source if isinstance(source, list) else str(source), block=BLOCK, **options)
        prepare_recipe_text(data, tokenizer, tmp_path / name)
        return files_of(tmp_path / name)

    return make


@pytest.mark.parametrize("by", ["hash", "tail"])
def test_the_tokens_are_those_of_documents_read_and_split_at_once(make, source, tokenizer, tmp_path, by):
    make(held_out={"fraction": 0.2, "by": by})
    prepare(*split_documents(read_documents(source), fraction=0.2, by=by), tokenizer, tmp_path / "list", block=BLOCK)
    for split in ("train", "held_out"):
        assert tokens_of(tmp_path / "data", split) == tokens_of(tmp_path / "list", split)
    fingerprints = [Blocks(tmp_path / name, "train", BLOCK).fingerprint for name in ("data", "list")]
    assert fingerprints[0] == fingerprints[1]


def test_a_stream_gives_what_the_files_give(make, tmp_path, small_parts):
    make("files", source="org/code/*.parquet")
    make("stream", source="dataset:org/code", streaming=True)
    assert sorted(tokens_of(tmp_path / "stream") + tokens_of(tmp_path / "stream", "held_out")) == sorted(
        tokens_of(tmp_path / "files") + tokens_of(tmp_path / "files", "held_out")
    )


def test_a_stream_is_what_would_be_downloaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    streamed = make("stream", source="dataset:org/code", streaming=True)
    downloaded = make("download", source="dataset:org/code")
    del streamed["manifest.json"], downloaded["manifest.json"]
    assert streamed == downloaded


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{}, {"held_out": {"by": "tail"}}, {"source": "dataset:org/code", "streaming": True}, {"limit": 30_000}],
    ids=["files", "tail", "stream", "limit"],
)
def test_what_a_kill_interrupts_ends_with_the_same_bytes(make, tmp_path, small_parts, options, workers):
    undisturbed = make("undisturbed", **options)
    for part in (2, 3):  # the second process goes on from the first part, and dies in the third
        assert killed_at(part, sealing, lambda: make(**options, workers=workers))
    assert n_parts(tmp_path / "data") == 3
    assert make(**options, workers=workers) == undisturbed


PREPARE = """
import os, sys
from pathlib import Path
from transformers import AutoTokenizer
from distill.data import pack, prepare_recipe_text
from distill.recipe import Data
from tests.distill.data.folders import kill_at, sealing
from tests.distill.data.test_workers import children

if __name__ == "__main__":
    pack.CHUNK_CHARACTERS, pack.PART_CHARACTERS = 3_000, 15_000
    tokenizer, source, folder, part = sys.argv[1:]
    kill_at(int(part), sealing, before=lambda: print(*children(os.getpid()), flush=True))
    data = Data(source=source, block=64, workers=2)
    prepare_recipe_text(data, AutoTokenizer.from_pretrained(tokenizer), Path(folder))
"""


@pytest.mark.slow
def test_a_program_that_is_killed_with_its_workers_at_work(make, source, tokenizer, tmp_path):
    """A real program, started afresh each time: killed at two parts, then run to its end."""
    undisturbed = make("undisturbed")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "tokenizer"), str(source), str(tmp_path / "data")]
    for part, code in ((3, -9), (2, -9), (99, 0)):
        ended = subprocess.run([*command, str(part)], cwd=CHECKOUT, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        assert len(ended.stdout.split()) == (2 if code else 0), "the workers were there"
        if code:
            assert not (tmp_path / "data").exists()
    assert "going on from" in ended.stderr
    assert files_of(tmp_path / "data") == undisturbed
    assert not any(is_running(int(pid)) for pid in ended.stdout.split())


def test_prepared_text_is_not_read_again(make, source, tmp_path):
    made = make()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    for shard in source.iterdir():  # the same size and time, but nothing that could be read
        told = shard.stat()
        shard.write_bytes(b"PAR1" + bytes(told.st_size - 8) + b"PAR1")
        os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert make(workers=2) == made
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == times


def test_a_prepared_stream_does_without_the_hub(make, source, tmp_path):
    made = make(source="dataset:org/code", streaming=True)
    source.rename(tmp_path / "unreachable")
    assert make(source="dataset:org/code", streaming=True) == made


def test_a_changed_source_is_read_again(make, source, texts, tmp_path):
    fingerprint = json.loads(make()["manifest.json"])["fingerprint"]
    shard = source / "train-1.parquet"
    os.utime(shard)
    again = json.loads(make()["manifest.json"])
    assert again["fingerprint"] == fingerprint, "another time, but the same text"
    write_shard(shard, [*texts[1::4], "one more text"])
    assert json.loads(make()["manifest.json"])["fingerprint"] != fingerprint


def test_a_shard_that_is_cut_short_is_named_before_hours_of_work(make, source, tmp_path):
    shard = source / "train-3.parquet"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"train-3\.parquet: cannot be read as Parquet .*; is the file whole\?"):
        make()
    assert not (tmp_path / "data").exists()
    assert not journal_of(tmp_path / "data").parent.exists()


def test_a_shard_that_is_damaged_inside_is_replaced_and_nothing_is_lost(make, source, tmp_path, small_parts, capfd):
    undisturbed = make("undisturbed")
    shard = source / "train-2.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes(4000) + whole[6000:])
    with pytest.raises(UserError, match=r"train-2\.parquet: cannot be read as Parquet"):
        make()
    assert n_parts(tmp_path / "data") > 2
    shard.write_bytes(whole)
    assert without_request(make()) == without_request(undisturbed)
    assert "in 3 part(s)" in capfd.readouterr().err


def test_parts_of_shards_before_one_that_changed_stay(make, source, tmp_path, small_parts, capfd):
    undisturbed = make("undisturbed")
    assert killed_at(6, sealing, make)
    os.utime(source / "train-1.parquet")
    assert without_request(make()) == without_request(undisturbed)
    said = capfd.readouterr().err
    assert re.search(r"[1-4] of 5 part\(s\) are not used again, because the source changed", said)
    assert "going on from" in said


def without_request(files: dict[str, bytes]) -> dict[str, bytes]:
    """A prepared folder, less the times of the files it was made from."""
    manifest = {key: value for key, value in json.loads(files["manifest.json"]).items() if key != "request"}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_stream_that_breaks_off_is_gone_on_with(make, source, tmp_path, small_parts):
    undisturbed = make("undisturbed", source="dataset:org/code", streaming=True)
    shard = source / "train-2.parquet"
    told, whole = shard.stat(), shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes(4000) + whole[6000:])
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))  # as if the network had done it
    with pytest.raises(UserError, match=r"'dataset:org/code': the stream broke off after row \d+ .*the same command"):
        make(source="dataset:org/code", streaming=True)
    assert n_parts(tmp_path / "data") > 2
    shard.write_bytes(whole)
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert make(source="dataset:org/code", streaming=True) == undisturbed


def test_a_stream_of_another_commit_is_begun_anew(make, source, texts, tmp_path, small_parts, capfd):
    options = {"source": "dataset:org/code", "streaming": True}
    assert killed_at(4, sealing, lambda: make(**options))
    write_shard(source / "train-0.parquet", texts[:50])
    assert make(**options) == make("fresh", **options)
    assert "3 of 3 part(s) are not used again" in capfd.readouterr().err


def test_an_unreachable_hub_is_said(make, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'dataset:someone/something': datasets cannot load it"):
        make(source="dataset:someone/something", streaming=True)
    assert not (tmp_path / "data").exists()


def test_a_stream_without_text_is_said(make, tmp_path):
    (tmp_path / "org" / "empty").mkdir()
    write_shard(tmp_path / "org" / "empty" / "train.parquet", [" ", "\n"])
    with pytest.raises(UserError, match="'dataset:org/empty' holds no text at all"):
        make(source="dataset:org/empty", streaming=True)
    with pytest.raises(UserError, match="no key 'story'; the keys are n, text"):
        make(source="dataset:org/code", streaming=True, text_key="story")


@pytest.mark.parametrize("limit", [5_000, 20_000])
def test_the_document_that_reaches_the_limit_is_the_last(make, tmp_path, limit):
    make("all")
    make("some", limit=limit, held_out={"fraction": 0.5})
    some = tokens_of(tmp_path / "some")
    assert sum(map(len, some)) >= limit > sum(map(len, some[:-1]))


def test_a_limit_cuts_and_does_not_choose(make, source, tokenizer, tmp_path, small_parts):
    make("all")
    make("some", limit=20_000)
    some, every = tokens_of(tmp_path / "some"), tokens_of(tmp_path / "all")
    assert 0 < len(some) < len(every)
    assert some == every[: len(some)]
    held_out = tokens_of(tmp_path / "some", "held_out")
    assert held_out == tokens_of(tmp_path / "all", "held_out")[: len(held_out)]
    before = Blocks(tmp_path / "all", "train", BLOCK).fingerprint
    assert Blocks(tmp_path / "some", "train", BLOCK).fingerprint != before
    make("more", limit=10**9)
    assert Blocks(tmp_path / "more", "train", BLOCK).fingerprint == before, "the same text, whatever was asked for"


def test_a_limit_ends_a_stream_that_has_no_end(make, tokenizer, tmp_path, monkeypatch):
    n_read = 0

    def rows():
        nonlocal n_read
        while True:
            n_read += 1
            yield {"text": f"number {n_read} of endlessly many"}

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr("distill.data.shards.open_hub_stream", lambda reference: (stream, "endless"))
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 1_000)
    make(source="dataset:org/endless", streaming=True, limit=5_000)
    n_used = Blocks(tmp_path / "data", "train", BLOCK).n_documents
    n_used += Blocks(tmp_path / "data", "held_out", BLOCK).n_documents
    assert n_read - n_used < 100


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 63}, "limit: 63 tokens are less than one block of 64"),
        ({"limit": "1M", "held_out": {"by": "tail"}}, "limit stops before the tail"),
        ({"streaming": True, "held_out": {"by": "tail"}}, "the length of a stream is not known"),
        ({"workers": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_wishes_are_said(options, said):
    with pytest.raises(ValidationError, match=said):
        Data(source="text", block=64, **options)


def test_workers_are_no_part_of_what_a_result_depends_on():
    recipe = {"name": "x", "teacher": {"path": "t"}, "stages": {"logits": {"tokens": 1000}}}
    one, many, limited = (
        Recipe.model_validate(recipe | {"data": {"source": "text"} | more})
        for more in ({}, {"workers": 8}, {"limit": "10K"})
    )
    assert one.digest() == many.digest()
    assert one.stage_digest("convert") == many.stage_digest("convert")
    assert one.digest() != limited.digest()
