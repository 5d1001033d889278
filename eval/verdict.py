"""What a run's numbers mean, in a few sentences and a few figures."""

import math
from pathlib import Path
from typing import Any

from distill import units
from distill.evaluation import NO_GAP, perplexity
from distill.layout import NAMES
from eval import words
from eval.run_record import CONVERT, Memory, RunRecord

Numbers = dict[str, Any]

TILE_CONTEXT = 32768


def teacher_name(run: RunRecord) -> str:
    """The last part of the teacher's path or hub id."""
    teacher = run.recipe.get("teacher")
    path = str(teacher.get("path") if isinstance(teacher, dict) else teacher)
    return Path(path).name or path


def mixer_name(run: RunRecord) -> str:
    """What stands where attention stood."""
    found = [kind for kind in dict.fromkeys(run.layers) if kind != "attention"]
    asked = run.recipe.get("student") or {}
    return words.listed([NAMES.get(kind, kind) for kind in found or [asked.get("mixer", "mixer")]])


def student_name(run: RunRecord) -> str:
    """What became of the teacher: a hybrid if any layer, or any single head, keeps attention."""
    if run.layers and set(run.layers) == {"attention"}:
        return "the same Transformer"
    return f"{mixer_name(run)} hybrid" if "attention" in run.layers or run.heads else mixer_name(run)


def description(run: RunRecord) -> str:
    """Which layers were changed, in one sentence; empty where the layers are unknown."""
    depth = len(run.layers)
    kept = [index for index, kind in enumerate(run.layers) if kind == "attention"]
    changed = [index for index in range(depth) if index not in kept]
    if not depth:
        return ""
    if not changed:
        return f"All {depth} layers keep attention: nothing was converted."
    which = f"All {depth} layers" if not kept else f"{len(changed)} of {depth} layers ({words.runs(changed)})"
    text = f"{which} run {mixer_name(run)} in place of attention"
    if kept:
        text += f"; {'layer' if len(kept) == 1 else 'layers'} {words.runs(kept)} kept it"
    if run.heads:
        named = [f"{words.runs(heads)} of layer {layer}" for layer, heads in sorted(run.heads.items())]
        text += f"; beside the mixers attention heads {words.listed(named)} kept it"
    total = sum(run.parameters.values())
    return f"{text}. {words.amount(total)} parameters." if total else f"{text}."


def unfinished(run: RunRecord) -> str:
    """What is not there yet; empty for a finished run."""
    if not run.missing:
        return ""
    done = words.listed([stage.name for stage in run.measured])
    return f"Measured so far: {done}. Still to come: {words.listed(run.missing)}."


def tiles(run: RunRecord, student: Numbers) -> list[Numbers]:
    """The few figures to remember: label, value, note; what was not measured has no tile."""
    found = []
    if student["agreement"] is not None:
        found.append(("Same next token", words.percent(student["agreement"]), "as the teacher would pick"))
    note = "on held-out text"
    if student["teacher_loss"] is not None:
        note = f"teacher {words.plain(perplexity(student['teacher_loss']), 2)}"
    found.append(("Perplexity", words.plain(student["perplexity"], 2), note))
    if student["recovered"] is not None and student["name"] != CONVERT:
        found.append(("Gap closed", words.percent(student["recovered"]), "of what conversion had lost"))
    if run.memory:
        ours, theirs = run.memory.student(TILE_CONTEXT), run.memory.teacher(TILE_CONTEXT)
        label = f"Memory at {words.context(TILE_CONTEXT)} context"
        found.append((label, less(theirs, ours), f"{units.size(ours)}, teacher {units.size(theirs)}"))
    return [dict(zip(("label", "value", "note"), tile, strict=True)) for tile in found]


def kept(student: Numbers) -> str:
    """What the student can still do."""
    told = []
    if student["agreement"] is not None:
        told.append(f"It picks the same next token as its teacher {words.percent(student['agreement'])} of the time.")
    if student["name"] == CONVERT:
        told.append("This is the student as converted, before any training.")
    elif student["recovered"] is not None and student["recovered"] < 0:
        told.append("Training has made its loss larger than it was at conversion.")
    elif student["recovered"] is not None:
        told.append(f"Training took back {words.percent(student['recovered'])} of the loss that conversion had added.")
    elif (gap := _gap(student)) is not None and gap < NO_GAP:
        told.append("It predicts held-out text as well as its teacher.")
    return " ".join(told) or f"Its perplexity on held-out text is {words.plain(student['perplexity'], 2)}."


def lost(student: Numbers, distances: list[float]) -> str:
    """What stands between the student and its teacher."""
    told = []
    gap = _gap(student)
    if gap is None:
        told.append("No teacher was measured beside it.")
    elif not math.isfinite(gap):
        told.append("Its loss is not finite: this student is broken.")
    elif gap < NO_GAP:
        told.append("No loss on held-out text.")
    else:
        told.append(
            f"It is {words.times(student['perplexity_ratio'])[1:]} times as perplexed by held-out text as its "
            f"teacher: {words.plain(gap)} nats more a token."
        )
    if student["kl"] is not None and math.isfinite(student["kl"]):
        told.append(f"The two distributions are {words.plain(student['kl'])} nats (KL) apart.")
    finite = [distance for distance in distances if math.isfinite(distance)]
    if finite and max(finite) > 0:
        worst = distances.index(max(finite))
        told.append(f"The output of layer {worst} is furthest from its teacher’s: {words.percent(max(finite))} off.")
    return " ".join(told)


def _gap(student: Numbers) -> float | None:
    """The student's loss beyond its teacher's, nats per token; None where there was no teacher."""
    return None if student["teacher_loss"] is None else float(student["loss"] - student["teacher_loss"])


def memory(cost: Memory) -> str:
    """What the student holds for one sequence, and from which length on it holds less than its teacher."""
    text = f"The student holds a state of {units.size(cost.state_bytes)} that never grows"
    if cost.kv_bytes_per_token:
        text += f", and a cache that grows by {units.size(cost.kv_bytes_per_token)} a token"
    text += f"; its teacher’s cache grows by {units.size(cost.teacher_kv_bytes_per_token)} a token."
    difference = cost.teacher_kv_bytes_per_token - cost.kv_bytes_per_token
    if difference > 0 and cost.state_bytes > difference:
        text += f" The student holds less from {math.ceil(cost.state_bytes / difference):,} tokens on."
    return text


def less(teacher: float, student: float) -> str:
    """How many times less (or more) the student holds."""
    if not teacher or not student:
        return words.NONE
    ratio, word = (teacher / student, "less") if teacher >= student else (student / teacher, "more")
    return f"{words.plain(ratio, 1 if ratio < 100 else 0)}× {word}"
