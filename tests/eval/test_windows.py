"""A teacher with a window as a MODEL argument: how it is spelled, named and loaded, and every way to get it wrong."""

import pytest
import torch

from distill import convert, load_student
from distill.cache import cache_nbytes
from distill.errors import UserError
from distill.window import Window
from distill.windowed import window_of
from eval import windows
from eval.findings import names_of
from eval.loading import load_model, load_tokenizer
from tests.conftest import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A teacher of three layers in bfloat16 and its student with mixers in layers 0 and 2."""
    folder, teacher = tmp_path_factory.mktemp("models"), tiny("llama")
    convert(teacher, keep_attention=[1]).save_pretrained(folder / "hybrid")
    teacher.to(torch.bfloat16).save_pretrained(folder / "teacher")
    return str(folder / "teacher"), str(folder / "hybrid")


def test_what_is_spelled_is_what_is_loaded(folders):
    teacher, hybrid = folders
    assert window_of(load_model(f"{teacher}@window=8,sinks=2,layers=0+2", "cpu")) == Window((0, 2), 8, 2)
    assert window_of(load_model(f"{teacher}@window=8,layers=1-2", "cpu")) == Window((1, 2), 8, 4)
    assert windows.read(f"{teacher}@layers=all,window=3") == Window((0, 1, 2), 3)
    assert windows.read(f"{teacher}@like={hybrid},window=7,sinks=0") == Window((0, 2), 7, 0)
    assert window_of(load_model(teacher, "cpu")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_default_a_window_takes_as_many_bytes_as_the_student_s_state(folders, tmp_path, dtype):
    """Also of a student in bfloat16, whose states are fp32 and whose convolutions' inputs are not."""
    teacher, like = folders[0], str(tmp_path / "hybrid")
    load_student(folders[1]).to(dtype).save_pretrained(like)
    model, student = load_model(f"{teacher}@like={like}", "cpu"), load_model(like, "cpu")
    assert student.dtype == dtype
    ids, held = torch.randint(3, 97, (1, 900)), []
    for one in (model, student):
        cache = one(ids, use_cache=True).past_key_values
        held.append(cache_nbytes(cache) - cache.layers[1].keys.nbytes - cache.layers[1].values.nbytes)
    per_token = 2 * 2 * 2 * 8 * 2  # in two layers: keys and values of two heads, eight channels each, in two bytes
    assert held[1] - per_token < held[0] <= held[1]


def test_tables_name_the_window(folders):
    teacher, hybrid = folders
    paths = [teacher, f"{teacher}@window=64,layers=0-1", f"{teacher}@window=1,sinks=1,layers=0", hybrid]
    assert list(names_of(paths)) == ["teacher", "teacher, window 64 + 4 sinks", "teacher, window 1 + 1 sink", "hybrid"]
    twice = [f"{teacher}@window=64,layers=0", f"{teacher}@window=64,layers=1"]
    assert list(names_of(twice)) == [f"teacher, window 64 + 4 sinks in layer {layer}" for layer in (0, 1)]
    same = [f"{teacher}@window=64,layers=0", f"{teacher}@window=64,layers=0,sinks=4"]
    assert list(names_of(same)) == same


def test_a_stage_is_called_as_its_run_where_that_is_enough(tmp_path):
    stages = [tmp_path / run / stage for run, stage in (("a", "hidden"), ("a", "logits"), ("b", "logits"))]
    for stage in stages:
        stage.mkdir(parents=True)
        (stage / "stage.json").touch()
    assert list(names_of([str(stage) for stage in stages])) == ["a/hidden", "a/logits", "b"]
    assert list(names_of([str(stage) for stage in stages[1:]])) == ["a", "b"]
    with pytest.raises(UserError, match="given twice"):
        names_of([str(stages[0])] * 2)


def test_a_folder_with_the_mark_in_its_name_is_that_folder(folders, tmp_path):
    odd = tmp_path / "model@window=3"
    odd.symlink_to(folders[0])
    assert windows.read(str(odd)) is None
    assert window_of(load_model(str(odd), "cpu")) is None


def test_the_tokenizer_is_the_teacher_s(stdlib_teacher):
    assert len(load_tokenizer(f"{stdlib_teacher}@window=8,layers=0")) == len(load_tokenizer(str(stdlib_teacher)))


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        ("window=8", "give window and layers, or like"),
        ("layers=0", "give window and layers, or like"),
        ("like=HYBRID,layers=0", "give window and layers, or like"),
        ("windows=8,layers=0", "stand window, sinks, layers, like"),
        ("window=8,window=9,layers=0", "each once"),
        ("window=,layers=0", "with a value"),
        ("", "with a value"),
        ("window=0,layers=0", "no whole number from 1 on"),
        ("window=8,sinks=-1,layers=0", "no whole number from 0 on"),
        ("window=8,layers=0-3", "layers from 0 to 2"),
        ("window=8,layers=2-1", "layers from 0 to 2"),
        ("window=8,layers=first", "layers from 0 to 2"),
        ("like=TEACHER", "this model has none"),
        ("like=nowhere", "nowhere is no model folder"),
    ],
)
def test_a_wrong_spelling_says_what_is_right(folders, behind, message):
    with pytest.raises(UserError, match=message):
        load_model(f"{folders[0]}@{behind.replace('TEACHER', folders[0]).replace('HYBRID', folders[1])}", "cpu")


def test_a_window_in_a_student_is_refused(folders):
    with pytest.raises(UserError, match="not into a student"):
        load_model(f"{folders[1]}@window=8,layers=1", "cpu")
