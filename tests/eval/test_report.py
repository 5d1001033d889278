"""The report of a run measured on real tiny models: its numbers, its words, and that nothing can spoil the page."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from html_page import Page

from distill.errors import UserError
from distill.evaluation_record import MatrixPair, read_evaluation, write_evaluation
from eval import report, verdict
from eval.figures import closeness_charts
from eval.page import parted
from eval.report import make_report
from eval.run_record import read_run


def page_of(run_dir: Path) -> Page:
    return Page(make_report(run_dir).read_text(encoding="utf-8"))


def numbers_of(run_dir: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    make_report(run_dir)
    return json.loads((run_dir / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(run_dir: Path, stage: str, **metrics: float | str) -> None:
    """Rewrite a stage's evaluation with other metrics."""
    path = run_dir / stage / "evaluation.json"
    rewrite(path, metrics=json.loads(path.read_text())["metrics"] | metrics)


def test_the_numbers_are_those_of_the_evaluations(run_dir):
    numbers = numbers_of(run_dir)
    rows = {row["name"]: row for row in numbers["rows"]}
    assert list(rows) == ["teacher", "convert", "mixing", "hidden", "logits"]
    measured = {name: read_evaluation(run_dir / name).metrics for name in rows}
    for name, row in rows.items():
        assert row["loss"] == measured[name].loss
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["perplexity_ratio"] == pytest.approx(math.exp(row["loss"] - measured["teacher"].loss))
    teacher, start = rows["teacher"]["loss"], rows["convert"]["loss"]
    assert start > rows["logits"]["loss"] > teacher, "the synthetic run is one that went well"
    assert rows["logits"]["recovered"] == pytest.approx((start - rows["logits"]["loss"]) / (start - teacher))
    assert rows["convert"]["recovered"] == 0
    assert rows["hidden"]["kl"] == measured["hidden"].kl
    assert rows["hidden"]["agreement"] == measured["hidden"].agreement
    assert (rows["hidden"]["tokens"], rows["hidden"]["seconds"]) == (120_000, 30)
    assert numbers["layer_distances"]["mixing"] == list(read_evaluation(run_dir / "mixing").layer_distances)
    assert numbers["scored_tokens"] == measured["logits"].tokens
    assert numbers["missing"] == []
    at_4k = next(row for row in numbers["memory"] if row["context"] == 4096)
    assert at_4k == {"context": 4096, "teacher_bytes": 4096 * 768, "student_bytes": 17_408 + 4096 * 256}


def test_the_page_shows_them(run_dir):
    page, numbers = page_of(run_dir), numbers_of(run_dir)
    cells = [cell.strip() for cell in page.cells]
    for row in numbers["rows"]:
        assert f"{row['loss']:.3f}" in cells
        assert f"{row['kl']:.3f}" in cells
        assert f"{100 * row['agreement']:.1f}%" in cells
    for said in (
        "tiny-llama → Mamba-2 hybrid",
        "2 of 3 layers (0 and 2) run Mamba-2 in place of attention; layer 1 kept it. 13K parameters.",
        f"picks the same next token as its teacher {100 * numbers['rows'][-1]['agreement']:.1f}% of the time",
        f"took back {100 * numbers['rows'][-1]['recovered']:.1f}% of the loss",
        "The student holds less from 34 tokens on.",
        "keep_attention: [1]",
        "2.13.0",
    ):
        assert said in page.text
    assert "Unfinished" not in page.text
    assert page.tags.count("svg") >= 3 + 3 + 1, "closeness, training, memory"
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 2 * (1 + 4) + 1, "two heads: the teacher's and four students'; the scale"


def test_nothing_on_the_page_is_fetched_or_run(run_dir):
    html = make_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?:", html)
    assert len(html) < 400_000


def test_text_of_the_run_stays_text(run_dir):
    hostile = "</pre></title><script>alert('x')</script>&amp;{{ 7 * 7 }}"
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(
        recipe.read_text()
        .replace("name: tiny", f"name: {json.dumps(hostile)}")
        .replace("teachers/tiny-llama", json.dumps(hostile.replace("/", "")))
    )
    rewrite(run_dir / "logits" / "stage.json", versions={hostile: hostile})
    sample = {"prompt": hostile, "student": f"not {hostile}", "teacher": f"{hostile} and more"}
    as_teacher = sample | {"student": f"{hostile} but less"}
    rewrite(run_dir / "hidden" / "evaluation.json", samples=[sample, as_teacher])
    rewrite(run_dir / "logits" / "evaluation.json", samples=[sample])
    page = page_of(run_dir)
    assert "script" not in page.tags
    said = page.text.count("<script>alert('x')</script>&amp;{{ 7 * 7 }}")
    in_header, in_samples, in_recipe, in_versions = 1, 5, 1, 2
    assert said == in_header + in_samples + in_recipe + in_versions


def test_the_same_run_makes_the_same_report(run_dir):
    first = make_report(run_dir).read_bytes(), (run_dir / "report.json").read_bytes()
    assert (make_report(run_dir).read_bytes(), (run_dir / "report.json").read_bytes()) == first
    assert not list(run_dir.glob(".*"))


def test_an_unfinished_run_says_what_is_missing(run_dir):
    shutil.rmtree(run_dir / "logits")
    (run_dir / "hidden" / "evaluation.json").unlink()
    page, numbers = page_of(run_dir), numbers_of(run_dir)
    assert numbers["missing"] == ["hidden", "logits"]
    assert [row["name"] for row in numbers["rows"]] == ["teacher", "convert", "mixing"]
    assert "Unfinished run. Measured so far: convert and mixing. Still to come: hidden and logits." in page.text
    assert "Hidden stage" in page.text, "what was trained so far is drawn"


def test_a_conversion_alone_has_a_report(run_dir):
    for stage in ("mixing", "hidden", "logits", "teacher"):
        shutil.rmtree(run_dir / stage)
    page = page_of(run_dir)
    assert "This is the student as converted, before any training." in page.text
    assert "Gap closed" in page.text, "the column stays"
    assert "of what conversion had lost" not in page.text


def test_what_was_not_measured_is_left_out(run_dir):
    shutil.rmtree(run_dir / "teacher")
    (run_dir / "convert" / "conversion.json").unlink()
    for stage in ("convert", "mixing", "hidden", "logits"):
        evaluation = read_evaluation(run_dir / stage)
        alone = evaluation.__class__(evaluation.metrics.__class__(evaluation.metrics.loss, 2.0, 99))
        write_evaluation(run_dir / stage, alone)
        (run_dir / stage / "metrics.jsonl").unlink(missing_ok=True)
    page, numbers = page_of(run_dir), numbers_of(run_dir)
    assert [row["name"] for row in numbers["rows"]] == ["convert", "mixing", "hidden", "logits"]
    assert "No teacher was measured beside it." in page.text
    for heading in ("What a head looks at", "What it costs to run", "continued by both", "Training", "layers ("):
        assert heading not in page.text


def test_the_last_comparison_speaks_for_a_teacher_that_was_not_measured_alone(run_dir):
    shutil.rmtree(run_dir / "teacher")
    change(run_dir, "convert", teacher_loss=0.5)
    assert numbers_of(run_dir)["rows"][0]["loss"] == read_evaluation(run_dir / "logits").metrics.teacher_loss


def test_held_out_metrics_are_drawn_over_the_tokens_of_the_whole_run(run_dir):
    kl, loss, _ = closeness_charts(read_run(run_dir))
    by_stage = {one.label: [tokens for tokens, _ in one.points] for one in kl.legend}
    assert by_stage["after conversion"] == [0]
    assert (by_stage["after mixing"][0], by_stage["after mixing"][-1]) == (0, 60_000)
    assert (by_stage["after hidden"][0], by_stage["after hidden"][-1]) == (60_000, 180_000)
    assert (by_stage["after logits"][0], by_stage["after logits"][-1]) == (180_000, 480_000)
    teacher = next(one for one in loss.legend if one.label == "teacher")
    assert teacher.points == [(0, read_evaluation(run_dir / "teacher").metrics.loss), (480_000, teacher.points[0][1])]


def test_a_matrix_is_drawn_at_its_teachers_size(run_dir):
    evaluation, teacher = read_evaluation(run_dir / "logits"), torch.rand(8, 8).tril()
    write_evaluation(run_dir / "logits", evaluation, [MatrixPair.of(0, 0, teacher, 8 * teacher)])
    for stage in ("convert", "mixing", "hidden"):
        (run_dir / stage / "matrices.npz").unlink()
    page = page_of(run_dir)
    theirs, ours, _scale = [value for name, value in page.attributes if name == "src"]
    assert theirs == ours
    assert "cosine 1.00size ×8.00" in page.text


def test_a_broken_student_is_called_broken(run_dir):
    change(run_dir, "logits", loss="nan", perplexity="nan", kl="nan", agreement=0.0)
    page, numbers = page_of(run_dir), numbers_of(run_dir)
    assert "this student is broken" in page.text
    assert "not finite" in page.text
    assert numbers["rows"][-1]["loss"] == "nan"
    assert numbers["rows"][-1]["recovered"] is None


def test_a_student_that_training_made_worse_is_called_worse(run_dir):
    loss = read_evaluation(run_dir / "convert").metrics.loss + 1
    change(run_dir, "logits", loss=loss, perplexity=math.exp(loss))
    page = page_of(run_dir)
    assert "Training has made its loss larger than it was at conversion." in page.text
    assert "took back" not in page.text


def test_a_student_as_good_as_its_teacher_has_lost_nothing(run_dir):
    loss = read_evaluation(run_dir / "teacher").metrics.loss
    change(run_dir, "logits", loss=loss - 0.1, perplexity=math.exp(loss - 0.1))
    page = page_of(run_dir)
    assert "No loss on held-out text." in page.text
    assert numbers_of(run_dir)["rows"][-1]["recovered"] > 1


def test_a_stage_beyond_the_recipe_comes_last(run_dir):
    shutil.copytree(run_dir / "logits", run_dir / "finetune")
    assert [row["name"] for row in numbers_of(run_dir)["rows"]][-2:] == ["logits", "finetune"]
    assert "After finetune" in page_of(run_dir).text


def test_a_line_that_is_being_written_is_left_out(run_dir):
    path = run_dir / "logits" / "metrics.jsonl"
    page = page_of(run_dir).text
    with path.open("a") as file:
        file.write('{"kind": "train", "tok')
    assert page_of(run_dir).text == page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), r"tiny: is no run directory \(recipe\.yaml is missing\)"),
        (lambda run: (run / "recipe.yaml").write_text("a: ["), r"recipe\.yaml: is no recipe"),
        (lambda run: (run / "recipe.yaml").write_text("just words"), r"recipe\.yaml: is no recipe"),
        (lambda run: [p.unlink() for p in run.glob("*/evaluation.json")], "no stage has been evaluated yet"),
        (lambda run: (run / "hidden/evaluation.json").write_text("{"), r"hidden/evaluation\.json: is no evaluation"),
        (lambda run: (run / "hidden/matrices.npz").write_bytes(b"PK"), r"hidden/matrices\.npz: holds no mixing"),
        (lambda run: (run / "hidden/stage.json").write_text("{"), r"hidden/stage\.json: cannot be read"),
        (lambda run: (run / "convert/conversion.json").write_text("7"), r"convert/conversion\.json: cannot be read"),
        (lambda run: (run / "hidden/metrics.jsonl").write_text("{}\n{}\n"), r"metrics\.jsonl:1: is no metrics line"),
    ],
)
def test_what_cannot_be_read_is_named(run_dir, damage, message):
    damage(run_dir)
    with pytest.raises(UserError, match=message) as error:
        make_report(run_dir)
    assert "\n" not in str(error.value)
    assert not (run_dir / "report.html").exists()


def test_the_program_ends_with_one_line_for_a_user_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([tmp_path])
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "is no run directory" in told.err
    assert not told.out


@pytest.mark.slow
def test_the_program_runs_from_the_checkout(run_dir):
    checkout = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "eval.report", str(run_dir)], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(run_dir / "report.html"))
    assert (run_dir / "report.html").is_file()


@pytest.mark.parametrize(
    ("student", "teacher", "same", "own"),
    [
        ("a red ball", "a red ball", "a red ball", ""),
        ("a red box", "a red ball", "a red", " box"),
        ("a red", "a red ball", "a red", ""),
        ("a red ball", "a red", "a red", " ball"),
        ("one\n two", "one two", "one", "\n two"),
        ("x", None, "", "x"),
        ("", "x", "", ""),
    ],
)
def test_where_two_texts_part(student, teacher, same, own):
    assert parted(student, teacher) == (same, own)


def test_a_student_with_single_heads_is_a_hybrid(run_dir):
    run = replace(read_run(run_dir), layers=["mamba2"] * 3, heads={2: [0, 1, 3]})
    assert verdict.student_name(run) == "Mamba-2 hybrid"
    said = (
        "All 3 layers run Mamba-2 in place of attention; beside the mixers attention heads 0–1 and 3 of layer 2 kept it"
    )
    assert verdict.description(run).startswith(f"{said}.")
