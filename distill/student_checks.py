"""What can be wrong with the student that a recipe asks for, found without a weight: by planning its conversion."""

from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.recipe import Recipe, Student

if TYPE_CHECKING:  # as in `distill.checks`
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def check_window(student: Student) -> None:
    """A window is given only where some layer has one."""
    has_one = student.mixer == "sliding_window" or student.window_layers
    if not has_one and (student.window, student.sinks) != (None, None):
        raise UserError(
            f"window and sinks are for student.mixer: sliding_window, not {student.mixer}; leave them out, or name"
            " student.window_layers"
        )


def check_window_layers(student: Student, config: "PreTrainedConfig", kept: tuple[int, ...]) -> None:
    """The layers are there, do not keep attention, and leave some to the mixer; their own windows agree."""
    if student.window_layers:
        _planned(student, config, kept, "window_layers")


def check_exportable_student(
    recipe: Recipe, config: "PreTrainedConfig", kept: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase | None"
) -> None:
    """The student can be written in the format that the recipe names, by its config and, for gguf, its tokenizer."""
    student = recipe.student
    if student.exportable is None:
        return
    from distill.export.refusals import check_exportable
    from distill.export.vocabulary import vocabulary

    check_exportable(_planned(student, config, kept, *student.settings()), student.exportable)
    if student.exportable == "gguf" and tokenizer is not None:
        vocabulary(tokenizer, config.get_text_config().vocab_size)


def check_expand(student: Student) -> None:
    from distill.copies import require_copies

    require_copies(student.expand, student.mixer, bool(student.keep_heads))


def check_rope(student: Student, config: "PreTrainedConfig", kept: tuple[int, ...]) -> None:
    """What a mixer could not rotate is refused by the plan of the conversion, with the reason."""
    if student.rope == "keep":
        _planned(student, config, kept, "window_layers", "state_dim", "rope")


def check_kept_heads(recipe: Recipe, config: "PreTrainedConfig", kept: tuple[int, ...]) -> None:
    """The heads are there, in layers with a mixer, and stage 1 has others to match."""
    from distill.heads import require_unmatched

    student = recipe.student
    if student.keep_heads:
        made = _planned(student, config, kept, "window_layers", "keep_heads")
        if recipe.stages.mixing is not None:
            require_unmatched(student.keep_heads, made.distill["mixer"]["n_heads"])


def _planned(student: Student, config: "PreTrainedConfig", kept: tuple[int, ...], *names: str) -> "PreTrainedConfig":
    """The student's config with its mixer and these settings alone: what else is wrong is told by its own check.

    So is what a teacher reads in both directions, hence ``causal`` whatever the student says.
    """
    from distill.conversion import plan

    wanted = {name: getattr(student, name) for name in ("mixer", *names)}
    return plan(config, keep_attention=kept, **wanted | {"bidirectional": "causal"})
