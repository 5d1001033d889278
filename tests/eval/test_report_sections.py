"""Findings on the page: recall's heat maps, what was kept at a glance, and findings that belong together."""

import json
import re

import pytest
from html_page import Page

from distill.errors import UserError
from eval import report
from eval.figures import task_charts, task_charts_of_runs
from eval.findings import Findings, write_findings
from eval.gathered import findings_in, gathered, of_run, section_of, shorter_names
from eval.heat_map_svg import density, heat_map
from eval.report import make_report
from eval.run_record import read_run
from eval.section_view import glance, section_view
from eval.sections.section import HeatMap, Quote, Score, Section


def cell(items: int, length: int, written: float, chosen: float, chance: float = 0.25) -> dict:
    told = {"items": items, "length": length, "samples": 8, "written": written, "chosen": chosen, "chance": chance}
    return told | {"gap": chosen - written, "near": written, "far": written, "rank": 1.0, "log_probability": -1.0}


def recall_of(**by_model: list[dict]) -> Findings:
    return Findings("recall", {name: f"models/{name}" for name in by_model}, {"seed": 0}, {"phonebook": by_model})


FOUND = recall_of(
    teacher=[cell(2, 64, 1.0, 1.0), cell(8, 1024, 0.8, 0.9)],
    mamba=[cell(2, 64, 0.6, 0.9), cell(8, 1024, 0.3, 0.75)],
)


def test_recall_says_what_was_kept_and_draws_model_beside_model():
    section = section_of(FOUND)
    assert section.lead == (
        "Of the answers that teacher writes, mamba still writes 50.0%. Likelihood flatters: in phonebook, mamba "
        "prefers the right answer yet does not write it in 38 of 100 cases."
    )
    assert [one.title for one in section.maps] == ["teacher", "mamba"] * 3
    assert len({one.group for one in section.maps}) == 3
    written, _, gap = section.maps[1::2]
    assert (written.rows, written.columns, written.values) == (["2", "8"], ["64", "1K"], {(0, 0): 0.6, (1, 1): 0.3})
    assert gap.values == pytest.approx({(0, 0): 0.3, (1, 1): 0.45})


def test_where_all_answers_are_choices_a_guess_is_no_knowledge():
    both = {"teacher": [cell(4, 0, 1.0, 1.0, 0.5)], "mamba": [cell(4, 0, 0.5, 0.5, 0.5)]}
    (score,) = section_of(Findings("recall", {"teacher": "", "mamba": ""}, {}, {"parity": both})).scores
    assert (score.chance, score.kept("mamba")) == (0.5, 0.0)
    (score,) = section_of(Findings("recall", {"teacher": "", "mamba": ""}, {}, {"copying": both})).scores
    assert (score.chance, score.kept("mamba")) == (0.0, 0.5)


def test_only_cells_that_all_have_are_compared():
    found = recall_of(teacher=[cell(2, 64, 1.0, 1.0), cell(8, 64, 0.0, 0.2)], mamba=[cell(2, 64, 0.5, 0.5)])
    (score,) = section_of(found).scores
    assert score.by_model == {"teacher": 1.0, "mamba": 0.5}


def test_a_teacher_that_only_guesses_has_nothing_to_keep():
    assert Score("x", "teacher", 0.25, {"teacher": 0.29, "mamba": 0.29}).kept("mamba") is None
    assert Score("x", "teacher", 0.25, {"teacher": 0.75, "mamba": 0.2}).kept("mamba") == pytest.approx(-0.1)
    assert Score("x", "teacher", 0.25, {"mamba": 0.2}).kept("mamba") is None
    (table,) = glance([Score("x", "teacher", 0.25, {"teacher": 0.75, "mamba": 0.2, "hybrid": 0.8})])
    (row,) = table["rows"]
    assert [(one["share"], one["text"]) for one in row["cells"]] == [("0.000", "−10%"), ("1.000", "110%")]


def test_what_was_said_to_one_prompt_stands_together():
    quotes = [Quote("a", "p", "1"), Quote("b", "p", "2"), Quote("a", "q", "<3>")]
    view = section_view(Section("t", "l", quotes=quotes))
    assert [(one["prompt"], [quote.text for quote in one["quotes"]]) for one in view["prompts"]] == [
        ("p", ["1", "2"]),
        ("q", ["<3>"]),
    ]


def test_tasks_of_the_same_models_share_a_table():
    scores = [
        Score("x", "teacher", 0.0, {"teacher": 1.0, "mamba": 0.0}),
        Score("y", "teacher", 0.0, {"teacher": 1.0, "hybrid": 0.5}),
        Score("z", "teacher", 0.0, {"teacher": 0.0, "hybrid": 0.0}),
        Score("alone", "teacher", 0.0, {"teacher": 1.0}),
        Score("unknown", "teacher", 0.5, {"teacher": 0.5, "other": 0.5}),
    ]
    assert [[row["task"] for row in table["rows"]] for table in glance(scores)] == [["x"], ["y", "z"]]


def test_a_heat_map_labels_every_cell_and_no_other():
    one = HeatMap("<m>", ["2", "4"], ["64"], "items", "length", {(0, 0): 1.0, (1, 0): -0.004}, low=-1)
    svg = heat_map(one)
    assert "&lt;m&gt;" in svg
    assert re.findall(r'class="(on|off)"[^>]*>([^<]*)<', svg) == [("on", "100"), ("off", "0")]
    assert svg.count('class="none"') == 0
    assert heat_map(HeatMap("m", ["2", "4"], ["64"], "", "", {(0, 0): 1.0})).count('class="none"') == 1
    sizes = HeatMap("m", ["a"], ["b"], "", "", {(0, 0): -1234.5}, low=-2000, high=10, percent=False)
    assert 'class="below"' in heat_map(sizes)
    assert ">−1.23K<" in heat_map(sizes)
    assert "?" in heat_map(HeatMap("m", ["a"], ["b"], "", "", {(0, 0): float("nan")}))


def test_colours_grow_with_the_distance_from_zero():
    assert [density(value, 0, 2) for value in (-1, 0, 1, 2, 3)] == [0, 0, 0.5, 1, 1]
    assert [density(value, -2, 1) for value in (-2, -1, 0, 0.5, 1)] == [1, 0.5, 0, 0.5, 1]
    assert density(1, 1, 1) == density(float("nan"), 0, 1) == 0
    assert [density(value, 1, 100, log=True) for value in (0.5, 1, 10, 100)] == [0, 0, 0.5, 1]


def test_the_page_of_a_run_shows_its_own_findings_and_those_given(run_dir, tmp_path):
    write_findings(run_dir / "evaluations", FOUND)
    other = Findings(
        "recall", {"teacher": "models/teacher"}, {"seed": 7}, {"copying": {"teacher": [cell(2, 0, 0.0, 0.5)]}}
    )
    write_findings(tmp_path / "found", other)
    page = Page(make_report(run_dir, [tmp_path / "found"]).read_text(encoding="utf-8"))
    assert page.text.count("Recall from the prompt") == 2, "other settings are another section"
    assert "Kept and lost at a glance" in page.text
    assert "Even teacher writes hardly" not in page.text
    assert [cell for cell in page.cells if "50%" in cell] == ["50%45.0%"]
    told = json.loads((run_dir / "report.json").read_text())
    kept = told["kept"][0]
    assert (kept["task"], kept["compared_with"], kept["chance"]) == ("recall: phonebook", "teacher", 0.0)
    assert kept["scores"] == pytest.approx({"teacher": 0.9, "mamba": 0.45})
    assert kept["kept"] == pytest.approx({"mamba": 0.5})
    assert [one["settings"] for one in told["findings"]] == [{"seed": 0}, {"seed": 7}]
    assert told["rows"], "the run's own numbers stay"


def test_a_run_without_findings_has_no_such_part(run_dir):
    page = Page(make_report(run_dir).read_text(encoding="utf-8"))
    assert "at a glance" not in page.text
    assert json.loads((run_dir / "report.json").read_text())["findings"] == []


def test_unknown_kinds_are_told_and_skipped(run_dir, capsys):
    write_findings(run_dir / "evaluations", Findings("weather", {}, {}, {}))
    assert "Recall" not in Page(make_report(run_dir).read_text(encoding="utf-8")).text
    assert "weather: the report has no section for it; skipped (it has recall" in capsys.readouterr().err


def test_findings_that_differ_only_in_models_become_one_section():
    one, other = recall_of(teacher=[cell(2, 0, 1, 1)], logits=[cell(2, 0, 0.1, 0.2)]), FOUND
    both = gathered([of_run(one, "a"), of_run(one, "b")])
    assert [list(found.models) for found in both] == [["teacher", "a: logits", "b: logits"]]
    assert list(both[0].results["phonebook"]) == ["teacher", "a: logits", "b: logits"]
    assert len(gathered([one, other])) == 2, "their teachers found something else"


def test_damaged_findings_are_named(run_dir, tmp_path, capsys):
    with pytest.raises(UserError, match="holds no findings"):
        findings_in(tmp_path)
    wrong = Findings("recall", {"teacher": "t"}, {}, {"copying": {"teacher": [{"items": 2}]}})
    with pytest.raises(UserError, match=r"eval\.recall cannot be read \(KeyError"):
        section_of(wrong)
    (tmp_path / "recall.json").write_text("{")
    with pytest.raises(SystemExit):
        report.main([run_dir], [tmp_path])
    assert "recall.json: cannot be read" in capsys.readouterr().err
    assert not (run_dir / "report.html").exists()


def test_models_are_called_by_what_tells_them_apart():
    paths = ["runs/a/logits", "runs/b/logits/", "runs/b/hidden", "teacher", "x/logits"]
    names = {path: path for path in paths} | {"logits": "elsewhere/logits"}
    assert shorter_names(Findings("recall", names, {}, {})) == {
        "runs/a/logits": "a/logits",
        "runs/b/logits/": "b/logits",
        "runs/b/hidden": "hidden",
        "x/logits": "x/logits",
    }


def test_a_best_step_that_was_kept_is_told(run_dir):
    record = run_dir / "hidden" / "stage.json"
    assert "were kept as the best" not in Page(make_report(run_dir).read_text(encoding="utf-8")).text
    record.write_text(json.dumps(json.loads(record.read_text()) | {"kept_step": 1200}))
    text = Page(make_report(run_dir).read_text(encoding="utf-8")).text
    assert "120K tokens in 30 s; the weights of step 1,200 were kept as the best." in text


def test_tasks_asked_in_training_are_curves(run_dir):
    for stage in ("hidden", "logits"):
        path = run_dir / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row["kind"] == "eval":
                row["recall.copying.written"] = 0.25
                row["recall.copying.log_probability"] = -1.0
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (chart,) = task_charts(read_run(run_dir))
    assert chart.title == "Recall: copying"
    assert [one.label for one in chart.legend] == ["after hidden", "after logits"]
    assert chart.svg.count("25.0%") == 12
    assert "Recall: copying" in Page(make_report(run_dir).read_text(encoding="utf-8")).text
    (both,) = task_charts_of_runs({"a": read_run(run_dir)}, {"a": "1"})
    assert both.svg.count("25.0%") == 12
