"""From a teacher's folder to a student's folder, with everything that can go wrong checked first."""

import json
from pathlib import Path
from typing import Any

from distill.atomic import whole_folder
from distill.checks import check_weights, read_config, read_tokenizer, teacher_folder
from distill.conversion import Report, convert_with_report, load_teacher, plan
from distill.errors import UserError
from distill.heads import read_heads
from distill.layout import resolve
from distill.new_folder import check_new_folder
from distill.processor import copy_processor
from distill.vision import is_vision
from distill.weight_files import stored_tensors


def convert_folder(
    teacher: str,
    out: Path,
    *,
    mixer: str,
    keep: str,
    heads: str = "",
    seed: int,
    overwrite: bool,
    rope: str = "drop",
    bidirectional: str = "refuse",
) -> Report:
    """Converts `teacher` and saves the student, its tokenizer and conversion.json in `out`, whole or not at all.

    Args:
        teacher: a Hugging Face folder or a Hub id.
        out: a new or empty folder; with `overwrite` also one that holds a model, which is replaced.
        mixer: a key of ``distill.mixers.KINDS``.
        keep: layers that keep attention, ``"2,5"`` or a pattern such as ``"mmma"``; ``""`` for none.
        heads: query heads that keep attention beside their layer's mixer, ``"3:0+2,5:1"``; ``""`` for none.
        seed: of what does not come from the teacher.
        overwrite: whether a model at `out` may be replaced.
        rope: ``keep`` or ``drop``, the teacher's rotary positions.
        bidirectional: "causal" converts also what a teacher reads in both directions.

    Raises:
        UserError: the teacher, the layout or the target cannot be used; nothing is written.
    """
    folder = teacher_folder(teacher)
    check_new_folder(out, folder, "teacher", overwrite)
    config = read_config(folder or teacher)
    kept = _kept(keep, config.get_text_config().num_hidden_layers)
    layout: dict[str, Any] = {
        "mixer": mixer,
        "keep_attention": kept,
        "keep_heads": read_heads(heads),
        "rope": rope,
        "bidirectional": bidirectional,
    }
    plan(config, **layout)
    tokenizer = read_tokenizer(folder or teacher)
    if folder:
        check_weights(stored_tensors(folder), config, folder)
    model = load_teacher(folder or teacher)
    student, report = convert_with_report(model, seed=seed, **layout)
    with whole_folder(out.resolve()) as partial:
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if is_vision(config):
            copy_processor(folder or teacher, partial)
        (partial / "conversion.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    return report


def _kept(keep: str, n_layers: int) -> list[int]:
    text = keep.replace(" ", "")
    if text and set(text) <= {"m", "a"}:
        return resolve(n_layers, pattern=text)
    indices = text.split(",") if text else []
    if not all(index.isdecimal() for index in indices):
        raise UserError(f"--keep-attention is {keep!r}; give layers such as 2,5 or a pattern such as mmma")
    return resolve(n_layers, layers=[int(index) for index in indices])
