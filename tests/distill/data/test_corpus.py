import pytest

from distill.data import Document, read_documents, split_documents
from distill.errors import UserError


def names(documents) -> list[str]:
    return [document.name for document in documents]


def test_the_standard_library_is_read_by_relative_name_and_in_order(stdlib):
    assert names(stdlib) == sorted(names(stdlib))
    assert {"json/decoder.py", "asyncio/base_events.py", "typing.py"} <= set(names(stdlib))
    tops = {part for name in names(stdlib) for part in name.split("/")[:-1]}
    assert not tops & {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data"}
    assert sum(len(document.text) for document in stdlib) > 5_000_000
    assert all(document.text.strip() for document in stdlib)


def test_reading_twice_gives_the_same_documents(stdlib):
    assert list(read_documents("python-stdlib")) == stdlib


def test_a_file_is_one_document_unless_a_separator_cuts_it(shared_text):
    path = shared_text / "tinystories.txt"
    (whole,) = read_documents(path)
    assert whole == Document("tinystories.txt", path.read_text())

    stories = list(read_documents(path, separator="\n\n"))
    assert len(stories) > 500
    assert "\n\n".join(story.text for story in stories) == whole.text.removesuffix("\n\n")
    assert all(story.text.strip() for story in stories)


def test_folder_glob_and_list_name_files_the_same_way(shared_text):
    folder = names(read_documents(shared_text))
    assert folder == ["tinyshakespeare.txt", "tinystories.txt", "wikitext2-valid.txt"]
    assert names(read_documents(shared_text / "*.txt")) == folder
    assert names(read_documents([shared_text / "tinystories.txt", str(shared_text / "wiki*")])) == folder[1:]


def test_a_folder_is_searched_in_depth_and_hidden_files_are_left_alone(tmp_path):
    for name in ("b.md", "a/deep/x.py", "a/deep/data.bin", ".git/config.txt", "a/__pycache__/y.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a/__init__.py").touch()
    assert names(read_documents(tmp_path)) == ["a/deep/x.py", "b.md"]
    assert names(read_documents(tmp_path / "a" / "**" / "*.py")) == ["__pycache__/y.py", "deep/x.py"]


def test_names_do_not_depend_on_where_the_source_lies(tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place / "a").mkdir(parents=True)
        (tmp_path / place / "a/one.txt").write_text("one")
    here, there = read_documents(tmp_path / "here"), read_documents(tmp_path / "there")
    assert list(here) == list(there)
    monkeypatch.chdir(tmp_path / "here")
    assert names(read_documents("a/*.txt")) == names(read_documents(tmp_path / "there/a/*.txt")) == ["one.txt"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/folder", "no such file or folder"),
        ("no/*.txt", "no such file or folder"),
        ([], "empty list"),
        ("dataset:", "allowed: dataset:ORG/NAME"),
        ("dataset:a:b:c:d", "allowed: dataset:ORG/NAME"),
    ],
)
def test_a_source_that_is_not_there_is_said(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        list(read_documents(source))


def test_a_folder_without_text_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no file that ends in one of .*\.txt"):
        list(read_documents(tmp_path))
    (tmp_path / "__init__.py").touch()
    with pytest.raises(UserError, match="holds no text at all"):
        list(read_documents(tmp_path))


def test_an_empty_separator_is_said(tmp_path):
    with pytest.raises(UserError, match="separator is empty"):
        list(read_documents(tmp_path, separator=""))


def test_split_by_hash_is_a_partition_near_the_fraction(stdlib):
    train, held_out = split_documents(stdlib, fraction=0.1)
    assert sorted(names(train) + names(held_out)) == names(stdlib)
    assert 0.07 < len(held_out) / len(stdlib) < 0.14


def test_split_by_hash_never_moves_a_document(stdlib):
    _, before = split_documents(stdlib[::2], fraction=0.1)
    _, after = split_documents(list(reversed(stdlib)), fraction=0.1)
    assert set(names(before)) == set(names(after)) & set(names(stdlib[::2]))
    # The rule itself is frozen: another one would let a trained model see held-out text.
    sides = split_documents([Document(f"{i}.py", "x") for i in range(30)], fraction=0.1)[1]
    # Derived with sha256sum: the first 48 bits, below a tenth of 2**48.
    assert names(sides) == ["8.py", "13.py", "14.py", "27.py"]


def test_adding_rows_to_a_file_moves_no_row(shared_text, tmp_path):
    text = (shared_text / "tinystories.txt").read_text()
    file = tmp_path / "stories.txt"
    file.write_text(text)
    _, before = split_documents(read_documents(file, separator="\n\n"), fraction=0.1)
    file.write_text("Once upon a time there was a new story.\n\n" + text)
    train, after = split_documents(read_documents(file, separator="\n\n"), fraction=0.1)
    assert len(before) > 50
    assert [d for d in after if "a new story" not in d.text] == before
    assert not {d.text for d in train} & {d.text for d in after}


def test_split_by_tail_cuts_the_last_fraction_of_characters_at_a_border(shared_text):
    stories = list(read_documents(shared_text / "tinystories.txt", separator="\n\n"))
    train, held_out = split_documents(stories, fraction=0.2, by="tail")
    assert train + held_out == stories
    total = sum(len(story.text) for story in stories)
    off = abs(sum(len(story.text) for story in held_out) - 0.2 * total)
    assert off <= max(len(train[-1].text), len(held_out[0].text)) / 2


@pytest.mark.parametrize(("lengths", "n_train"), [([10, 10], 1), ([1, 99], 1), ([99, 1], 1), ([50, 30, 20], 2)])
def test_split_by_tail_leaves_something_on_both_sides(lengths, n_train):
    documents = [Document(str(i), "x" * length) for i, length in enumerate(lengths)]
    train, _ = split_documents(documents, fraction=0.1, by="tail")
    assert len(train) == n_train


@pytest.mark.parametrize("by", ["hash", "tail"])
def test_one_document_cannot_be_split(by, shared_text):
    with pytest.raises(UserError, match=r"data\.separator"):
        split_documents(read_documents(shared_text / "tinyshakespeare.txt"), fraction=0.1, by=by)


@pytest.mark.parametrize(("fraction", "by"), [(0.0, "hash"), (1.0, "tail"), (-0.1, "hash"), (0.1, "name")])
def test_impossible_splits_are_said(fraction, by):
    with pytest.raises(UserError, match="allowed"):
        split_documents([Document("a", "a"), Document("b", "b")], fraction=fraction, by=by)
