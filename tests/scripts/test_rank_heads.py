"""The head that the recall teacher looks up with is found from its folder."""

import json

from typer.testing import CliRunner

from scripts import rank_heads
from tests.conftest import CHECKOUT


def test_the_recall_teachers_heads_are_found(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(rank_heads.main)
    options = ["--surface", "ids", "--task", "phonebook", "--items", "4", "--samples", "6", "--keep", "2"]
    found = CliRunner().invoke(
        app, [str(CHECKOUT / "teachers" / "recall"), *options, "--output", str(tmp_path / "heads.json")]
    )
    assert found.exit_code == 0, found.output
    assert "student: {keep_heads: {2: [1], 3: [3]}}" in found.output
    assert len(json.loads((tmp_path / "heads.json").read_text())["heads"]) == 16
