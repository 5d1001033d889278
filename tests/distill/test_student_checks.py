"""What a recipe asks of its student, checked by planning: a mistake is told under its own key, and under no other."""

from types import SimpleNamespace
from typing import Any

import pytest

from distill.errors import UserError
from distill.recipe import Student
from distill.student_checks import check_exportable_student, check_kept_heads, check_rope, check_window_layers
from tests.vision_models import tiny_vision


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("bidirectional", ["causal", "refuse"])
def test_no_other_key_speaks_of_reading_in_both_directions(name, bidirectional):
    """``student.bidirectional`` has a check of its own, which finds nothing wrong with ``causal``."""
    config = tiny_vision(name).config
    check_rope(Student(rope="keep", bidirectional=bidirectional), config, ())
    check_window_layers(Student(window_layers=(1,), bidirectional=bidirectional), config, ())
    check_kept_heads(asking_for(keep_heads={1: (0,)}, bidirectional=bidirectional), config, ())
    with pytest.raises(UserError, match="it sees images, and the format"):
        check_exportable_student(asking_for(exportable="granite", bidirectional=bidirectional), config, (), None)


def asking_for(**student: Any) -> Any:
    """A recipe, as far as these checks look at it."""
    return SimpleNamespace(student=Student(**student), stages=SimpleNamespace(mixing=None))
