"""What stands between the dashes of a model card: the metadata that the Hub reads, filters and ranks by."""

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distill.export.account import Account
from distill.export.usage import TAGS
from distill.export.written import Written
from distill.layout import ATTENTION

_TAGS = {
    "gated_deltanet": ["gated-deltanet", "linear-attention"],
    "based": ["based", "linear-attention"],
    "hedgehog": ["hedgehog", "linear-attention"],
    "sliding_window": ["sliding-window-attention"],
}


def metadata(account: Account, written: Written) -> ModelCardData:
    """Of a student in one format. `base_model` is left out where the teacher is not known to be on the Hub."""
    teacher = account.teacher
    base: dict[str, Any] = {"base_model": teacher.name, "base_model_relation": "finetune"} if teacher.on_hub else {}
    licence: dict[str, Any] = dict(teacher.licence or {"license": "unknown"})
    datasets = [source.split(":")[1] for source in account.sources if source.startswith("dataset:")]
    results = _results(account)
    kinds = set(account.config.distill["layers"])
    mixers = sorted(kinds - {ATTENTION}) or ["mamba2"]
    tags = [
        *(tag for mixer in mixers for tag in _TAGS.get(mixer, ["mamba2", "state-space-model"])),
        "distillation",
        *(["hybrid"] if len(kinds) > 1 else []),
    ]
    tags += [*TAGS[written.format], *(["torchao", "int8"] if written.quantised else [])]
    return ModelCardData(
        language=teacher.language,
        datasets=datasets or None,
        library_name="gguf" if written.format == "gguf" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=written.name if results else None,
        eval_results=results or None,
        **licence,
        **base,
    )


def _results(account: Account) -> list[EvalResult]:
    """The student's own numbers on the held-out text; what has no finite value is left out."""
    if account.evaluation is None:
        return []
    metrics = account.evaluation.metrics
    teacher_loss = metrics.teacher_loss
    values = {
        ("perplexity", "Perplexity"): metrics.perplexity,
        ("perplexity", "Perplexity of the teacher"): None if teacher_loss is None else math.exp(teacher_loss),
        ("kl_divergence", "KL(teacher ‖ student), nats per token"): metrics.kl,
        ("accuracy", "Top-1 agreement with the teacher"): metrics.agreement,
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset(account),
            dataset_name=f"{', '.join(account.sources) or 'text'}, held out",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for (kind, name), value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _dataset(account: Account) -> str:
    source = next(iter(account.sources), "text")
    return source.split(":")[1] if source.startswith("dataset:") else "text"
