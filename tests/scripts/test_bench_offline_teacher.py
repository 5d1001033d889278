"""scripts.bench_offline_teacher: which student it measures."""

from types import SimpleNamespace

from distill.recipe import Recipe
from scripts.bench_offline_teacher import converted
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
    made = converted(run).config.distill
    assert made["layers"] == ["discrete_mamba2", "attention", "discrete_mamba2"]
    assert {name: made["mixer"][name] for name in ("rope", "state_dim", "conv_width")} == {
        name: student[name] for name in ("rope", "state_dim", "conv_width")
    }
    assert made["mixer"]["n_heads"] == 2 * 4
