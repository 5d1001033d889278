"""eval.stability on a saved hybrid and its teacher: the numbers of the library, the picture, the section, mistakes."""

import pytest
import torch
from matplotlib.image import imread
from synthetic_run import TEXT, characters, packed, tiny_teacher

from distill import convert
from distill.perturbation import deviations
from distill.stability import head_exponents
from distill.student import load_model
from eval import stability
from eval.findings import read_findings
from eval.memory_maps import memory_maps, sorted_memory
from eval.sections import SECTIONS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of a hybrid that keeps attention in its middle layer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), characters()
    torch.manual_seed(0)
    teacher = tiny_teacher(len(tokenizer))
    for name, model in (("teacher", teacher), ("hybrid", convert(teacher, keep_attention=[1]))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def text(tmp_path):
    (tmp_path / "day.txt").write_text(TEXT[:79])
    return [str(tmp_path / "day.txt")]


@pytest.fixture
def found(models, text, tmp_path, capsys):
    """What the program wrote and told."""
    folders = [str(models / "hybrid"), str(models / "teacher")]
    stability.main(folders, text, block=40, output=tmp_path / "found", device="cpu")
    return read_findings(tmp_path / "found" / "stability.json"), capsys.readouterr().out


def test_the_numbers_are_the_librarys(models, found):
    record, _ = found
    assert record.models == {"hybrid": str(models / "hybrid"), "teacher": str(models / "teacher")}
    batch = packed(characters()(TEXT[:79])["input_ids"])
    hybrid, teacher = (load_model(models / name) for name in ("hybrid", "teacher"))
    expected = head_exponents(hybrid, [batch])
    for layer in (0, 2):
        one = record.results["hybrid"]["layers"][layer]
        assert one["kind"] == "mamba2"
        assert one["exponents"] == pytest.approx(expected[layer], rel=1e-5)
        assert one["exponent"] == max(one["exponents"]) < 0
        assert one["memory"] == pytest.approx([-1 / exponent for exponent in expected[layer]], rel=1e-5)
    for name, model in (("hybrid", hybrid), ("teacher", teacher)):
        spans = deviations(model, [batch], [0, 2])
        assert [one["mean"] for one in record.results[name]["deviations"]] == pytest.approx(
            [span.mean for span in spans], rel=1e-3
        )


def test_layers_without_a_state_are_named(found):
    record, told = found
    assert record.results["hybrid"]["layers"][1] == {"layer": 1, "kind": "attention"}
    assert [layer["kind"] for layer in record.results["teacher"]["layers"]] == ["attention"] * 3
    assert record.results["hybrid"]["disturbed"] == record.results["teacher"]["disturbed"] == [0, 2]
    assert told.count("attention         has no state") == 4
    assert told.count("Mamba-2 ") == 2


def test_the_picture(found, tmp_path):
    assert imread(tmp_path / "found" / "stability.png").shape[1] > 300
    record, _ = found
    layers = [*record.results["hybrid"]["layers"][:2], {"layer": 2, "kind": "mamba2", "memory": [7.0, "inf", 31.0]}]
    memory_maps({"one": layers}, tmp_path / "one.svg")
    svg = (tmp_path / "one.svg").read_text()
    for text in ("<!-- attention", "<!-- 7 ", "<!-- 31 ", "<!-- 1M "):
        assert text in svg
    assert sorted_memory(layers[2]) == [7.0, 31.0, 1e6]
    assert sorted_memory(layers[1]) == []


def test_the_section(found):
    record, _ = found
    section = SECTIONS["stability"](record)
    slowest = max(
        (max(layer["memory"]), layer["layer"]) for layer in record.results["hybrid"]["layers"] if layer["layer"] != 1
    )
    assert section.lead.startswith(f"Layer {slowest[1]} of hybrid remembers longest, {slowest[0]:,.0f} tokens")
    assert "dies out" in section.lead
    far = record.results["teacher"]["deviations"][-1]
    assert f"teacher {100 * far['mean']:.1f}% (at most {100 * far['largest']:.1f}%)" in section.lead
    (table,), (chart,), (memory,) = section.tables, section.figures, section.maps
    assert [row[0] for row in table.rows] == [f"{name}, layer {n}" for name in ("hybrid", "teacher") for n in range(3)]
    assert [row[2] for row in table.rows].count("has no state") == 4
    assert [series.label for series in chart.legend] == ["hybrid", "hybrid, largest", "teacher", "teacher, largest"]
    assert {column for _, column in memory.values} == {0, 2}
    assert memory.log
    assert 0 < memory.low <= min(memory.values.values())


def test_a_growing_layer_is_not_called_stable(found):
    record, _ = found
    layer = record.results["hybrid"]["layers"][0]
    layer["exponent"], layer["memory"][0] = 0.004, "inf"
    lead = SECTIONS["stability"](record).lead
    assert "Layer 0 of hybrid remembers longest, 1.0e6 tokens" in lead
    assert "the largest exponent is 0.0040 a token, so a disturbance of its states need not die out" in lead


def refused(capsys, *arguments, **options) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        stability.main(*arguments, **options)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_told(models, text, tmp_path, capsys):
    hybrid, out = str(models / "hybrid"), tmp_path / "none"
    assert "teacher: no layer of them is converted" in refused(capsys, [str(models / "teacher")], text, output=out)
    assert "none.txt" in refused(capsys, [hybrid], [str(tmp_path / "none.txt")], output=out, device="cpu")
    assert "there is no such folder" in refused(capsys, [str(tmp_path / "x")], text, output=out)
    assert "is given twice" in refused(capsys, [hybrid, hybrid], text, output=out)
    (tmp_path / "empty.txt").write_text(" ")
    assert "empty.txt" in refused(capsys, [hybrid], [str(tmp_path / "empty.txt")], output=out, device="cpu")
    assert not out.exists()
    out.write_text("")
    assert "is a file" in refused(capsys, [hybrid], text, output=out)


def test_a_student_without_decays_is_measured_all_the_same(models, text, tmp_path, capsys):
    teacher, folder = load_model(models / "teacher"), tmp_path / "delta"
    convert(teacher, mixer="gated_deltanet", keep_attention=[1]).save_pretrained(folder)
    characters().save_pretrained(folder)
    stability.main([str(folder)], text, block=40, output=tmp_path / "found", device="cpu")
    assert "gated_deltanet" in capsys.readouterr().out.replace("Gated DeltaNet", "gated_deltanet")
    record = read_findings(tmp_path / "found" / "stability.json")
    assert [layer["kind"] for layer in record.results["delta"]["layers"]] == [
        "gated_deltanet",
        "attention",
        "gated_deltanet",
    ]
    assert not (tmp_path / "found" / "stability.png").exists()
    assert SECTIONS["stability"](record).tables
