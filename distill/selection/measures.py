"""What a selection measures of one aligned student on one text; each number once, however often it is asked for."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from distill.objective import Objective
from distill.run import Run
from distill.selection.ledger import Fields, Ledger
from distill.selection.probe import probe
from distill.selection.ranking import Layers, Ranking, by_score
from distill.selection.runs import scoring_batches
from distill.selection.scores import distances, divergence


class Measures:
    """Of a run's teacher and, where there is one, its aligned student.

    Attributes:
        settings: all that the numbers depend on.
        ledger: what is there already; it counts the tokens.
        tokens: that a forward pass over the text reads.
    """

    def __init__(self, run: Run, student: PreTrainedModel | None, score: int, output: Path) -> None:
        self.run, self.student = run, student
        self.batches = scoring_batches(run, score)
        self.tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        aligned = None if student is None else run.verified(run.stages[-1]).as_parent().sha256
        self.settings: Fields = {
            "seed": run.recipe.seed,
            "score_tokens": self.tokens,
            "teacher": run.origin.sha256,
            "aligned": aligned,
            "text": run.blocks[0].fingerprint,
            "block": run.blocks[0].block,
            "teacher_dtype": run.recipe.teacher.dtype,
        }
        self.ledger = Ledger(output / "measured.json", *self.settings.values())

    def kl(self, layers: Layers) -> float:
        """KL(teacher ‖ student_S) in nats a token."""
        assert self.student is not None
        student = self.student
        found = self.ledger.measure(
            f"kl {named(layers)}",
            lambda: {"kl": divergence(student, self.run.teacher, layers, self.batches), "tokens": self.tokens},
        )
        return found["kl"]

    def kl_of(self, student: PreTrainedModel) -> Fields:
        """That of another student as it is, to be noted under a name of its own."""
        return {"kl": divergence(student, self.run.teacher, (), self.batches), "tokens": self.tokens}

    def probed(self, candidates: Layers) -> Ranking:
        """What the teacher's recall loses without each layer's attention."""

        def make() -> Fields:
            ranking = probe(
                self.run.teacher,
                candidates,
                self.batches,
                length=self.run.recipe.data.block,
                batch_size=self.run.recipe.evaluation.batch_size,
                bos=self.run.tokenizer.bos_token_id,
                seed=self.run.recipe.seed,
            )
            passes = len(candidates) + 2
            return {"scores": list(ranking.scores.items()), "unit": ranking.unit, "tokens": passes * self.tokens}

        found = self.ledger.measure(f"probe {named(candidates)}", make)
        return by_score(dict(found["scores"]), found["unit"])

    def distances(self, stage: str, objective: Objective, candidates: Layers) -> Ranking:
        """A layerwise stage's loss, layer by layer."""
        assert self.student is not None
        models: Sequence[PreTrainedModel] = [self.student, self.run.teacher]

        def make() -> Fields:
            found = distances(objective, models, self.batches)
            return {"distances": list(found.items()), "tokens": self.tokens}

        found = dict(self.ledger.measure(stage, make)["distances"])
        return by_score({layer: found[layer] for layer in candidates}, f"distance of stage {stage}")


def named(layers: Layers) -> str:
    """A set of layers as a word."""
    return "-".join(map(str, layers)) or "none"
