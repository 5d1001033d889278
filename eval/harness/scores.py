"""What the harness found about one model, task by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from distill.errors import UserError


@dataclass(frozen=True)
class Score:
    """One task's.

    Attributes:
        kind: how it is asked: ``multiple_choice``, ``generate_until``, ``loglikelihood_rolling``, …
        samples: how many were asked.
        metrics: by name, with the harness's filter behind a comma where it is not ``none``.
        errors: standard errors of those that have one.
        higher_is_better: by the same names.
    """

    kind: str
    samples: int
    metrics: dict[str, float]
    errors: dict[str, float]
    higher_is_better: dict[str, bool]


def require_data(names: Sequence[str], manager: TaskManager) -> None:
    """Refuse tasks whose questions cannot be had, before a model is loaded.

    Raises:
        UserError: a task's own function, or a download, fails.
    """
    for name in names:
        try:
            manager.load([name])
        except UserError:
            raise
        except Exception as error:  # whatever a task's own code, the datasets library or the network may raise
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"--task {name}: its questions cannot be made or downloaded ({why}); run it where they can, or choose"
                " local tasks"
            ) from error


def scores(lm: LM, names: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, Score] | None:
    """By task, tags and groups taken apart; None in every process but the first.

    Args:
        limit: the first so many questions of each task; None is all.
    """
    found: Any = lm_eval.simple_evaluate(
        model=lm, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    if found is None:
        return None
    return {name: _score(found, name) for name in found["results"] if name in found["n-samples"]}


def _score(found: dict[str, Any], name: str) -> Score:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, int | float):
            continue
        into = errors if metric.endswith("_stderr") else metrics
        shown = metric.removesuffix("_stderr")
        into[shown if filtered == "none" else f"{shown},{filtered}"] = float(value)
    higher = found["higher_is_better"].get(name, {})
    return Score(
        kind=found["configs"][name]["output_type"],
        samples=int(found["n-samples"][name]["effective"]),
        metrics=metrics,
        errors=errors,
        higher_is_better={metric: bool(higher.get(metric.partition(",")[0], True)) for metric in metrics},
    )
