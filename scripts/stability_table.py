"""How far fine-tuning in half precision, or through adapters, ends from fp32: a student beside its teacher.

    python -m scripts.stability_table STUDENT TEACHER --output runs/stability_table

Both are tuned to say what a function is for (``scripts/docstring_pairs.py``), on the same rows in the same order: all
weights in fp32, which is the reference; then bf16 and fp16, all weights or LoRA. On files that neither has read,

    Δ loss      |loss − reference's loss|           nats a token of the answer
    top-1       share of tokens whose likeliest next token is the reference's
    KL          KL(reference ‖ tuned)               nats a token
    gain        1 − loss with k examples before / loss without any

The gain is in-context learning: the paper compares k-shot with zero-shot accuracy, and models of this size choose no
answer better than by chance; their likelihoods do react. Examples are of the same file, as k others of another file are
the control. The reference with another seed (other order of rows, other adapters) shows what a difference is worth.

Everything runs in one process on the CPU, and is evaluated in fp32, so that only what was learnt differs. Figures are
medians over seeds. Source: Mamba State-Space Models Are Lyapunov-Stable Learners (arXiv 2406.00209), section 4.
"""

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.data import read_documents, split_documents
from distill.data.blocks import IGNORED
from distill.errors import UserError
from distill.evaluation import Metrics, evaluate
from distill.finetuning.job import open_job
from distill.finetuning.recipe import FinetuneRecipe
from distill.programs import quiet_unless_watched, report_user_errors
from distill.recall.scoring import log_probabilities
from distill.student import load_model
from eval import words
from eval.loading import load_tokenizer
from scripts.docstring_pairs import CHAT_TEMPLATE, Pair, encoded, pairs_of, shots
from scripts.measure import record, show

HELD_OUT = 0.1
"""Of the files, as in recipes/quickstart.yaml: neither teacher nor student has read them."""

SHOTS = (1, 3, 5)
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
REFERENCE = ("fp32", "full")
METHODS = ("full", "lora")
BATCH = 16


@dataclass(frozen=True)
class Gain:
    """What k examples before the question are worth, by k; shares of the loss without any.

    Attributes:
        zero_shot: that loss, nats a token.
        same: examples of the question's own file.
        other: of another file.
    """

    zero_shot: float
    same: dict[int, float]
    other: dict[int, float]


@dataclass(frozen=True)
class Outcome:
    """One tuned model, or one that was not tuned.

    Attributes:
        tuning: such as "bf16 lora"; "none" before tuning, "another seed" for the next seed's reference.
        metrics: against the reference of the same seed.
        drift: |loss − reference's loss|.
    """

    model: str
    tuning: str
    seed: int
    metrics: Metrics
    drift: float
    gain: Gain


@report_user_errors()
def main(
    student: Annotated[str, typer.Argument(help="A finished student's folder.")],
    teacher: Annotated[str, typer.Argument(help="The folder of the teacher it was converted from.")],
    source: Annotated[
        str, typer.Option("--text", help="Python files: python-stdlib, a folder or a glob.")
    ] = "python-stdlib",
    output: Annotated[Path, typer.Option(help="Folder for stability_table.json.")] = Path("runs/stability_table"),
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other orders and adapters.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each tuning, of 4 × 128 tokens.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Functions to learn from.")] = 400,
    scored: Annotated[int, typer.Option(min=1, help="Held-out functions that loss, top-1 and KL are of.")] = 400,
    asked: Annotated[int, typer.Option(min=1, help="Held-out questions that the gains are of.")] = 64,
    precisions: Annotated[
        str, typer.Option(help="Which, with commas: fp32 and any of bf16 and fp16.")
    ] = "fp32,bf16,fp16",
    lr: Annotated[float, typer.Option(help="Learning rate with all weights.")] = 5e-4,
    lora_lr: Annotated[float, typer.Option(help="Learning rate of adapters.")] = 3e-3,
) -> None:
    """Tune STUDENT and TEACHER in three precisions, whole and by LoRA, and print how far each ends from fp32."""
    quiet_unless_watched()
    logging.getLogger("trl").setLevel(logging.ERROR)  # each time: that the template ends no turn
    learnt, held_out = split_documents(read_documents(source), fraction=HELD_OUT)
    learnt_pairs, files = _spread([pairs_of(one) for one in learnt], rows), [pairs_of(one) for one in held_out]
    questions = shots(files, max(SHOTS))[:asked]
    if not learnt_pairs or not questions:
        raise UserError(f"{source}: too few described functions to learn and be asked; give more Python files")
    tunings = _tunings(precisions.split(","))
    settings = {"source": source, "steps": steps, "rows": rows, "scored": scored, "asked": asked, "lr": [lr, lora_lr]}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        chats.write_text("".join(json.dumps(pair.chat()) + "\n" for pair in learnt_pairs))
        training = {"steps": steps, "batch_size": 4, "warmup": 0.1, "checkpoint_every": 10 * steps}
        benches = []
        for name, path in (("teacher", teacher), ("student", student)):
            task = Task(load_tokenizer(path), _spread(files, scored), questions)
            benches.append(
                _Bench(name, path, task, chats, Path(folder), training, {"full": lr, "lora": lora_lr}, tunings)
            )
        references = [bench.references(range(seeds)) for bench in benches]
        for seed in range(seeds):
            for bench, theirs in zip(benches, references, strict=True):
                for outcome in bench.outcomes(seed, theirs):
                    outcomes.append(outcome)
                    found = {"settings": settings, "outcomes": [asdict(one) for one in outcomes]}
                    record(output / "stability_table.json", found)
    _show(outcomes)


@dataclass(frozen=True)
class Task:
    """What a tuned model is measured on."""

    tokenizer: PreTrainedTokenizerBase
    pairs: Sequence[Pair]
    questions: Sequence[Sequence[Pair]]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Zero-shot questions with their answers, of which the answers are scored."""
        found = sorted((encoded([], pair, self.tokenizer) for pair in self.pairs), key=lambda one: len(one[0] + one[1]))
        for start in range(0, len(found), 4 * BATCH):
            yield _padded(found[start : start + 4 * BATCH])

    def gain(self, model: PreTrainedModel) -> Gain:
        """How much likelier answers become by examples."""
        zero = self._loss(model, 0, self.questions)
        half = len(self.questions) // 2  # so far on is another file
        moved = [*self.questions[half:], *self.questions[:half]]
        other = [[*theirs[:-1], ours[-1]] for theirs, ours in zip(moved, self.questions, strict=True)]
        shares = [{k: 1 - self._loss(model, k, rows) / zero for k in SHOTS} for rows in (self.questions, other)]
        return Gain(zero, *shares)

    def _loss(self, model: PreTrainedModel, k: int, rows: Sequence[Sequence[Pair]]) -> float:
        found = [encoded(row[:-1][max(len(row) - 1 - k, 0) :], row[-1], self.tokenizer) for row in rows]
        return -sum(log_probabilities(model, found, BATCH)) / sum(len(answer) for _, answer in found)


@dataclass(frozen=True)
class _Bench:
    """One model, tuned again and again."""

    name: str
    path: str
    task: Task
    chats: Path
    folder: Path
    training: dict[str, Any]
    rates: dict[str, float]
    tunings: Sequence[tuple[str, str]]

    def references(self, seeds: Sequence[int]) -> dict[int, PreTrainedModel]:
        """What the others are compared with: all weights, fp32."""
        return {seed: self._tuned(*REFERENCE, seed) for seed in seeds}

    def outcomes(self, seed: int, references: dict[int, PreTrainedModel]) -> Iterator[Outcome]:
        """Every tuning of one seed."""
        reference = references[seed]
        yield self._measured("none", seed, load_model(self.path, dtype=torch.float32), reference)
        yield self._measured("fp32 full", seed, reference, reference)
        if len(references) > 1:
            yield self._measured("another seed", seed, references[(seed + 1) % len(references)], reference)
        for precision, method in self.tunings:
            yield self._measured(f"{precision} {method}", seed, self._tuned(precision, method, seed), reference)

    def _measured(self, tuning: str, seed: int, model: PreTrainedModel, reference: PreTrainedModel) -> Outcome:
        metrics = evaluate(model, reference, self.task.batches())
        assert metrics.teacher_loss is not None, "the reference was given"
        return Outcome(
            self.name, tuning, seed, metrics, abs(metrics.loss - metrics.teacher_loss), self.task.gain(model)
        )

    def _tuned(self, precision: str, method: str, seed: int) -> PreTrainedModel:
        from distill.finetuning.trainer import tune  # its imports take longer than all checks

        started, run = time.perf_counter(), self.folder / f"{self.name}-{precision}-{method}-{seed}"
        given = {
            "name": run.name,
            "run_dir": run,
            "seed": seed,
            "model": str(self.path),
            "method": method,
            "adapter": {"rank": 8, "merge": True} if method == "lora" else None,
            "dtype": PRECISIONS[precision],
            "device": "cpu",
            "data": {"source": [str(self.chats)], "chat_template": CHAT_TEMPLATE, "max_length": 128},
            "training": {**self.training, "lr": self.rates[method]},
        }
        job = open_job(FinetuneRecipe.model_validate(given))
        told = tune(job)
        seconds = time.perf_counter() - started
        print(f"{run.name}: loss {told.loss_start:.3f} → {told.loss_end:.3f}, {seconds:.0f} s", flush=True)
        return load_model(job.folder, dtype=torch.float32)


def _tunings(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """All but the reference's."""
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise UserError(f"--precisions {','.join(precisions)}: {unknown[0]} is none of {', '.join(PRECISIONS)}")
    return [(name, method) for name in precisions for method in METHODS if (name, method) != REFERENCE]


def _padded(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Tensor]:
    """A batch as of ``distill.data.Blocks``: padded on the right, where positions begin again."""
    longest = max(len(prompt + answer) for prompt, answer in rows)
    batch: dict[str, list[Sequence[int]]] = {"input_ids": [], "labels": [], "position_ids": [], "valid": []}
    for prompt, answer in rows:
        padding = longest - len(prompt + answer)
        batch["input_ids"].append([*prompt, *answer, *[0] * padding])
        batch["labels"].append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * padding])
        batch["position_ids"].append([*range(longest - padding), *range(padding)])
        batch["valid"].append([True] * (longest - padding) + [False] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def _spread(files: Sequence[Sequence[Pair]], most: int) -> list[Pair]:
    """Up to ``most`` pairs, from as many files as there are: the first of each, then the second of each, …"""
    deepest = max(map(len, files), default=0)
    return [pairs[place] for place in range(deepest) for pairs in files if place < len(pairs)][:most]


def _show(outcomes: Sequence[Outcome]) -> None:
    tunings = list(dict.fromkeys(one.tuning for one in outcomes))
    for model in ("teacher", "student"):
        rows = []
        for tuning in tunings:
            found = [one for one in outcomes if (one.model, one.tuning) == (model, tuning)]
            metrics = [one.metrics for one in found]
            figures = [
                words.plain(_median([one.loss for one in metrics]), 4),
                words.plain(_median([one.drift for one in found]), 4),
                words.percent(_median([one.agreement for one in metrics])),
                words.plain(_median([one.kl for one in metrics]), 5),
                *(words.percent(_median([one.gain.same[k] for one in found])) for k in SHOTS),
                words.percent(_median([one.gain.other[max(SHOTS)] for one in found])),
            ]
            rows.append([tuning, *figures])
        head = ["tuning", "loss", "Δ loss", "top-1", "KL", *(f"gain {k}" for k in SHOTS), f"other {max(SHOTS)}"]
        show(f"{model}, medians of {len({one.seed for one in outcomes})} seeds", head, rows)


def _median(values: Sequence[float | None]) -> float:
    return statistics.median(value for value in values if value is not None)


if __name__ == "__main__":
    typer.run(main)
