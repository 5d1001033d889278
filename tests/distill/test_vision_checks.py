"""What a recipe with images is told before anything is loaded."""

import pytest

from distill import cli
from distill.checks import check
from distill.errors import UserError
from distill.recipe import load_recipe
from tests.vision_processors import tiny_processor, write_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    tiny_processor("llava")
    return write_run(tmp_path_factory.mktemp("vision"), rows=3)


def told(recipe, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check(load_recipe(recipe, overrides))
    return str(error.value)


def test_a_recipe_with_images_is_planned(recipe, capsys):
    facts = check(load_recipe(recipe))
    assert (facts.n_layers, facts.kept, facts.vocab_size) == (3, (1,), 97)
    cli.plan(recipe)
    shown = capsys.readouterr().out
    assert "connector" in shown
    assert "vision" in shown


def test_mistakes(recipe, stdlib_teacher):
    assert "knows token blocks only" in told(recipe, "stages.logits.offline_teacher.top_k=8")
    text = (f"teacher.path={stdlib_teacher}", "student.keep_attention=[]")
    assert "is a llama, which reads no images" in told(recipe, *text)
    assert "names connector, which text does not reach" in told(recipe, "data.images=null")
    assert "data.source" in told(recipe, "data.source=python-stdlib")
    assert "neither limit nor streaming" in told(recipe, "data.limit=1000")
    assert "the processor refuses it" in told(recipe, "data.images.processor.do_rescale=maybe")


def test_a_processor_that_is_not_there_is_missed(recipe, tmp_path):
    files = recipe.parent / "teacher"
    held = {path.name: path.read_bytes() for path in files.glob("*processor_config.json")}
    try:
        for name in held:
            (files / name).unlink()
        assert "has no processor: none of processor_config.json" in told(recipe)
    finally:
        for name, content in held.items():
            (files / name).write_bytes(content)


def test_a_placeholder_without_an_image_is_the_processors_error(recipe):
    rows = recipe.parent / "rows.jsonl"
    before = rows.read_text()
    try:
        two_marks = before.replace("hello", "<image>, <image>", 1)
        rows.write_text(two_marks.replace('"images": []', '"images": ["images/1.png"]', 1))
        assert "rows.jsonl:1: 2 <image> marks or image parts and 1 images" in told(recipe)
    finally:
        rows.write_text(before)
