"""scripts.state_curve: what a state's size makes of a recipe, and what is kept beside its bytes."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from scripts import state_curve
from scripts.comparison_runs import Common, Wanted, prepare
from scripts.state_curve import WINDOW, _of_windows, _recipe, draw, table
from tests.conftest import CHECKOUT
from tests.stages.conftest import saved_teacher, text, write_recipe

__all__ = ["saved_teacher", "text"]


def test_a_state_narrower_than_a_head_has_no_positions():
    assert (
        _recipe("ours seed=1", "mamba2", 8, 16)
        == "ours seed=1 student.mixer=mamba2 student.state_dim=8 student.rope=drop"
    )
    assert _recipe("ours", "mamba2", 16, 16).endswith("student.rope=keep")
    assert _recipe("ours", "based", 16, 16).endswith("student.rope=keep student.expand=1")


def test_windows_take_their_bytes_and_come_nearer_to_the_teacher(tmp_path, saved_teacher, text, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    teacher = write_recipe(tmp_path, saved_teacher, text)
    common = Common(teacher, ("data.block=64",), "[]", 256, 1, False, tmp_path / "out")
    wanted = Wanted("kl_only", 16384, 1.0, 0)
    facts = prepare(common, wanted)
    points = _of_windows(common, wanted, [2, 64], sinks=1)
    assert [point["bytes"] for point in points] == [3 * 2 * 2 * 8 * 4 * tokens for tokens in (3, 65)]
    assert points[0]["kl"] > points[1]["kl"] > -1e-6
    assert points[1]["loss"] - facts["loss"] < 1e-5

    found = {"teacher": {"name": "tiny", **facts}, "points": points}
    assert table(found).splitlines()[-1].startswith(f"| {WINDOW} | 64 | 24.4 KiB | 0.000 | ")
    draw(found, tmp_path / "curve.png")
    height, width, _ = imread(tmp_path / "curve.png").shape
    assert width > height > 200


def test_a_student_that_failed_is_in_the_table_and_not_in_the_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(state_curve, "load_student", lambda path: path)
    monkeypatch.setattr(state_curve, "state_bytes", lambda path: 640 if path.name == "convert" else 0)
    common = Common(Path("teacher.yaml"), (), "[]", 256, 1, False, tmp_path)
    failed = {"recipe": "ours", "failed": "the held-out loss is not finite", "curve": []}
    point = state_curve._of_student(common, Wanted("ours", 1000, 1.0, 0), failed, "mamba2", 4)
    whole = {"kind": "mamba2", "size": 8, "bytes": 1280, "loss": 2.5, "kl": 0.5, "agreement": 0.5, "recall": None}
    found = {"teacher": {"name": "tiny", "loss": 2.0, "recall": None}, "points": [point, whole]}
    assert table(found).splitlines()[2:] == [
        "| mamba2 | 4 | 640 B | failed | failed | failed |",
        "| mamba2 | 8 | 1.25 KiB | 0.500 | 0.500 | 50.0% |",
    ]
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda ax, *xy, **style: lines.append(xy) or plot(ax, *xy, **style))
    draw(found, tmp_path / "curve.png")
    assert lines == [((1280,), (0.5,))]


def test_mistakes_in_any_student_end_before_the_text_is_prepared(tmp_path, saved_teacher, text, monkeypatch, capsys):
    monkeypatch.chdir(CHECKOUT)
    teacher, output = write_recipe(tmp_path, saved_teacher, text), tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        state_curve.main(teacher=str(teacher), output=output, recipe="kl_only student.window_layers=[99]", budget="16K")
    assert ended.value.code == 2
    assert "student.window_layers" in capsys.readouterr().err
    assert not output.exists()
