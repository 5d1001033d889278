"""Measure a finished stage of a run: held-out loss, KL and agreement, layer by layer, samples and matrices.

    python -m eval.stage recipes/quickstart.yaml hidden

Writes run_dir/STAGE/evaluation.json and matrices.npz, which the report is made from. ``stages.run`` calls it after
every stage; ``teacher`` measures the teacher alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from distill.attention import views
from distill.capture import layer_traces, sequence_arguments
from distill.completions import completions
from distill.copies import mean_of_copies
from distill.decoder import layers_of
from distill.engines import processes
from distill.engines.placement import place_student
from distill.errors import UserError
from distill.evaluation import evaluate, layer_distances
from distill.evaluation_record import MATRIX_TOKENS, Evaluation, MatrixPair, Sample, read_evaluation, write_evaluation
from distill.mixers import is_mixer
from distill.programs import quiet_unless_watched, report_user_errors
from distill.run import Run, at_work_on
from distill.student import mixers_of
from distill.vision import has_images
from distill.within import within

TEACHER = "teacher"
LAYERS_SHOWN = 4
HEADS_SHOWN = 2


def evaluate_stage(run: Run, stage: str) -> Evaluation:
    """Measure the stage's student against the teacher and leave the numbers in the stage's folder.

    Several processes do all of it side by side, which models in shards need, and get the same; the main one writes.
    """
    if not run.is_evaluated(TEACHER):
        evaluate_teacher(run)
    asked = processes.on_main(lambda: read_evaluation(run.folder(TEACHER)))
    assert asked is not None
    student = place_student(run.folder(stage), run.launched, run.device, frozen=True)
    teachers = [sample.student for sample in asked.samples]
    samples = zip(run.recipe.evaluation.prompts, _continuations(run, student), teachers, strict=True)
    evaluation = Evaluation(
        metrics=evaluate(student, run.teacher, run.held_out()),
        layer_distances=tuple(layer_distances(student, run.teacher, run.held_out())),
        samples=tuple(Sample(*sample) for sample in samples),
    )
    return _written(run, stage, evaluation, matrix_pairs(run, student))


def evaluate_teacher(run: Run) -> Evaluation:
    """Measure the teacher alone: what every student is compared with."""
    held_out = run.held_out()  # before the teacher: if the text cannot be used, that shows at once
    texts = _continuations(run, run.teacher)
    samples = tuple(Sample(*pair) for pair in zip(run.recipe.evaluation.prompts, texts, strict=True))
    return _written(run, TEACHER, Evaluation(evaluate(run.teacher, run.teacher, held_out), samples=samples))


def _written(run: Run, stage: str, evaluation: Evaluation, pairs: Sequence[MatrixPair] = ()) -> Evaluation:
    """The evaluation with its subject, once it is on disk."""

    def write() -> Evaluation:
        whole = replace(evaluation, subject=run.evaluation_subject(stage))
        write_evaluation(run.folder(stage), whole, pairs)
        return whole

    return processes.on_main(write)


@torch.no_grad()
def matrix_pairs(run: Run, student: PreTrainedModel) -> list[MatrixPair]:
    """Teacher's and student's mixing matrices of a few heads over the first held-out tokens.

    Both read the teacher's hidden state, as in stage 1, so that a pair shows one layer's difference and not the sum of
    all layers' before it. Attention with a window is left out: what it does not see it does not see.
    """
    mixers = {index: mixer for index, mixer in mixers_of(student).items() if is_mixer(mixer)}
    shown = list(mixers)[:: -(-len(mixers) // LAYERS_SHOWN)] if mixers else []
    batch = {name: tensor.to(run.device) for name, tensor in _first_tokens(run).items()}
    layers, attentions = layers_of(run.teacher), views(run.teacher, shown)
    traces = layer_traces(run.teacher, batch, shown, wants=["attention_input"])
    pairs = []
    for index in shown:
        trace, attention = traces[index], attentions[index]
        teacher_BHTT = within(layers[index], attention.matrix, trace.attention_input, trace.position_embeddings)
        mixer = mixers[index]
        each_BHTT = within(
            mixer,
            mixer.mixing_matrix,
            trace.attention_input.to(student.dtype),
            position_embeddings=trace.position_embeddings,
            **sequence_arguments(batch),
        )
        student_BHTT = mean_of_copies(each_BHTT, attention.n_heads, dim=1)
        for head in islice(range(0, attention.n_heads, max(1, attention.n_heads // HEADS_SHOWN)), HEADS_SHOWN):
            pairs.append(MatrixPair.of(index, head, teacher_BHTT[0, head], student_BHTT[0, head]))
    return pairs


def _first_tokens(run: Run) -> dict[str, Tensor]:
    """The beginning of the held-out text, as one document: a border would only show as an empty corner.

    Of image-text rows the first as a whole, since an image cannot be cut.
    """
    batch = run.blocks[1].batch([0])
    if has_images(batch):
        return batch
    batch = {name: rows[:, :MATRIX_TOKENS] for name, rows in batch.items()}
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def _continuations(run: Run, model: PreTrainedModel) -> list[str]:
    wanted = run.recipe.evaluation
    if not wanted.prompts:
        return []
    sharded = run.launched.shards_weights and processes.world() > 1
    return completions(
        model, run.tokenizer, wanted.prompts, wanted.new_tokens, bos=run.recipe.data.bos, sharded=sharded
    )


def main(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe of the run.")],
    stage: Annotated[str, typer.Argument(help="teacher, convert, mixing, hidden or logits.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Measure one finished stage of a run."""
    quiet_unless_watched()
    with report_user_errors(), at_work_on(recipe, overrides or []) as run:
        measured = _measure(run, stage)
        if processes.is_main():
            print(measured.metrics)


def _measure(run: Run, stage: str) -> Evaluation:
    if stage == TEACHER:
        return evaluate_teacher(run)
    if stage not in run.stages:
        raise UserError(f"the recipe has no stage {stage!r}; it has {', '.join((TEACHER, *run.stages))}")
    processes.on_main(lambda: run.verified(stage))
    return evaluate_stage(run, stage)


if __name__ == "__main__":
    typer.run(main)
