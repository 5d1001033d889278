"""What can be wrong with a recipe beyond its text, found without loading a weight: files, depths, devices."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.recipe import Keep, LayerwiseTraining, Recipe, StageName
from distill.student_checks import (
    check_expand,
    check_exportable_student,
    check_kept_heads,
    check_rope,
    check_window,
    check_window_layers,
)
from distill.vision_checks import check_image_rows, check_images, check_trained
from distill.weight_files import TensorFacts, stored_tensors

if TYPE_CHECKING:  # imported where used: they take seconds, and most recipes fail sooner or later than here
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class RecipeFacts:
    """What the files of a recipe say.

    Attributes:
        config: the teacher's.
        n_layers: the depth of teacher and student.
        kept: the layers that keep attention, ascending.
        steps: optimizer steps of each stage.
        vocab_size: rows of the teacher's embedding.
        tokenizer_size: tokens of its tokenizer, at most `vocab_size`; None if it was not looked at.
        weights_found: whether the teacher has weights; it can be without them only in planning.
    """

    config: "PreTrainedConfig"
    n_layers: int
    kept: tuple[int, ...]
    steps: MappingProxyType[StageName, int]
    vocab_size: int
    tokenizer_size: int | None
    weights_found: bool = True


def check(recipe: Recipe, *, ranks: int = 1, zero: bool = False, planning: bool = False) -> RecipeFacts:
    """Checks everything that a run of the recipe would stumble over and that shows before weights are loaded.

    Args:
        recipe: as `load_recipe` returns it.
        ranks: processes that train together; which share `batch_size` sequences.
        zero: whether DeepSpeed trains, in one process too.
        planning: the teacher may be a folder with nothing but a config.json; tokenizer and text are then not asked for.

    Raises:
        UserError: all problems, one a line, each with its key.
    """
    from distill.data.batches import micro_batches, steps_for
    from distill.vision import refuse_both_ways

    found = _Problems()
    steps: dict[StageName, int] = {}
    config_alone = planning and _is_config_alone(recipe.teacher.path)
    with found.at("device"):
        _check_device(recipe.device)
    with found.at("run_dir"):
        _check_writable(recipe.run_dir)
    with found.at("trackers"):
        _check_trackers(recipe.trackers)
    for name, stage in recipe.stages.named().items():
        with found.at(f"stages.{name}.block"):
            _check_stage_block(stage.block, recipe)
        with found.at(f"stages.{name}.tokens"):
            steps[name] = steps_for(stage.tokens, stage.batch_size, recipe.block_of(stage))
        with found.at(f"stages.{name}.batch_size"):
            by_layers = isinstance(stage, LayerwiseTraining) and stage.parallel == "layers"
            micro_batches(stage.batch_size, stage.micro_batch_size, 1 if by_layers else ranks)
    for key in ("data.source", "data.training_only"):
        with found.at(key):
            if not config_alone:
                _check_source(recipe, key)
    with found.at("teacher.path"):
        folder = teacher_folder(recipe.teacher.path)
        config = read_config(folder or recipe.teacher.path)
        text = config.get_text_config()
        tokenizer_size, tokenizer = None, None
        with found.at("teacher.path"):
            if not config_alone:
                tokenizer = read_tokenizer(folder or recipe.teacher.path)
                tokenizer_size = _check_vocabulary(tokenizer, text.vocab_size)
                for key, wanted in (("bos", recipe.data.bos), ("eos", recipe.data.eos)):
                    with found.at(f"data.{key}"):
                        _check_special_token(tokenizer, key, wanted and recipe.data.images is None)
        with found.at("stages.mixing"):
            if recipe.stages.mixing is not None:
                _check_mixing(recipe.student.mixer)
        with found.at("stages.hidden"):
            _check_heads(recipe)
        with found.at("student.window"):
            check_window(recipe.student)
        with found.at("student.expand"):
            check_expand(recipe.student)
        with found.at("stages.logits.train"):
            check_trained(recipe)
        with found.at("stages.logits.stepwise"):
            _check_stepwise(recipe, ranks, zero)
        with found.at("data.images"):
            if recipe.data.images is not None and not config_alone and not found.lines:
                check_images(recipe, config)
        with found.at("student.keep_attention"):
            kept = kept_layers(recipe.student.keep_attention, text.num_hidden_layers)
            _check_mixers(text.num_hidden_layers - len(kept), recipe)
            with found.at("student.window_layers"):
                check_window_layers(recipe.student, config, kept)
            with found.at("student.keep_heads"):
                check_kept_heads(recipe, config, kept)
            with found.at("student.bidirectional"):
                if recipe.student.bidirectional == "refuse" and len(kept) < text.num_hidden_layers:
                    refuse_both_ways(config)
            with found.at("student.exportable"):
                check_exportable_student(recipe, config, kept, tokenizer)
            with found.at("student.rope"):
                check_rope(recipe.student, config, kept)
        with found.at("data.block"):
            _check_block(recipe.data.block, text)
        if folder and not config_alone:
            check_weights(stored_tensors(folder), config, folder)
    if found.lines:
        raise UserError("\n".join(found.lines))
    return RecipeFacts(
        config=config,
        n_layers=text.num_hidden_layers,
        kept=kept,
        steps=MappingProxyType(steps),
        vocab_size=text.vocab_size,
        tokenizer_size=tokenizer_size,
        weights_found=not config_alone,
    )


def _is_config_alone(path: str) -> bool:
    """Whether it is a folder with a model's config and none of its weights, in whatever format."""
    folder = Path(path).expanduser()
    weights = (file for kind in ("safetensors", "bin", "pt", "gguf") for file in folder.glob(f"*.{kind}*"))
    return (folder / "config.json").is_file() and not any(weights)


def kept_layers(keep: Keep, n_layers: int) -> tuple[int, ...]:
    """The layers of a model of that depth that keep attention; UserError if the layout does not fit it."""
    from distill.layout import resolve

    layers = None if keep.layers is None else list(keep.layers)
    return tuple(resolve(n_layers, layers=layers, pattern=keep.pattern, ratio=keep.ratio, count=keep.count))


class _Problems:
    """Collects what `UserError`s say, each with the key it is about, so that one does not hide the next."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.lines.append(_about(key, str(error)))


def _about(key: str, text: str) -> str:
    """`key: text`, less what of the key the text begins with."""
    section, dot, last = key.rpartition(".")
    if text.startswith(key):
        return text
    return f"{section}{dot}{text}" if text.startswith(last) else f"{key}: {text}"


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no CUDA device is visible to this PyTorch; use auto or cpu")


def _check_writable(run_dir: Path) -> None:
    nearest = run_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file, so {run_dir} cannot be a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest} may not be written to; choose another folder")


def _check_trackers(trackers: tuple[str, ...]) -> None:
    if trackers:
        from distill.training.tracking import require_trackers

        require_trackers(trackers)


def _check_source(recipe: Recipe, key: str) -> None:
    """Every source has at least one document; what is on the Hub is left to the data preparation."""
    if recipe.data.images is not None:
        check_image_rows(recipe)
        return
    from distill.data.corpus import DATASET_PREFIX, read_documents

    data = recipe.data
    for source in getattr(data, key.removeprefix("data.")):
        if not source.startswith(DATASET_PREFIX):
            next(iter(read_documents(source, text_key=data.text_key, separator=data.separator, key=key)))


def teacher_folder(path: str) -> Path | None:
    """The folder at `path`, or None for what can only be a model on the Hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} has no config.json, so it is not a Hugging Face model folder")
        return folder
    looks_like_id = path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not path.endswith("/")
    # teachers/tiny beside an existing folder teachers/ is a folder that is missing, not a model of that name.
    if looks_like_id and not folder.parent.is_dir():
        return None
    beside = folder.parent if folder.parent.is_dir() else Path()
    there = sorted(config.parent.name for config in beside.glob("*/config.json"))
    raise UserError(
        f"no folder {path} here ({Path.cwd()})"
        + (f"; models in {beside}: {', '.join(there[:5])}" if there else "; give a model folder or a Hub id org/name")
    )


def read_config(path: Path | str) -> "PreTrainedConfig":
    from transformers import AutoConfig

    from distill.attention import family_of

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever transformers, the Hub client or its validators raise
        raise UserError(f"the config of {path} cannot be read: {_first_line(error)}") from None
    if getattr(config, "distill", None) is not None:
        raise UserError(f"{path} is already a student; give the Transformer it came from")
    family_of(config)
    return config


def read_tokenizer(path: Path | str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if isinstance(path, Path) and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{path} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # json, tokenizers and transformers each raise their own
        raise UserError(f"the tokenizer of {path} cannot be read: {_first_line(error)}") from None


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """The number of tokens; it may be smaller than the embedding by padding, never larger."""
    size = len(tokenizer)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    padded = max(-(-size // 128) * 128, int(1.1 * size))
    if size > vocab_size or largest >= vocab_size or vocab_size > padded:
        raise UserError(
            f"the tokenizer has {size} tokens (the largest id is {largest}) and the model a vocabulary of"
            f" {vocab_size}: it is the tokenizer of another model; use the one this model was trained with"
        )
    return size


def check_weights(stored: dict[str, TensorFacts], config: "PreTrainedConfig", folder: Path) -> None:
    """Every parameter is there in its shape; transformers would fill in a missing one at random."""
    from distill.conversion import empty_model
    from distill.weight_names import names_in

    model = empty_model(config)
    # Hugging Face accepts a checkpoint of the bare decoder, whose names lack the prefix.
    prefix, renamed = f"{model.base_model_prefix}.", names_in(model)
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name, facts in stored.items():
        found = renamed(name)
        shapes[found.name.removeprefix(prefix)] = facts.shape if found.whole else None
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = [tied[0] for tied in names.values() if not any(name.removeprefix(prefix) in shapes for name in tied)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the checkpoint in {folder} lacks {missing[0]}{more}; download it again")
    for name, parameter in model.named_parameters():
        shape = shapes.get(name.removeprefix(prefix))
        if shape is not None and shape != tuple(parameter.shape):
            raise UserError(
                f"{name} has shape {list(shape)} in {folder} and {list(parameter.shape)} by its config.json;"
                " use the config it was saved with"
            )


def _check_mixers(n_mixers: int, recipe: Recipe) -> None:
    idle = [name for name in recipe.stages.named() if name != "logits"]
    if idle and not n_mixers:
        raise UserError(
            f"keep_attention leaves nothing for {' and '.join(idle)} to train; keep fewer layers, or drop what is idle"
        )


def _check_mixing(mixer: str) -> None:
    """Stage 1 streams the two matrices past each other, which it can where a mixer's has factors."""
    from distill.mixers import KINDS

    made: Any = KINDS[mixer]
    if made.without_factors is not None:
        raise UserError(f"not for {mixer}: {made.without_factors}; leave the stage out, and give its tokens to hidden")


def _check_heads(recipe: Recipe) -> None:
    """What is told apart inside of a mixer must be there."""
    hidden = recipe.stages.hidden
    if hidden is None:
        return
    if recipe.student.window_layers and hidden.target == "heads":
        raise UserError("target: heads is not for window_layers, whose heads are not told apart; use mixer")
    if recipe.student.mixer == "sliding_window":
        if hidden.target == "heads":
            raise UserError("target: heads is not for sliding_window, whose heads are not told apart; use mixer")
        if hidden.projections_frozen:
            raise UserError("projections_frozen is not for sliding_window, which has no seed to keep; leave it out")


def _check_block(block: int, text: "PreTrainedConfig") -> None:
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and block > longest:
        raise UserError(f"{block} tokens are more than the {longest} positions that the teacher knows; lower it")


def _check_stage_block(block: int | None, recipe: Recipe) -> None:
    if block is None or block == recipe.data.block:
        return
    if recipe.data.images is not None:
        raise UserError("rows with images cannot be cut; leave it out")
    if recipe.data.block % block:
        longer = [size for size in range(2, recipe.data.block) if recipe.data.block % size == 0]
        near = min(longer, key=lambda size: abs(size - block), default=recipe.data.block)
        raise UserError(f"{block} does not divide data.block, which is {recipe.data.block}; take {near}, or another")


def _check_stepwise(recipe: Recipe, ranks: int, zero: bool) -> None:
    if recipe.stages.logits is None or recipe.stages.logits.stepwise is None:
        return
    if ranks > 1:
        raise UserError(f"the teacher's attention is lent within one process, not {ranks}; launch one, or leave it out")
    if zero:
        raise UserError(
            "DeepSpeed takes a missing gradient for zero and decays mixers whose turn has not come; launch without it,"
            " or leave it out"
        )
    if recipe.teacher.dtype != recipe.dtype:
        raise UserError(
            f"attention must compute as its student does; teacher.dtype is {recipe.teacher.dtype}, dtype {recipe.dtype}"
        )


def _check_special_token(tokenizer: "PreTrainedTokenizerBase", key: str, wanted: bool) -> None:
    if wanted and getattr(tokenizer, f"{key}_token_id") is None:
        raise UserError(f"the teacher's tokenizer has no {key.upper()} token; set it to false")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
