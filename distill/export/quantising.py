"""Linear layers of an exported folder in int8, and what that costs, measured.

torchao's weight-only int8: a scale a row, products in the dtype of the activations. It takes ``nn.Linear`` alone:
projections of mixers and attention, MLPs. Embeddings and head stay, and so do norms, convolutions, dt_bias, A_log and
D, which are small and whose errors a recurrence would add up. Experts that a family keeps as one tensor stay too.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from distill.auto_classes import auto_class
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.export.held_out import MeasuredText
from distill.export.plain_torch import in_plain_torch
from distill.export.written import Quantised
from distill.student import is_student, load_model
from distill.weight_files import shards_of

SCHEMES = ("int8",)
FORMATS = ("standalone", "granite", "bamba")


def check_quantise(scheme: str, to: str) -> None:
    """Whether it can be done at all, asked before anything is written.

    Raises:
        UserError: an unknown scheme, a format that stores weights its own way, or torchao is missing or broken.
    """
    if scheme not in SCHEMES:
        raise UserError(f"--quantise is {scheme!r}; allowed is {', '.join(SCHEMES)}")
    if to not in FORMATS:
        raise UserError(f"--quantise is for {', '.join(FORMATS)}; {to} has --outtype instead")
    try:
        import torchao.quantization  # noqa: F401
    except Exception as error:  # missing, or of another torch: whatever it then raises
        raise UserError(f"--quantise int8 needs torchao ({error}): pip install 'distill-ssm[quantise]'") from error


@in_plain_torch()
def quantise_folder(folder: Path, text: MeasuredText) -> Quantised:
    """Replace the weights in ``folder`` by quantised ones, measured against the ones they replace.

    Both models are in memory together, which their distributions' divergence needs.

    Raises:
        UserError: there is no text to measure on, or the saved model is not the one that was measured.
    """
    before = load_model(folder, dtype="auto").eval()
    after = _quantised(folder)
    metrics = evaluate(after, before, _batches(text.batches, packed=is_student(before)))
    assert metrics.teacher_loss is not None
    assert metrics.kl is not None
    assert metrics.agreement is not None
    n_bytes = weight_bytes(folder)
    ids_BT = next(iter(text.batches))["input_ids"][:1, :32]
    expected_BTV = _logits(after, ids_BT)
    _replace_weights(folder, after)
    if not torch.equal(_logits(load_model(folder, dtype="auto").eval(), ids_BT), expected_BTV):
        raise UserError(f"the quantised weights in {folder} load as something else; try another version of torchao")
    return Quantised(
        scheme="int8 weight-only (torchao)",
        text=text.name,
        tokens=metrics.tokens,
        loss_before=metrics.teacher_loss,
        loss_after=metrics.loss,
        kl=metrics.kl,
        agreement=metrics.agreement,
        bytes_before=n_bytes,
        bytes_after=weight_bytes(folder),
    )


def weight_bytes(folder: Path) -> int:
    """Of the weight files, whatever their format."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def _quantised(folder: Path) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    wanted = TorchAoConfig(Int8WeightOnlyConfig())
    auto = auto_class(AutoConfig.from_pretrained(folder))
    model: Any = auto.from_pretrained(folder, dtype="auto", quantization_config=wanted)
    return model.eval()


def _replace_weights(folder: Path, model: PreTrainedModel) -> None:
    for path in [*shards_of(folder), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    model.save_pretrained(folder)


def _batches(batches: Iterable[Mapping[str, Tensor]], packed: bool) -> Iterable[Mapping[str, Tensor]]:
    """For a class that cannot keep packed documents apart, rows are read as one document each."""
    for batch in batches:
        ids_BT = batch["input_ids"]
        yield batch if packed else {**batch, "position_ids": torch.arange(ids_BT.shape[1]).expand_as(ids_BT)}


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    return model(ids_BT.to(model.device), use_cache=False).logits
