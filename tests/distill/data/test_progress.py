"""What a log file shows of a long preparation, and that a short one shows nothing."""

import re

import pytest

from distill.data import pack, prepare, progress, split_documents


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, True), (3600.0, False)])
def test_a_line_now_and_then(seconds, shown, library, tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "PLAIN_EVERY", seconds)
    monkeypatch.setattr(pack, "CHUNK_CHARACTERS", 1)
    prepare(*split_documents(library[:6], fraction=0.3, by="tail"), tokenizer, tmp_path / "data", block=64)
    lines = capfd.readouterr().err.splitlines()
    assert bool(lines) == shown
    assert all(re.fullmatch(r"preparing .*data: [\d,]+ training tokens, [\d,]+/s", line) for line in lines)


def test_the_time_left_is_told_where_the_end_is_known(monkeypatch, capfd):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    with progress.progress("preparing data", "training tokens", done=100, wanted=400) as show:
        show(200)
    assert re.fullmatch(
        r"preparing data: 200 training tokens, [\d,]+/s, 50% of 400, 0:00:00 left\n", capfd.readouterr().err
    )
