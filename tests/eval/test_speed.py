"""eval.speed on saved tiny models: bytes against the conversion's own figures, the form of what is written."""

import pytest
import torch
from transformers import DynamicCache

from distill.conversion import convert_with_report
from eval import speed
from eval.findings import read_findings
from eval.sections import SECTIONS
from eval.timing import decoding, prefill
from tests.conftest import tiny
from tests.distill.families.models import tiny as of_family

CONTEXTS = [16, 40]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a teacher and its hybrid, and the conversion's report."""
    folder, teacher = tmp_path_factory.mktemp("models"), tiny("llama")
    hybrid, report = convert_with_report(teacher, keep_attention=[1])
    for name, model in (("teacher", teacher), ("hybrid", hybrid)):
        model.save_pretrained(folder / name)
    return str(folder / "teacher"), str(folder / "hybrid"), report


def test_bytes_are_those_of_the_conversion_report(models, tmp_path, capsys):
    teacher, hybrid, report = models
    window = f"{teacher}@window=9,sinks=3,layers=0+2"
    sizes = {"steps": 2, "runs": 1, "batch": 2}
    speed.main([teacher, hybrid, window], CONTEXTS[::-1] + CONTEXTS, output=tmp_path, device="cpu", **sizes)
    found = read_findings(tmp_path / "speed.json")
    names = ["teacher", "hybrid", "teacher, window 9 + 3 sinks"]
    assert list(found.models) == names
    rows = {(row["model"], row["context"]): row for row in found.results["rows"]}
    assert list(rows) == [(name, context) for context in CONTEXTS for name in names]
    per_layer = report.teacher_kv_bytes_per_token // 3
    for context in CONTEXTS:
        ours, theirs = report.cache_bytes(context)
        assert held(rows["teacher", context]) == (0, 2 * theirs)
        assert held(rows["hybrid", context]) == (2 * report.state_bytes, 2 * (ours - report.state_bytes))
        assert held(rows[names[2], context]) == (0, 2 * per_layer * (context + 2 * 12))
        assert all(rows[name, context][what] > 0 for name in names for what in ("prefill", "decode"))
    told = capsys.readouterr().out
    assert "40 tokens of context" in told
    assert "of its bytes" in told
    section = SECTIONS["speed"](found)
    assert section.lead.startswith("Behind 40 tokens hybrid reads ")
    assert [len(chart.legend) for chart in section.figures] == [3, 3, 3]
    assert {len(row) for row in section.tables[0].rows} == {len(section.tables[0].headings)}
    assert len(section.tables[0].rows) == 6


def held(row: dict) -> tuple[int, int]:
    return row["state_bytes"], row["key_value_bytes"]


def test_one_model_alone_is_described(models, tmp_path, capsys):
    speed.main([models[1]], [12], output=tmp_path, device="cpu", steps=1, runs=1)
    assert "behind 12 tokens hybrid reads" in capsys.readouterr().out
    assert SECTIONS["speed"](read_findings(tmp_path / "speed.json")).lead.startswith("Behind 12 tokens hybrid")


def test_what_is_timed_is_greedy_generation():
    model, ids = tiny("llama"), torch.randint(3, 97, (2, 20))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for chunk in (None, 7):
        cache = DynamicCache()
        first_B1 = prefill(model, ids, cache, chunk)[:, -1:].argmax(-1)
        assert torch.equal(first_B1[:, 0], expected[:, 20])
        assert torch.equal(decoding(model, first_B1, cache, 4)()[:, 0], expected[:, 24])
        assert cache.get_seq_length() == 24


def test_more_tokens_than_learned_positions_are_refused(tmp_path, capsys):
    of_family("GPT-2").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as end:
        speed.main([str(tmp_path / "model")], [250], output=tmp_path / "out", device="cpu", steps=4, runs=1)
    assert end.value.code == 2
    assert "knows 256 positions, and 258 would be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
