"""A run on real images, from a teacher's folder to a student that answers a question about one.

One slow test: no part of it alone shows that data, processor, stages, evaluation and hand-over fit together.
"""

import json

import pytest
from transformers import AutoModelForImageTextToText

from distill import load_student
from tests.stages.program import run
from tests.vision_processors import tiny_processor, write_run


@pytest.mark.slow
def test_a_vision_language_teacher_becomes_a_student_that_reads_images(tmp_path):
    tiny_processor("llava")
    recipe = write_run(tmp_path)
    first = run("stages.run", recipe)
    assert first.code == 0, first.err
    folders = [tmp_path / "run" / stage for stage in ("convert", "mixing", "hidden", "logits")]
    kl = [json.loads((folder / "evaluation.json").read_text())["metrics"]["kl"] for folder in folders]
    assert kl[2] < 0.5 * kl[0]
    assert kl[3] < kl[2]
    assert (tmp_path / "run" / "report.html").is_file()

    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "teacher").state_dict()
    ours = load_student(folders[-1]).state_dict()
    towers = [name for name in theirs if "vision_tower" in name]
    assert towers
    assert all((ours[name] == theirs[name]).all() for name in towers)
    connector = "model.multi_modal_projector.linear_1.weight"  # which the recipe names
    assert not (ours[connector] == theirs[connector]).all()

    assert run("stages.run", recipe).out.count("already done") == 4
    ask = ("distill.cli", "generate", folders[-1], "what is it?", "--image")
    answer = run(*ask, tmp_path / "images" / "1.png")
    assert answer.code == 0, answer.err
    assert answer.out.strip()
    wrong = run(*ask, tmp_path / "images" / "none.png")
    assert wrong.code == 2
    assert "none.png: cannot be read as an image" in wrong.err
