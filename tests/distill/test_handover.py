"""A stage hands over a whole folder; whatever was done to it afterwards is said by name."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.errors import UserError
from distill.handover import Parent, StageRecord, read, verify, write

RECORD = StageRecord("mixing", None, loss_start=3.0, loss_end=1.0, steps=10, tokens=400, seconds=2.5, settings="abc")


def save(folder: Path) -> None:
    for shard in (1, 2):
        weights = {f"w{shard}": torch.full((64,), float(shard))}
        save_file(weights, folder / f"model-0000{shard}-of-00002.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text("name: x\n")


@pytest.fixture
def stage(tmp_path) -> Path:
    write(tmp_path / "mixing", save, RECORD)
    return tmp_path / "mixing"


def test_what_was_written_is_verified(stage):
    record = verify(stage)
    assert record == read(stage)
    assert record == replace(RECORD, weights=record.weights, sizes=record.sizes)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(record.weights) == list(record.sizes) == [*shards, "config.json"]
    assert {"python", "torch", "transformers", "accelerate"} <= record.versions.keys()
    assert sorted(path.name for path in stage.parent.iterdir()) == ["mixing"]


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_record(stage: Path, **changed: object) -> None:
    path = stage / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


SHARD = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda at: (at / "stage.json").unlink(), r"stage\.json is missing: .*not a finished stage"),
    "record cut short": (lambda at: os.truncate(at / "stage.json", 40), r"stage\.json is damaged"),
    "record of nothing": (lambda at: (at / "stage.json").write_text("[]"), r"stage\.json is damaged"),
    "entry missing": (lambda at: (at / "stage.json").write_text('{"stage": "x"}'), r"stage\.json is damaged"),
    "unknown entry": (lambda at: edit_record(at, colour=1), r"stage\.json is damaged \(unknown entries colour\)"),
    "no weights listed": (lambda at: edit_record(at, weights={}, sizes={}), r"stage\.json is damaged"),
    "weights missing": (lambda at: (at / SHARD).unlink(), SHARD + " is missing"),
    "weights cut short": (lambda at: os.truncate(at / SHARD, 99), SHARD + r" has 99 bytes instead of \d+"),
    "weights edited": (lambda at: flip(at / SHARD), SHARD + " was changed"),
    "header edited": (lambda at: flip(at / SHARD, 20), SHARD + " was changed"),
    "config cut short": (lambda at: os.truncate(at / "config.json", 1), r"config\.json has 1 bytes instead of 2"),
    "config edited": (lambda at: (at / "config.json").write_text("[]"), r"config\.json was changed"),
    "weights added": (lambda at: (at / "model.safetensors").touch(), r"model\.safetensors is not among"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(stage, damage):
    harm, message = DAMAGES[damage]
    harm(stage)
    with pytest.raises(UserError, match=message):
        verify(stage)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="hidden is missing: run the stage that writes it first"):
        verify(tmp_path / "hidden")


def test_another_parent_or_recipe_is_refused(stage, tmp_path):
    parent = verify(stage).as_parent()
    write(tmp_path / "hidden", save, replace(RECORD, stage="hidden", parent=parent))
    assert verify(tmp_path / "hidden", parent, expected_settings="abc").parent == parent
    other = Parent("mixing", "0" * 64)
    with pytest.raises(
        UserError, match=rf"hidden started from mixing \({parent.sha256[:12]}\), not from mixing \(0+\)"
    ):
        verify(tmp_path / "hidden", other)
    with pytest.raises(UserError, match=r"mixing started from the teacher, not from mixing"):
        verify(stage, other)
    with pytest.raises(UserError, match="made with another recipe"):
        verify(stage, expected_settings="abd")


def test_a_parent_is_known_by_its_weights_and_ancestry(stage, tmp_path):
    record = verify(stage)
    assert replace(record, seconds=9.0).as_parent() == record.as_parent()
    assert replace(record, weights=record.weights | {SHARD: "0"}).as_parent() != record.as_parent()
    assert replace(record, parent=Parent("x", "y")).as_parent() != record.as_parent()


def test_an_earlier_stage_is_replaced_and_anything_else_is_not(stage, tmp_path):
    write(stage, save, replace(RECORD, steps=11))
    assert verify(stage).steps == 11
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"mine is not empty and holds no stage\.json"):
        write(tmp_path / "mine", save, RECORD)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_failed_save_leaves_what_was_there(stage, tmp_path):
    def fail(folder: Path) -> None:
        save(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="disk is full"):
        write(stage, fail, replace(RECORD, steps=11))
    assert verify(stage).steps == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixing"]
