"""Whether what was written computes what the student does: both loaded in turn, the same tokens, logits compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.errors import UserError
from distill.export.plain_torch import in_plain_torch
from distill.student import load_student

TOLERANCE = 1e-4
"""The largest difference of logits that rounding in fp32 explains, as a part of the largest logit (at least 1)."""

_TOKENS, _PADDING, _STEPS = 40, 7, 4


def verify(student: Path, written: Path, load: Callable[[Path], PreTrainedModel] | None = None) -> str:
    """Compare them on random tokens, once padded on the left and once with the last tokens fed one by one.

    Both are computed in fp32 on the CPU, one after the other, so that one of them is in memory at a time.

    Args:
        student: its folder.
        written: what was made of it.
        load: gives the written model in fp32; None for the class that transformers has for it.

    Returns:
        A line that says by how much the logits differ.

    Raises:
        UserError: by more than rounding.
    """
    ours = _logits(load_student(student, dtype=torch.float32))
    theirs = _logits((load or _native)(written))
    difference = float((ours - theirs).abs().max())
    limit = TOLERANCE * max(1.0, float(ours.abs().max()))
    if not difference <= limit:
        raise UserError(
            f"the written model's logits differ from the student's by {difference:.1e}, which is more than rounding"
            f" ({limit:.1e}), so it was not kept. This is a mistake of the export, please report it"
        )
    return f"verified in fp32: logits differ by at most {difference:.1e}"


def _native(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, account = loaded
    wrong = {kind: names for kind, names in account.items() if names}
    assert not wrong, f"transformers does not take all that was written: {wrong}"
    return model


@in_plain_torch()
@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    """(2, tokens, vocabulary): of a row padded on the left, and of a row whose last tokens came one by one."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (2, _TOKENS), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :_PADDING] = 0
    padded_BTV = model(ids_BT, attention_mask=mask_BT, position_ids=_positions(mask_BT), use_cache=False).logits
    early = _TOKENS - _STEPS
    out = model(ids_BT[1:, :early], position_ids=torch.arange(early)[None], use_cache=True)
    parts = [out.logits]
    for index in range(early, _TOKENS):
        step = ids_BT[1:, index : index + 1]
        out = model(step, position_ids=torch.tensor([[index]]), use_cache=True, **_cache(out))
        parts.append(out.logits)
    rows = [padded_BTV[0, _PADDING:], padded_BTV[1], torch.cat(parts, dim=1)[0]]
    model.to("meta")  # type: ignore[arg-type]  # whoever still refers to it, its weights are gone
    return torch.cat(rows).float()


def _positions(mask_BT: Tensor) -> Tensor:
    return (mask_BT.cumsum(-1) - 1).clamp_min(0)


def _cache(out: Any) -> dict[str, Any]:
    """The cache of an output as an argument, by the name that transformers gave it in 5.24 or the one it had before."""
    name = "cache" if getattr(out, "cache", None) is not None else "past_key_values"
    return {name: getattr(out, name)}
