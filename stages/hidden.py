"""Stage 2: each layer's output is matched to its teacher's (MOHAWK, arXiv 2408.10189, section 3.2).

    python -m stages.hidden recipes/quickstart.yaml

For layer l with teacher hidden state u:  min ‖ attention(u) − mixer(u) ‖₂, a mean over tokens; with ``target: block``
the whole decoder layer instead, MLP included; with ``target: heads`` what the heads make before the output projection,
as a mean squared error (mmMamba). Every layer reads the teacher's hidden state, so layers train alone and one layer's
graph is alive at a time.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from distill.handover import StageRecord
from distill.objectives import head_distance, hidden_distance
from distill.recipe import HiddenStage
from distill.run import Run
from distill.student import mixers_of
from distill.teacher_fed import Outputs, outputs_by_layer
from distill.train_stage import train_stage
from distill.training import Batch, Part
from stages.command import run_program


class HiddenObjective:
    """The sum over converted layers of the distance between outputs (`distill.teacher_fed`); a mean over tokens."""

    layerwise = True

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, settings: HiddenStage) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings

    def begin(self, done: float) -> None:
        """The projections that hold the teacher's q, k and v do not train in the stage's first part."""
        for mixer in mixers_of(self.student).values():
            mixer.projections_frozen = done < self.settings.projections_frozen

    def weight(self, batch: Batch) -> float:
        """Tokens that are not padding."""
        return float(batch["valid"].sum())

    def parts(self, batch: Batch) -> Iterator[Part]:
        """One distance a layer."""
        for index, outputs in outputs_by_layer(self.teacher, self.student, batch, self.settings.target):
            yield Part(f"layers.{index}", partial(self._distance, outputs, batch["valid"]))

    def _distance(self, outputs: Callable[[], Outputs], valid_BT: Tensor) -> Tensor:
        """The distance of one layer, summed over tokens."""
        distance = head_distance if self.settings.target == "heads" else hidden_distance
        return distance(*outputs(), valid_BT, reduction="sum")


def main(run: Run) -> StageRecord:
    return train_stage(run, "hidden", partial(HiddenObjective, run.teacher))


if __name__ == "__main__":
    run_program(main, "Stage 2: match each layer's output to its teacher's.")
