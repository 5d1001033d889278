"""eval.recall on a saved teacher and its student: the same examples, the JSON, the pictures, and every mistake."""

import json

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.recall import Result, examine, row_examples, text_examples
from distill.recall.sweep import cell
from eval import recall
from eval.heat_maps import heat_maps
from tests.conftest import SHAPE


@pytest.fixture(scope="module")
def models(stdlib_teacher, tmp_path_factory):
    """Folders of a tiny teacher and of a hybrid student, with the repository's own tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(stdlib_teacher)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}))
    for name, model in (("teacher", teacher), ("hybrid", convert(teacher, keep_attention=[1]))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "teacher"), str(folder / "hybrid")


def test_a_sweep_over_teacher_and_student(models, tmp_path, capsys):
    out = tmp_path / "found"
    recall.main(list(models), ["passkey"], lengths="96,160", items="1,4", output=out, samples=4, seed=5, device="cpu")
    record = json.loads((out / "recall.json").read_text())
    assert record["models"] == {"teacher": models[0], "hybrid": models[1]}
    assert list(record["results"]) == ["passkey"]
    for name, folder in record["models"].items():
        cells = {(one["items"], one["length"]): one for one in record["results"]["passkey"][name]}
        assert set(cells) == {(1, 96), (1, 160), (4, 160)}  # four keys take more than 96 tokens
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        results = examine(model.eval(), text_examples("passkey", 4, 160, samples=4, seed=5, tokenizer=tokenizer))
        assert cells[4, 160]["log_probability"] == pytest.approx(sum(r.log_probability for r in results) / 4, rel=1e-4)
        assert cells[4, 160]["chosen"] == sum(r.rank == 1 for r in results) / 4
    height, width, _ = imread(out / "passkey.png").shape
    assert width > height > 200
    told = capsys.readouterr().out
    assert "passkey, teacher\n" in told
    assert "passkey, hybrid\n" in told
    assert "passkey.png beside it" in told


def test_the_tasks_own_ids(models, tmp_path):
    recall.main(
        [models[1]],
        ["associative", "copying", "associative"],
        items="3",
        output=tmp_path,
        surface="ids",
        samples=3,
        device="cpu",
    )
    record = json.loads((tmp_path / "recall.json").read_text())
    assert list(record["results"]) == ["associative", "copying"]
    (found,) = record["results"]["associative"]["hybrid"]
    model = AutoModelForCausalLM.from_pretrained(models[1]).eval()
    results = examine(model, row_examples("associative", 3, 0, samples=3, seed=0, vocabulary=1024))
    assert found["log_probability"] == pytest.approx(sum(r.log_probability for r in results) / 3, rel=1e-4)
    assert found["tokens"] == sum(r.tokens for r in results) / 3


def test_a_cell_tells_likelihood_from_generation():
    """Two of four written, three of four preferred; what stands near the end is found, what stands far is not."""
    results = [Result(n < 2, -float(n), 1 if n < 3 else 4, 4, 10 * n, 50) for n in range(4)]
    found = cell(7, 64, results)
    assert (found.items, found.length, found.samples) == (7, 64, 4)
    assert (found.written, found.chosen, found.gap, found.chance) == (0.5, 0.75, 0.25, 0.25)
    assert (found.log_probability, found.rank, found.distance, found.tokens) == (-1.5, 1.75, 15, 50)
    assert (found.near, found.far) == (1.0, 0.0)


def test_a_picture_shows_every_score(tmp_path):
    """As SVG, whose texts can be read: one number a cell and map, none where there is no cell."""
    results = [Result(True, -1.0, 1, 4, 10, 50)]
    cells = [cell(2, 64, results), cell(2, 128, results), cell(8, 128, results)]
    heat_maps("phonebook", {"teacher": cells, "student": cells[:1]}, tmp_path / "found.svg")
    svg = (tmp_path / "found.svg").read_text()
    for text in ("teacher", "student", "Written by the model", "Preferred to the others", "Gap", "25.0%"):
        assert f"<!-- {text}" in svg or text in svg
    assert svg.count("<!-- 100 -->") == 2 * 4
    assert svg.count("<!-- 0 -->") == 4


def refused(capsys, *arguments, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        recall.main(*arguments, **options)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_told(models, tmp_path, capsys):
    teacher, out = models[0], tmp_path / "none"
    assert "choose from associative" in refused(capsys, [teacher], ["phonbook"], output=out)
    assert "there is no such folder" in refused(capsys, [str(tmp_path / "x")], ["parity"], output=out)
    assert "--items 2;4: give whole numbers" in refused(capsys, [teacher], ["parity"], items="2;4", output=out)
    assert "--items 0" in refused(capsys, [teacher], ["parity"], items="0", output=out)
    assert "is given twice" in refused(capsys, [teacher, teacher], ["parity"], output=out)
    assert "the length is 20" in refused(capsys, [teacher], ["phonebook"], lengths="20", output=out, device="cpu")
    assert not out.exists()
    out.write_text("")
    assert "is a file" in refused(capsys, [teacher], ["parity"], output=out)
