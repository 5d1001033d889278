"""Preparing data: options, reuse, damage of what is there. What happens on the way to it: ``test_parts``."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.data import Blocks, Document, pack, prepare, split_documents
from distill.errors import UserError
from tests.distill.data.folders import files_of, tokens_of

BLOCK = 128


@pytest.fixture(scope="session")
def halves(library):
    return split_documents(library[:8], fraction=0.3, by="tail")


def identity(folder: Path) -> dict[str, int]:
    """Which files lie there: rewriting one, even with the same bytes, gives another inode or time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_each_document_gets_the_specials_that_are_asked_for_once(halves, tokenizer, tmp_path, bos, eos):
    prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK, bos=bos, eos=eos)
    for document, ids in zip(halves[0], Blocks(tmp_path / "data", "train", BLOCK).documents(), strict=True):
        plain = tokenizer.encode(document.text, add_special_tokens=False)
        before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
        assert ids.tolist() == before + plain + after
    # The tokenizer would have added its own, had it been let.
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id


def test_a_special_that_the_tokenizer_lacks_is_said(halves, plain_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data\.bos is true, but the tokenizer has no BOS"):
        prepare(*halves, plain_tokenizer, tmp_path / "data", block=BLOCK)
    with pytest.raises(UserError, match=r"data\.eos is true"):
        prepare(*halves, plain_tokenizer, tmp_path / "data", block=BLOCK, bos=False, eos=True)
    prepare(*halves, plain_tokenizer, tmp_path / "data", block=BLOCK, bos=False)


def test_a_finished_teacher_is_served_by_its_own_tokenizer(halves, tmp_path):
    teacher = Path(__file__).resolve().parents[3] / "teachers" / "stdlib-1m"
    if not teacher.is_dir():
        pytest.skip("teachers/stdlib-1m is not there")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    backend = tokenizers.Tokenizer.from_file(str(teacher / "tokenizer.json"))
    prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)
    ids = next(Blocks(tmp_path / "data", "train", BLOCK).documents()).tolist()
    assert ids == backend.encode(halves[0][0].text).ids, "AutoTokenizer and tokenizer.json disagree"


def test_vocabularies_beyond_uint16_take_four_bytes(halves, tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<bos>": 70_000}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>")
    documents = [Document("a", "w69999 w1 w65536 w65535"), Document("b", "w2 w3")]
    manifest = prepare(documents, documents, tokenizer, tmp_path / "data", block=4)
    assert manifest.dtype == "<u4"
    assert tokens_of(tmp_path / "data") == [[70_000, 69_999, 1, 65_536, 65_535], [70_000, 2, 3]]


def test_small_vocabularies_take_two_bytes(halves, tokenizer, tmp_path):
    manifest = prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)
    assert manifest.dtype == "<u2"
    size = (tmp_path / "data" / "train.tokens").stat().st_size
    assert size == 2 * manifest.splits["train"].tokens


def test_chunks_parts_and_workers_change_nothing(halves, tokenizer, tmp_path, monkeypatch):
    prepare(*halves, tokenizer, tmp_path / "one", block=BLOCK)
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 1)
    monkeypatch.setattr(pack, "PART_CHARACTERS", 10_000)
    for workers in (1, 3):
        folder = tmp_path / f"many-{workers}"
        prepare(*halves, tokenizer, folder, block=BLOCK, workers=workers)
        assert files_of(folder) == files_of(tmp_path / "one")


def test_a_lone_surrogate_is_text_like_any_other(halves, tokenizer, tmp_path):
    """JSON may hold one: it must not end hours of preparation."""
    train, held_out = halves
    odd = [Document("odd", "caf\ud800\u00e9 " * 100), *train]
    prepare(odd, held_out, tokenizer, tmp_path / "data", block=BLOCK)
    assert tokenizer.decode(tokens_of(tmp_path / "data")[0][1:]) == "caf?\u00e9 " * 100


def test_the_same_things_are_not_prepared_twice(halves, tokenizer, tmp_path):
    first = prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)
    before = identity(tmp_path / "data")
    tokenizer(["left behind by another call", "a"], padding=True, truncation=True, max_length=4)
    assert prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK // 2) == first
    assert identity(tmp_path / "data") == before


def test_another_text_tokenizer_or_option_is_prepared_anew(halves, tokenizer, tmp_path):
    train, held_out = halves
    edited = [Document(train[0].name, train[0].text.replace("JSON", "YAML")), *train[1:]]
    renamed = [Document("renamed.py", train[0].text), *train[1:]]
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    changed = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    cases = [
        (train, tokenizer, {}),
        (edited, tokenizer, {}),
        (renamed, tokenizer, {}),
        (train[1:], tokenizer, {}),
        (train, changed, {}),
        (train, tokenizer, {"eos": True}),
        (train, tokenizer, {"bos": False}),
    ]
    fingerprints = set()
    for number, (documents, tok, options) in enumerate(cases):
        reused, fresh = tmp_path / "data", tmp_path / f"fresh-{number}"
        for folder in (reused, fresh):
            manifest = prepare(documents, held_out, tok, folder, block=BLOCK, **options)
        assert files_of(reused) == files_of(fresh)
        fingerprints.add(manifest.fingerprint)
    assert len(fingerprints) == len(cases)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in ("train.tokens", "held_out.starts") for damage in ("cut", "flip", "remove")]
    + [("manifest.json", "cut"), ("manifest.json", "flip")],
)
def test_damaged_files_are_prepared_anew(halves, tokenizer, tmp_path, name, damage):
    folder = tmp_path / "data"
    prepare(*halves, tokenizer, folder, block=BLOCK)
    whole = files_of(folder)
    path = folder / name
    if damage == "cut":
        path.write_bytes(whole[name][: len(whole[name]) // 2])
    elif damage == "flip":
        path.write_bytes(bytes([whole[name][0] ^ 1]) + whole[name][1:])
    else:
        path.unlink()
    prepare(*halves, tokenizer, folder, block=BLOCK)
    assert files_of(folder) == whole


def test_a_folder_of_something_else_is_not_overwritten(halves, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other than prepared data"):
        prepare(*halves, tokenizer, tmp_path, block=BLOCK)
    with pytest.raises(UserError, match="is a file"):
        prepare(*halves, tokenizer, tmp_path / "thesis.txt", block=BLOCK)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_taken(halves, tokenizer, tmp_path):
    prepare(*halves, tokenizer, tmp_path, block=BLOCK)
    assert tokens_of(tmp_path)


@pytest.mark.parametrize(("short", "said"), [(0, "the train text has"), (1, "the held-out text has")])
def test_a_text_shorter_than_one_block_is_said(halves, tokenizer, tmp_path, short, said):
    documents = list(halves)
    documents[short] = [Document("a", "import os\n")]
    with pytest.raises(UserError, match=rf"{said} \d+ tokens, less than one block of {BLOCK}"):
        prepare(*documents, tokenizer, tmp_path / "data", block=BLOCK)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(halves, tokenizer, tmp_path, monkeypatch):
    def no_space(file: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"data.*: the disk is full\. .* free some space"):
        prepare(*halves, tokenizer, tmp_path / "run" / "data", block=BLOCK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said(halves, tokenizer, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"data: the prepared data cannot be written \(Permission denied\)"):
        prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)


def test_the_manifest_counts_what_is_there(halves, tokenizer, tmp_path):
    prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)
    facts = json.loads((tmp_path / "data" / "manifest.json").read_text())
    for name, documents in zip(("train", "held_out"), halves, strict=True):
        split = facts["splits"][name]
        assert split["documents"] == len(documents)
        assert split["characters"] == sum(len(document.text) for document in documents)
        assert split["utf8_bytes"] == sum(len(document.text.encode()) for document in documents)
        assert split["tokens"] == len(np.fromfile(tmp_path / "data" / f"{name}.tokens", facts["dtype"]))


def test_a_folder_of_another_format_is_said(halves, tokenizer, tmp_path):
    prepare(*halves, tokenizer, tmp_path / "data", block=BLOCK)
    path = tmp_path / "data" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(UserError, match="has format 99, not 2"):
        Blocks(tmp_path / "data", "train", BLOCK)
