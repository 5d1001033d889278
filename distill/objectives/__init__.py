"""What a stage minimises: pure tensor functions, one file a stage.

Every loss comes out in fp32 (fp64 for fp64 inputs) whatever the dtype of its inputs, takes ``reduction="mean"``
or ``"sum"``, treats the teacher as a constant, and ignores what stands at padding.
"""

from distill.objectives.hidden import head_distance, hidden_distance
from distill.objectives.logits import DIVERGENCES, logit_loss, scored_positions
from distill.objectives.mixing import Form, attention_matrix, mixing_distance
from distill.objectives.streamed_mixing import streamed_mixing_distance

__all__ = [
    "DIVERGENCES",
    "Form",
    "attention_matrix",
    "head_distance",
    "hidden_distance",
    "logit_loss",
    "mixing_distance",
    "scored_positions",
    "streamed_mixing_distance",
]
