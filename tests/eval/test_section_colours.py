"""Every model has a place in a section's charts, in the colour that the table on top gives it."""

from eval.figures import MODELS, model_colour
from eval.sections import generation, long_context
from eval.sections.colours import colours

NAMES = ["teacher", *(f"student {number}" for number in range(9))]


def test_the_first_is_the_teacher_and_the_others_go_round():
    found = colours(NAMES)
    assert list(found) == NAMES
    assert found["teacher"] == "teacher"
    assert [found[name] for name in NAMES[1:]] == [model_colour(place) for place in range(9)]
    assert found["student 8"] == found["student 0"]
    assert len(set(found.values())) == MODELS + 1


def test_no_model_is_left_out_of_a_chart():
    buckets = {"buckets": [{"to": 2, "loss": 1.0}, {"to": 4, "loss": 0.5}]}
    chart = long_context._by_position(dict.fromkeys(NAMES, buckets), trained=8, ticks=[2, 4])
    assert [one.label for one in chart.legend] == NAMES
    rows = [{"tokens": tokens, "preferred": 0.5, "written": 0.25} for tokens in (1, 2)]
    chart = generation._chart(dict.fromkeys(NAMES, rows))
    assert {one.label.partition(",")[0] for one in chart.legend} == set(NAMES)
