"""What stages.run says at its end can be copied into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from stages import run


@pytest.mark.parametrize("prompt", ["def ", "it's", 'say "$HOME"', "first line\nand the next", "a\\b"])
def test_a_shell_reads_the_prompt_that_is_meant(prompt):
    folder = Path("my runs/tiny")
    recipe = SimpleNamespace(evaluation=SimpleNamespace(prompts=[prompt]))
    finished = cast(
        Any, SimpleNamespace(recipe=recipe, stages=["convert", "logits"], folder=lambda name: folder / name)
    )
    assert shlex.split(run._invitation(finished))[1:] == ["generate", "my runs/tiny/logits", prompt]
