"""A run, and scripts.bench_offline_teacher, convert as the recipe says."""

from types import SimpleNamespace

from distill import convert
from distill.convert_stage import conversion_of
from distill.recipe import Recipe
from tests.conftest import tiny


def test_the_student_is_the_recipes():
    student = {"mixer": "discrete_mamba2", "rope": "keep", "expand": 2, "state_dim": 16, "conv_width": 3}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "teacher": {"path": "t"},
            "student": student,
            "data": {"source": "s"},
            "stages": {"logits": {"tokens": 1000}},
        }
    )
    run = SimpleNamespace(teacher=tiny("llama"), recipe=recipe, facts=SimpleNamespace(kept=(1,)))
    made = convert(run.teacher, **conversion_of(run)).config.distill
    assert made["layers"] == ["discrete_mamba2", "attention", "discrete_mamba2"]
    assert {name: made["mixer"][name] for name in ("rope", "state_dim", "conv_width")} == {
        name: student[name] for name in ("rope", "state_dim", "conv_width")
    }
    assert made["mixer"]["n_heads"] == 2 * 4
