"""Single heads beside mixers where weights are kept in pieces: the same losses as by one process.

ZeRO-3 makes weights whole module by module, and here a module of modules stands where elsewhere a mixer stands: what
reaches for the mixer's weights past its forward has to go through both.
"""

from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from tests.stages.conftest import CALM, write_recipe
from tests.stages.launch import Ranks
from tests.stages.program import run
from tests.stages.run_folder import metrics

pytestmark = pytest.mark.slow

HEADS = ["student.keep_attention=[]", "student.keep_heads={0: [3], 2: [0, 1]}", "stages.hidden.target=heads"]
SHORT = [f"stages.{stage}.tokens=512" for stage in ("mixing", "hidden", "logits")]
MOVED = {"mixing": 1e-6, "hidden": 1e-4}
"""Weights, at most; in the last stage a step of Adam makes a rounding's sign a step's length."""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_heads_beside_mixers_train_in_pieces_as_whole(tmp_path, saved_teacher, text):
    recipe = write_recipe(tmp_path, saved_teacher, text)
    ended = run("stages.run", recipe, *CALM, *HEADS, *SHORT, f"run_dir={tmp_path / 'whole'}")
    assert ended.code == 0, ended.err
    left = Ranks("zero3", "stages.run", recipe, *CALM, *HEADS, *SHORT, f"run_dir={tmp_path / 'pieces'}").wait()
    assert not any(left.codes), left.log
    for stage in ("mixing", "hidden", "logits"):
        whole, pieces = (
            [row["loss"] for row in metrics(tmp_path / where / stage) if row["kind"] == "train"]
            for where in ("whole", "pieces")
        )
        assert pieces == pytest.approx(whole, rel=1e-4), stage
    for stage, most in MOVED.items():
        ours, theirs = (load_file(tmp_path / where / stage / "model.safetensors") for where in ("pieces", "whole"))
        assert ours.keys() == theirs.keys()
        assert all((ours[name] - theirs[name]).abs().max() <= most for name in ours), stage
