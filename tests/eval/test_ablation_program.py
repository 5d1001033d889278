"""eval.ablation on saved tiny models: what it writes, what it says about idle mixers, its section, every mistake."""

import pytest
import torch
from synthetic_run import TEXT, characters, tiny_teacher

from distill import convert
from distill.ablation import ablated
from distill.evaluation import evaluate
from distill.student import mixers_of
from distill.windowed import windowed
from eval import ablation
from eval.findings import Findings, read_findings
from eval.loading import Text, read_batches
from eval.sections import SECTIONS
from eval.sections.ablation import sentences

OPTIONS = {"block": 40, "tokens": 78, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and of hybrids: one as converted, one whose layer 2 puts out nothing, one all attention."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), characters()
    teacher = tiny_teacher(len(tokenizer))
    idle = convert(teacher, keep_attention=[1])
    with torch.no_grad():
        mixers_of(idle)[2].out_proj.weight.zero_()
    hybrids = {
        "hybrid": convert(teacher, keep_attention=[1]),
        "idle": idle,
        "all": convert(teacher, keep_attention=[0, 1, 2]),
    }
    for name, model in {"teacher": teacher, **hybrids}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "day.txt").write_text(TEXT[:79])
    return folder, teacher, hybrids


def test_a_student_beside_its_teacher_with_windows(models, tmp_path, capsys):
    folder, teacher, hybrids = models
    text, out = str(folder / "day.txt"), tmp_path / "found"
    ablation.main(
        str(folder / "hybrid"),
        [text],
        str(folder / "teacher"),
        window=6,
        sinks=2,
        output=out,
        **OPTIONS,
        task=["copying"],
        items=2,
        surface="text",
        samples=3,
    )
    found = read_findings(out / "ablation.json")
    assert list(found.models) == ["hybrid", "teacher", "teacher, window 6 + 2 sinks"]
    batches = read_batches(Text([text], 40, 8, 78), str(folder / "hybrid"))
    student, results = hybrids["hybrid"], found.results
    for name, model in (("intact", student), ("baseline", windowed(teacher, [0, 2], window=6, sinks=2))):
        expected = evaluate(model, teacher, batches)
        assert results[name]["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert results[name]["kl"] == pytest.approx(expected.kl, rel=1e-4)
        assert set(results[name]["recall"]["copying"]) == {"written", "chosen", "log_probability"}
    assert results["teacher"]["kl"] == 0
    entries = {(entry["what"], entry["by"]): entry for entry in results["ablated"]}
    whats = {"layer 0": [0], "layer 2": [2], "all mixers": [0, 2], "all attention": [1]}
    assert set(entries) == {(what, by) for what in whats for by in ("zero", "mean")}
    for what, layers in whats.items():
        with ablated(student, layers):
            assert entries[what, "zero"]["loss"] == pytest.approx(evaluate(student, None, batches).loss, rel=1e-5)
        assert entries[what, "mean"]["loss"] != entries[what, "zero"]["loss"]
    told = capsys.readouterr().out
    assert "without any mixer the loss is" in told
    assert "untrained, teacher, window 6 + 2 sinks in the same layers has a loss of" in told


def test_a_mixer_that_does_nothing_is_named(models, tmp_path, capsys):
    folder, *_ = models
    ablation.main(str(folder / "idle"), [str(folder / "day.txt")], output=tmp_path, **OPTIONS)
    said = "ablating layer 2's mixer changes the loss by +0.000: it does nothing"
    assert said in capsys.readouterr().out
    found = read_findings(tmp_path / "ablation.json")
    assert list(found.models) == ["idle"]
    section = SECTIONS["ablation"](found)
    assert section.lead.startswith("Ablating layer 2's mixer changes the loss by +0.000: it does nothing.")
    assert [row[0] for row in section.tables[0].rows][:3] == [
        "intact",
        "layer 0's mixer → zero",
        "layer 0's mixer → its mean",
    ]
    assert {len(row) for row in section.tables[0].rows} == {len(section.tables[0].headings)}
    assert section.figures[0].svg


def results(zero: float, mean: float, recall: float = 1.0) -> dict:
    """Of a student with two mixers; the numbers are of layer 2's ablation."""

    def scores(loss: float, written: float = 1.0) -> dict:
        return {"loss": loss, "kl": None, "agreement": None, "recall": {"copying": {"written": written}}}

    one = [{"what": "layer 0", "layers": [0], "by": by, **scores(3.0)} for by in ("zero", "mean")]
    two = [("zero", zero), ("mean", mean)]
    entries = [{"what": "layer 2", "layers": [2], "by": by, **scores(2 + change, recall)} for by, change in two]
    return {"intact": scores(2.0), "ablated": one + entries}


def test_sentences():
    assert sentences(results(-0.001, 0.5)) == ["ablating layer 2's mixer changes the loss by −0.001: it does nothing"]
    (said,) = sentences(results(0.5, 0.002))
    assert said.endswith("by +0.002: it adds a constant and mixes nothing")
    (said,) = sentences(results(0.5, 0.3))
    assert said.startswith("every mixer is missed when it is ablated; least layer 2's")
    # What leaves the loss as it is may still be what a task is done with.
    assert sentences(results(0.0, 0.0, recall=0.5))[0].startswith("every mixer is missed")
    intact = results(0, 0)["intact"]
    baseline = {"name": "teacher, window 9 + 4 sinks", **intact}
    found = results(0.5, 0.3) | {"baseline": baseline, "teacher": intact}
    assert "does not beat what needs no training" in sentences(found)[1]
    assert sentences(found)[2] == "in copying the baseline writes 100.0% of the answers, the student 100.0%"


def test_many_idle_mixers_are_counted_at_the_head_of_the_section():
    found = results(0.0, 0.0)
    idle = found["ablated"][2:]
    found["ablated"] += [entry | {"what": f"layer {at}", "layers": [at]} for at in (3, 5) for entry in idle]
    assert len(sentences(found)) == 3
    lead = SECTIONS["ablation"](Findings("ablation", {"student": "s"}, {}, found)).lead
    assert lead.startswith("Ablating one of the mixers of layers 2–3 and 5 changes next to nothing: 3 of 4 mixers")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("all", {}, "has attention in every layer"),
        ("teacher", {}, "is a LlamaForCausalLM and no student"),
        ("hybrid", {"task": ["copyin"]}, "copying"),
        ("hybrid", {"teacher": "hybrid"}, "not into a student"),
        ("hybrid", {"teacher": "nowhere"}, "no model folder"),
    ],
)
def test_mistakes_are_told(models, tmp_path, capsys, model, options, message):
    folder, *_ = models
    if "teacher" in options:
        options = {"teacher": str(folder / options["teacher"])}
    with pytest.raises(SystemExit) as end:
        ablation.main(str(folder / model), [str(folder / "day.txt")], output=tmp_path / "out", **OPTIONS, **options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
