"""The colours of models in a section's charts."""

from collections.abc import Collection

from eval.figures import model_colour


def colours(models: Collection[str]) -> dict[str, str]:
    """The first of the models, usually the teacher, in the teacher's colour; the others as in the table on top."""
    first, *others = models
    return {first: "teacher"} | {name: model_colour(place) for place, name in enumerate(others)}
