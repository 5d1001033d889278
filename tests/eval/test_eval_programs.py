"""eval.perplexity and eval.agreement on saved tiny models and a real file of text."""

import json
import math

import pytest
from synthetic_run import TEXT, characters, noisy, packed, tiny_teacher

from distill.evaluation import evaluate, layer_distances
from eval import agreement, perplexity


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of a student, and the two."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), characters()
    teacher = tiny_teacher(len(tokenizer))
    student = noisy(teacher, 0.1)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, student, teacher


@pytest.fixture
def text(tmp_path):
    (tmp_path / "day.txt").write_text(TEXT[:79])  # with the BOS: two whole blocks of 40
    return str(tmp_path / "day.txt")


@pytest.fixture
def batches():
    return [packed(characters()(TEXT[:79])["input_ids"])]


def test_perplexity(models, text, batches, capsys):
    folder, student, _ = models
    expected = evaluate(student, None, batches)
    perplexity.main(str(folder / "student"), [text], block=40, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert told["tokens"] == expected.tokens == 78
    perplexity.main(str(folder / "student"), [text], block=40)
    assert f"perplexity  {math.exp(expected.loss):.3f}\n" in capsys.readouterr().out


def test_agreement(models, text, batches, capsys):
    folder, student, teacher = models
    expected = evaluate(student, teacher, batches)
    agreement.main(str(folder / "student"), str(folder / "teacher"), [text], block=40, as_json=True)
    told = json.loads(capsys.readouterr().out)
    for name in ("loss", "teacher_loss", "kl", "agreement"):
        assert told[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert told["layer_distances"] == pytest.approx(layer_distances(student, teacher, batches), rel=1e-5)
    agreement.main(str(folder / "student"), str(folder / "teacher"), [text], block=40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"agreement   {100 * expected.agreement:.1f}% of next tokens"
    assert len([line for line in lines if line.startswith("layer")]) == 3


def test_only_so_much_text_is_scored(models, text, capsys):
    folder, *_ = models
    perplexity.main(str(folder / "student"), [text], block=40, tokens=30, as_json=True)
    assert json.loads(capsys.readouterr().out)["tokens"] == 39


def refused(capsys, program, *arguments, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program(*arguments, **options)
    assert end.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    assert told.err.count("\n") == 1
    return told.err


def test_mistakes_are_told_in_one_line(models, text, tmp_path, capsys):
    folder, *_ = models
    student = str(folder / "student")
    assert "there is no such folder" in refused(capsys, perplexity.main, str(tmp_path / "none"), [text])
    assert "has no config.json" in refused(capsys, perplexity.main, str(tmp_path), [text])
    assert "none.txt" in refused(capsys, perplexity.main, student, [str(tmp_path / "none.txt")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    assert "broken" in refused(capsys, perplexity.main, str(tmp_path / "broken"), [text])


def test_models_of_other_tokenizers_are_refused(models, text, tmp_path, capsys):
    folder, _, teacher = models
    tokenizer = characters()
    tokenizer.add_tokens(["zebra"])
    teacher.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    told = refused(capsys, agreement.main, str(folder / "student"), str(tmp_path / "other"), [text])
    assert "different tokenizers" in told
