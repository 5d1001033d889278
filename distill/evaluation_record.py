"""What an evaluation leaves in a stage's directory, for the report and for anyone who wants the numbers.

``evaluation.json``::

    {"version": 1,
     "metrics": {"loss", "perplexity", "tokens", "teacher_loss", "kl", "agreement"},
     "layer_distances": [one relative distance per decoder layer],
     "samples": [{"prompt", "student", "teacher"}]}

with null for what was not measured and "nan" or "inf" for what JSON has no number for; and, where mixing
matrices were taken, ``matrices.npz``: of N heads, ``layer`` and ``head`` (N,) and ``teacher`` and ``student``
(N, T, T) float16, T at most 64.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distill.atomic import replace_file
from distill.errors import UserError
from distill.evaluation import Metrics

EVALUATION = "evaluation.json"
MATRICES = "matrices.npz"
VERSION = 1
MATRIX_TOKENS = 64


@dataclass(frozen=True)
class Sample:
    """One prompt and its greedy continuations; ``teacher`` is None where there was none to ask."""

    prompt: str
    student: str
    teacher: str | None = None


@dataclass(frozen=True)
class MatrixPair:
    """One head's mixing matrices over the same tokens: row t holds what position t takes from each s ≤ t.

    Attributes:
        layer, head: 0-based, the same in both models.
        teacher, student: (T, S) float16, at most 64×64.
    """

    layer: int
    head: int
    teacher: NDArray[np.float16]
    student: NDArray[np.float16]

    @classmethod
    def of(cls, layer: int, head: int, teacher_TS: Tensor, student_TS: Tensor) -> "MatrixPair":
        """A pair from two (T, S) tensors, cut to their first 64 tokens, which see nothing later."""
        return cls(layer, head, _cut(teacher_TS), _cut(student_TS))

    def cosine(self) -> float:
        """⟨teacher, student⟩ / (‖teacher‖ ‖student‖), Frobenius: 1 where they are the same up to a factor.

        A mixer with a norm behind it can undo any factor, so a distance would not tell how alike two heads are.
        NaN where a matrix is zero or not finite.
        """
        teacher, student = self.teacher.astype(np.float64), self.student.astype(np.float64)
        norms = np.linalg.norm(teacher) * np.linalg.norm(student)
        return float((teacher * student).sum() / norms) if 0 < norms < math.inf else math.nan

    def size_ratio(self) -> float:
        """‖student‖ / ‖teacher‖, Frobenius; NaN where a matrix is not finite or the teacher's is zero."""
        teacher, student = (np.linalg.norm(matrix.astype(np.float64)) for matrix in (self.teacher, self.student))
        return float(student / teacher) if teacher and math.isfinite(student + teacher) else math.nan


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model, at conversion or at the end of a stage.

    Attributes:
        metrics: against the held-out text and the teacher.
        layer_distances: of each decoder layer's output from the teacher's (``evaluation.layer_distances``).
        samples: continuations of the recipe's prompts.
        subject: a digest of what was measured on what, by which an evaluation that is out of date is known.
    """

    metrics: Metrics
    layer_distances: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()
    subject: str = ""


def write_evaluation(folder: str | Path, evaluation: Evaluation, matrices: Iterable[MatrixPair] = ()) -> None:
    """Write ``evaluation.json``, and ``matrices.npz`` where there are matrices, into ``folder``.

    Each file appears whole or not at all, ``evaluation.json`` last: where it is, nothing is missing. What an earlier
    evaluation left is replaced. All matrices of one evaluation cover the same tokens.

    Raises:
        UserError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"version": VERSION, **json_numbers(asdict(evaluation))}, indent=2, ensure_ascii=False)
    pairs = sorted(matrices, key=lambda pair: (pair.layer, pair.head))
    packed = io.BytesIO()
    np.savez_compressed(
        packed,
        layer=np.array([pair.layer for pair in pairs]),
        head=np.array([pair.head for pair in pairs]),
        teacher=np.array([pair.teacher for pair in pairs]),
        student=np.array([pair.student for pair in pairs]),
    )
    if pairs:
        replace_file(folder / MATRICES, packed.getvalue())
    else:
        (folder / MATRICES).unlink(missing_ok=True)
    replace_file(folder / EVALUATION, f"{text}\n".encode())


def read_evaluation(folder: str | Path) -> Evaluation | None:
    """The evaluation in ``folder``, None where there is none; raises UserError if it cannot be read."""
    path = Path(folder) / EVALUATION
    if not path.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["version"] != VERSION:
            raise ValueError(f"version {fields['version']}, this program reads {VERSION}")
        metrics: dict[str, Any] = {
            name: value if value is None else float(value) for name, value in fields["metrics"].items()
        }
        metrics["tokens"] = int(fields["metrics"]["tokens"])
        return Evaluation(
            metrics=Metrics(**metrics),
            layer_distances=tuple(map(float, fields["layer_distances"])),
            samples=tuple(Sample(**sample) for sample in fields["samples"]),
            subject=str(fields.get("subject", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no evaluation ({_said(error)}); evaluate this stage again") from error


def read_matrices(folder: str | Path) -> list[MatrixPair]:
    """The mixing matrices in ``folder``, by layer and head; raises UserError if they cannot be read."""
    path = Path(folder) / MATRICES
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            columns = [arrays[name] for name in ("layer", "head", "teacher", "student")]
        return [MatrixPair(int(layer), int(head), *pair) for layer, head, *pair in zip(*columns, strict=True)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: holds no mixing matrices ({error}); evaluate this stage again") from error


def json_numbers(value: Any) -> Any:
    """``value`` with NaN and infinities, at any depth, as the strings that ``float()`` reads back."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(inner) for inner in value]
    return value


def _cut(matrix_TS: Tensor) -> NDArray[np.float16]:
    return matrix_TS[:MATRIX_TOKENS, :MATRIX_TOKENS].detach().float().cpu().numpy().astype(np.float16)


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
