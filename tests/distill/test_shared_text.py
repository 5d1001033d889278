"""One prepared text for several runs, wherever the folder above them is put."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from distill.run import Run, share_text


def run_in(run_dir: Path) -> Run:
    return cast(Any, SimpleNamespace(recipe=SimpleNamespace(run_dir=run_dir)))


def test_the_folder_above_text_and_runs_may_be_moved(tmp_path):
    before, after = tmp_path / "before", tmp_path / "elsewhere" / "after"
    (before / "data").mkdir(parents=True)
    share_text(run_in(before / "runs" / "one"), before / "data")
    after.parent.mkdir()
    before.rename(after)
    assert (after / "runs" / "one" / "data").samefile(after / "data")


def test_a_link_that_leads_nowhere_or_to_another_text_is_replaced(tmp_path):
    text, run_dir = tmp_path / "data", tmp_path / "run"
    for other in (tmp_path / "other", run_dir, text):
        other.mkdir()
    for leads_to in (tmp_path / "gone", tmp_path / "other"):
        (run_dir / "data").symlink_to(leads_to)
        share_text(run_in(run_dir), text)
        assert (run_dir / "data").samefile(text)
        (run_dir / "data").unlink()


def test_a_text_of_its_own_stays(tmp_path):
    text, own = tmp_path / "data", tmp_path / "run" / "data"
    text.mkdir()
    own.mkdir(parents=True)
    share_text(run_in(own.parent), text)
    assert not own.is_symlink()
