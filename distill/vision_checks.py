"""What can be wrong with images in a recipe, found without loading a weight: teacher, processor, rows, objectives."""

from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from distill.recipe import Recipe


def check_image_rows(recipe: "Recipe") -> None:
    """The source has rows with images, as far as the first of them says.

    Raises:
        UserError: naming file and line.
    """
    from distill.data.image_rows import find_row_files, read_image_rows

    if next(read_image_rows(find_row_files(recipe.data.source)), None) is None:
        raise UserError("holds no row")


def check_trained(recipe: "Recipe") -> None:
    """What only images reach is trained with images: without them an optimizer would only shrink it.

    Raises:
        UserError: naming it.
    """
    stage = recipe.stages.logits
    named = [role for role in ("connector", "vision") if stage is not None and role in stage.train]
    if named and recipe.data.images is None:
        raise UserError(f"names {' and '.join(named)}, which text does not reach; give data.images, or leave it out")


def check_images(recipe: "Recipe", config: "PreTrainedConfig") -> None:
    """The teacher reads images, its processor is whole, and it takes the first row.

    Raises:
        UserError: what of this is not so; the processor's own message where it refuses the row.
    """
    from distill.data.image_encoding import ImageEncoder
    from distill.data.image_rows import find_row_files, read_image_rows
    from distill.processor import image_token_id, read_processor
    from distill.vision import is_vision

    if not is_vision(config):
        raise UserError(f"the teacher is a {config.model_type}, which reads no images; leave images out")
    stage = recipe.stages.logits
    if stage is not None and stage.offline_teacher is not None:
        raise UserError("an offline teacher knows token blocks only; leave out stages.logits.offline_teacher")
    assert recipe.data.images is not None
    processor = read_processor(recipe.teacher.path, recipe.data.images.processor)
    row = next(read_image_rows(find_row_files(recipe.data.source)))
    encoder = ImageEncoder(processor, row.kind, image_token_id(config))
    encoder.encode(row)
    if encoder.takes_answers and recipe.data.images.score != "answers":
        raise UserError("score: this processor's prompts are read in both directions, so only answers can be scored")
