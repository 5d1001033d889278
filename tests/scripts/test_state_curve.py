"""scripts.state_curve: what a state's size makes of a recipe, and what is kept beside its bytes."""

from matplotlib.image import imread

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
