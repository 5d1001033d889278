import json
import os
import random
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from distill.data import read_documents, readers
from distill.data.corpus import find_shards, read_shards
from distill.data.readers import read_file
from distill.errors import UserError


@pytest.fixture(scope="module")
def stories(shared_text) -> list[str]:
    return (shared_text / "tinystories.txt").read_text().split("\n\n")[:40]


def texts(source, **options) -> list[str]:
    return [document.text for document in read_documents(source, **options)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_jsonl_parquet_and_datasets_give_the_same_text(stories, tmp_path):
    rows = datasets.Dataset.from_dict({"story": stories, "n": list(range(len(stories)))})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", [{"story": story} for story in stories])
    for source in (
        "saved",
        "splits",
        "splits/train",
        "files",
        "files/rows.parquet",
        "rows.jsonl",
        ["rows.jsonl"],
    ):
        given = [tmp_path / s for s in source] if isinstance(source, list) else tmp_path / source
        assert texts(given, text_key="story") == stories, source
    assert texts(tmp_path / "splits/test", text_key="story") == stories[:1]


def test_rows_of_one_file_have_names_of_their_own(stories, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": story} for story in stories])
    names = [document.name for document in read_documents(path)]
    assert len(set(names)) == len(set(stories))
    assert all(name.startswith("rows.jsonl#") for name in names)


def test_hub_references_go_through_datasets(stories, tmp_path, monkeypatch):
    # A local folder in the place of a hub repository: `datasets` loads both by the same call.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "org" / "stories"
    data.mkdir(parents=True)
    for split, part in (("train", stories), ("validation", stories[:3])):
        datasets.Dataset.from_dict({"text": part}).to_parquet(data / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    assert texts("dataset:org/stories") == stories
    assert texts("dataset:org/stories:default:validation") == stories[:3]
    assert texts("dataset:org/stories::validation") == stories[:3]
    with pytest.raises(UserError, match=r"datasets cannot load it .*allowed: dataset:ORG/NAME"):
        texts("dataset:org/stories::nonsense")


def test_blank_and_null_rows_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": None}, {"text": " \n"}, {"text": "b"}])
    assert texts(path) == ["a", "b"]


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path):
    odd = "one\u2028two\x0cthree\x85four"
    assert texts(write_jsonl(tmp_path / "rows.jsonl", [{"text": odd}])) == [odd]


def test_text_keeps_its_line_ends_and_loses_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    assert texts(path) == ["one\r\ntwo\r"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "unfinished', r"rows\.jsonl:2: is not JSON"),
        ('["a", "b"]', r"rows\.jsonl:2: holds a list"),
        ('{"story": "a", "n": 1}', r"rows\.jsonl:2: no key 'text'; the keys are story, n"),
        ('{"text": 3}', r"rows\.jsonl:2: 'text' holds a int, not text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        texts(path)


def test_a_wrong_key_lists_the_columns(tmp_path):
    rows = datasets.Dataset.from_dict({"story": ["a"], "n": [1]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for source in ("rows.parquet", "saved"):
        with pytest.raises(UserError, match="no key 'text'; the keys are story, n"):
            texts(tmp_path / source)
    with pytest.raises(UserError, match="'n' holds a int, not text"):
        texts(tmp_path / "rows.parquet", text_key="n")


def test_damaged_containers_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read as Parquet"):
        texts(path)

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved: datasets cannot load this folder"):
        texts(tmp_path / "saved")


def test_saved_splits_without_train_are_said(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(test=rows, validation=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="holds the splits test, validation and no 'train'"):
        texts(tmp_path / "splits")
    assert texts(tmp_path / "splits/test") == ["a"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\n", "the file is empty"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.bin", b"text\0more", "is a binary file .zero byte at offset 4"),
        ("a.txt", "naïve".encode("latin-1"), "is not UTF-8 text .byte 0xef at offset 2"),
    ],
)
@pytest.mark.parametrize("separator", [None, "\n"])
def test_files_that_hold_no_text_are_named(name, data, said, separator, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: {said}"):
        texts(tmp_path / name, separator=separator)


def test_a_binary_file_among_others_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(bytes(range(32)))
    with pytest.raises(UserError, match=r"b\.txt: is a binary file"):
        texts(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        texts(path)


TEXT = "naïve — 日本語 \U0001f600 text\n\n\nwith\n\n\n\nlines\r\n and\n\n"


@pytest.mark.parametrize("separator", ["\n\n", "\n", "語", "aa", TEXT])
def test_pieces_are_those_of_the_whole_text_however_it_is_read(separator, tmp_path, monkeypatch):
    rng = random.Random(separator)
    for size in (1, 2, 3, 5, 64):
        monkeypatch.setattr(readers, "BLOCK_BYTES", size)
        text = "".join(rng.choice([TEXT, "a", "aa", "\n", "é語"]) for _ in range(60))
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert texts(tmp_path / "a.txt", separator=separator) == [t for t in text.split(separator) if t.strip()]
        assert texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("日本語".encode() + b"\xff", "byte 0xff at offset 9"),
        ("日本語".encode()[:-1], "byte 0xe8 at offset 6"),
        ("日本".encode() + b"\xe8a", "byte 0xe8 at offset 6"),
    ],
)
def test_bytes_that_are_no_text_are_found_where_they_are(data, said, size, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=said):
        texts(tmp_path / "a.txt")


@pytest.fixture
def written(tmp_path):
    """The same rows as a file of each kind, some of them blank."""
    rows = [" " if number % 7 == 0 else f"row {number}\nof a file" for number in range(50)]
    (tmp_path / "rows.txt").write_text("|".join(rows))
    write_jsonl(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet", row_group_size=12)
    return tmp_path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_is_read_on_from_any_place(kind, written):
    path = written / f"rows.{kind}"
    every = list(read_file(path, path.name, separator="|"))
    assert len(every) == 42
    for number, (place, _) in enumerate(every, start=1):
        assert list(read_file(path, path.name, separator="|", skip=place)) == every[number:]


def test_row_groups_before_the_place_are_not_read(written):
    path = written / "rows.parquet"
    every = list(read_file(path, path.name))
    first = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[4 : 4 + first.total_compressed_size] = bytes(first.total_compressed_size)
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(read_file(path, path.name))
    assert list(read_file(path, path.name, skip=12)) == [(place, row) for place, row in every if place > 12]


def test_no_file_of_rows_is_held_in_memory(tmp_path):
    """The most that Python holds on the way through 24 MB."""
    line = json.dumps({"text": "words " * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 4000)
    (tmp_path / "a.txt").write_text(("words " * 1000 + "|") * 4000)
    for name in ("a.jsonl", "a.txt"):
        tracemalloc.start()
        assert sum(1 for _ in read_documents(tmp_path / name, separator="|")) == 4000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000, name


def test_no_parquet_file_is_held_in_memory(tmp_path):
    words = random.Random(0)
    rows = [words.randbytes(3000).hex() for _ in range(4000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", row_group_size=100)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size > 12_000_000
    del rows
    before, peak = pyarrow.total_allocated_bytes(), 0
    for _ in read_documents(tmp_path / "a.parquet"):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 0 < peak < size / 4


def test_a_parquet_file_that_is_cut_short_is_named_before_any_is_read(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        datasets.Dataset.from_dict({"text": ["a" * 1000] * 100}).to_parquet(tmp_path / name)
    data = (tmp_path / "b.parquet").read_bytes()
    for damaged in (data[:-1], data[1:], data[:3], b""):
        (tmp_path / "b.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.parquet: cannot be read as Parquet"):
            read_documents(tmp_path / "*.parquet")


def test_a_stream_is_read_on_from_any_place(stories, tmp_path, monkeypatch):
    data = tmp_path / "org" / "stories"
    data.mkdir(parents=True)
    rows = [" ", *stories, None]
    for shard in range(3):
        table = pyarrow.table({"text": rows[shard::3], "n": [0] * len(rows[shard::3])})
        pyarrow.parquet.write_table(table, data / f"train-{shard}.parquet", row_group_size=5)
    monkeypatch.chdir(tmp_path)

    def read_on(position: object = None) -> list:
        """A new stream each time, and a position as a journal holds it."""
        return list(read_shards(find_shards("dataset:org/stories", streaming=True), json.loads(json.dumps(position))))

    every = read_on()
    expected = [document for _, document in every]
    assert sorted(document.text for document in expected) == sorted(stories)
    for number, (position, _) in enumerate(every, start=1):
        rest = read_on(position)
        assert [document for _, document in rest] == expected[number:]
        for again in (0, 1, 7):  # interrupted once more
            if again < len(rest):
                assert [document for _, document in read_on(rest[again][0])] == expected[number + again + 1 :]
