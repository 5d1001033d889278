"""The head that the recall teacher looks up with is found from its folder."""

import json
from types import SimpleNamespace

import pytest
import typer
from transformers import GenerationConfig, LlamaConfig
from typer.testing import CliRunner

from distill.errors import UserError
from scripts import rank_heads
from tests.conftest import CHECKOUT

RECALL = str(CHECKOUT / "teachers" / "recall")


def run(*arguments):
    app = typer.Typer()
    app.command()(rank_heads.main)
    return CliRunner().invoke(app, [RECALL, *map(str, arguments)])


def test_the_recall_teachers_heads_are_found(tmp_path):
    options = ["--surface", "ids", "--task", "phonebook", "--items", "4", "--samples", "6", "--keep", "2"]
    found = run(*options, "--output", tmp_path / "heads.json")
    assert found.exit_code == 0, found.output
    assert "student: {keep_heads: {2: [1], 3: [3]}}" in found.output
    assert len(json.loads((tmp_path / "heads.json").read_text())["heads"]) == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "40000"], "length is 40000; the teacher knows"),
        (["--task", "phonebook", "--surface", "ids", "--length", "40000"], "length is 40000; the teacher knows"),
        (["--device", "gpu"], "--device is 'gpu'; allowed are auto, cpu and cuda"),
        (["--output", CHECKOUT], "is a folder; name a file"),
    ],
)
def test_mistakes_are_told_before_any_head_is_asked(arguments, said, monkeypatch):
    monkeypatch.setattr(rank_heads, "rank_heads", None)
    found = run(*arguments)
    assert found.exit_code == 2, found.exception
    assert said in found.output


def test_repetitions_draw_no_id_that_ends_a_text(monkeypatch):
    """Llama 3's chat models have several."""
    config = LlamaConfig(vocab_size=32, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3, max_position_embeddings=64)
    model = SimpleNamespace(config=config, generation_config=GenerationConfig(eos_token_id=[2, 4]))
    drawn = []
    monkeypatch.setattr(rank_heads, "asking_repeated", lambda ids, **settings: drawn.extend(ids))
    rank_heads._repetitions(model, 2, 64, 0)
    assert drawn == list(range(5, 32))
    with pytest.raises(UserError, match="length is 65; the teacher knows 64 positions"):
        rank_heads._repetitions(model, 2, 65, 0)
