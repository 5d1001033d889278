"""Several runs on one page."""

import json
import shutil
from pathlib import Path

import pytest
from html_page import Page
from synthetic_run import RECIPE

from eval import report
from eval.findings import Findings, write_findings


@pytest.fixture
def runs(run_dir) -> list[Path]:
    """A hybrid run, and another whose student is all Mamba-2 and further from the same teacher."""
    other = Path(shutil.copytree(run_dir, run_dir.with_name("mamba")))
    (other / "recipe.yaml").write_text(RECIPE.replace("name: tiny", "name: mamba").replace("[1]", "[]"))
    shutil.copy(run_dir / "hidden" / "evaluation.json", other / "logits" / "evaluation.json")
    conversion = json.loads((run_dir / "convert" / "conversion.json").read_text())
    conversion |= {"layers": ["mamba2"] * 3, "kv_bytes_per_token": 0, "state_bytes": 26_112}
    (other / "convert" / "conversion.json").write_text(json.dumps(conversion))
    return [run_dir, other]


def compared(runs, folder, **options) -> tuple[Page, dict]:
    report.main(runs, output=folder, **options)
    return Page((folder / "report.html").read_text()), json.loads((folder / "report.json").read_text())


def test_final_students_stand_side_by_side(runs, tmp_path):
    page, numbers = compared(runs, tmp_path / "out")
    own = [json.loads((run / "logits" / "evaluation.json").read_text())["metrics"] for run in runs]
    assert [row["run"] for row in numbers["students"]] == ["tiny", "mamba"]
    for row, metrics in zip(numbers["students"], own, strict=True):
        assert (row["loss"], row["kl"], row["agreement"]) == (metrics["loss"], metrics["kl"], metrics["agreement"])
        assert (row["tokens"], row["seconds"]) == (480_000, 120), "of all stages"
    assert [row["state_bytes"] for row in numbers["students"]] == [17_408, 26_112]
    assert numbers["teachers"] == {"teachers/tiny-llama": ["tiny", "mamba"]}
    assert list(numbers["runs"]) == ["tiny", "mamba"]
    for said in (
        "tiny and mamba",
        "Closest to the teacher is tiny",
        "Only the state of mamba never grows",
        "keep_attention: []",
        "The full recipe of tiny",
        "The same prompt, continued by all",
    ):
        assert said in page.text
    assert "teachers (" not in page.text
    assert page.tags.count("svg") >= 3
    for run in runs:
        assert not (run / "report.html").exists(), "the runs are left as they are"


def test_the_same_runs_make_the_same_bytes(runs, tmp_path):
    for name in ("one", "two"):
        report.main(runs, output=tmp_path / name)
    for file in ("report.html", "report.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_other_teachers_have_tables_of_their_own(runs, tmp_path):
    recipe = runs[1] / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("tiny-llama", "other-llama"))
    page, numbers = compared(runs, tmp_path / "out")
    assert (
        "These runs have 2 teachers (tiny-llama and other-llama): compare within a teacher’s table only." in page.text
    )
    assert "Students of other-llama" in page.text
    assert "Closest to the teacher" not in page.text
    assert list(numbers["teachers"].values()) == [["tiny"], ["mamba"]]


def test_another_held_out_text_and_a_run_that_goes_on_are_told(runs, tmp_path):
    path = runs[1] / "teacher" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["metrics"]["loss"] += 0.5
    path.write_text(json.dumps(evaluation))
    shutil.rmtree(runs[1] / "logits")
    page, _ = compared(runs, tmp_path / "out")
    assert "tiny and mamba were measured on different held-out texts" in page.text
    assert "Not finished yet: mamba" in page.text
    assert "after hidden" in page.text


def test_findings_of_the_runs_come_together(runs, tmp_path):
    cell = {"items": 2, "length": 0, "written": 1.0, "chosen": 1.0, "gap": 0.0, "chance": 0.25}
    for run, written in zip(runs, (0.8, 0.2), strict=True):
        results = {"copying": {"teacher": [cell], "logits": [cell | {"written": written}]}}
        write_findings(run / "evaluations", Findings("recall", {"teacher": "t", "logits": "l"}, {}, results))
    page, numbers = compared(runs, tmp_path / "out")
    assert numbers["kept"][0]["kept"] == {"tiny: logits": 0.8, "mamba: logits": 0.2}
    assert page.text.count("Recall from the prompt") == 1


def test_mistakes(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([runs[0], runs[0]], output=tmp_path / "out")
    assert "a run is given twice" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        report.main(runs, output=tmp_path / "file")
    assert "is a file" in capsys.readouterr().err
