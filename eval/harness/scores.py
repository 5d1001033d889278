"""What the harness found about one model, task by task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
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
        chance: what blind guessing scores in the first metric, where that is known.
    """

    kind: str
    samples: int
    metrics: dict[str, float]
    errors: dict[str, float]
    higher_is_better: dict[str, bool]
    chance: float | None = None


def require_data(names: Sequence[str], manager: TaskManager, *, asked_by: str = "--task") -> dict[str, Any]:
    """The harness's tasks by name, tags and groups taken apart: refused, before a model is loaded, without questions.

    Raises:
        UserError: a task's own function, or a download, fails.
    """
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except UserError:
            raise
        except Exception as error:  # whatever a task's own code, the datasets library or the network may raise
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{asked_by} {name}: its questions cannot be made or downloaded ({why}); run it where they can, or"
                " choose local tasks"
            ) from error
    return found


def writes(task: Any) -> int:
    """The most tokens that one of the harness's tasks has a model write; 0 where it is only asked for likelihoods."""
    if task.config.output_type != "generate_until":
        return 0
    return int(normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))["max_gen_toks"])


def scores(lm: LM, names: Sequence[str], manager: TaskManager, limit: int | None) -> dict[str, Score] | None:
    """By task, tags and groups taken apart; None in every process but the first.

    Args:
        limit: the first so many questions of each task; None is all.
    """
    found: Any = lm_eval.simple_evaluate(
        model=lm, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
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
        chance=_chance(found["configs"][name], next(iter(metrics), ""), found["samples"][name]),
    )


def _chance(config: dict[str, Any], metric: str, asked: Sequence[dict[str, Any]]) -> float | None:
    """As the task's own metadata has it, else one over the number of answers, of accuracies among answers."""
    stated = (config.get("metadata") or {}).get("chance")
    if stated is not None:
        return float(stated)
    if config["output_type"] != "multiple_choice" or not metric.startswith("acc") or not asked:
        return None
    # A metric of mutual information has every answer asked twice, once without its question.
    times = 2 if any(one["metric"] == "acc_mutual_info" for one in config["metric_list"]) else 1
    return sum(times / len(one["filtered_resps"]) for one in asked) / len(asked)
