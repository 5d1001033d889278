"""Adapters (PEFT) on a student: what they attach to, and what keeps one from silently doing nothing.

W' = W + (α/r) B A       LoRA: A (r × in) random, B (out × r) zero, so that W' = W at the start
W' = W + (α/√r) B A      rsLoRA
W' = m ∘ V / ‖V‖_row     DoRA, V = W + (α/r) B A, m = ‖W‖_row at the start: a row of zeros is 0/0

Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353). A mixer's ``in_proj`` makes x, B, C, gate and
step size together, the memory buffers that "Mamba State-Space Models Are Lyapunov-Stable Learners" (2406.00209) adapts.
Our mixers call ``out_proj`` as a module, where fused kernels read its weight and pass an adapter by.

What no adapter of PEFT reaches: its low-rank forms want matrices, and what it trains whole are modules
(``modules_to_save``), or biases that are called just that. A_log, D and the bias of the time step are parameters of the
mixer itself, under the names that every Mamba implementation has; in a module of their own they would be saved under
others, which neither earlier students nor Bamba and GraniteMoeHybrid have. Full fine-tuning trains them.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.decoder import attention_of, layers_of
from distill.errors import UserError

_SHOWN = 5


def default_lora_targets(model: Any) -> str:
    """A regular expression for ``LoraConfig(target_modules=...)``: every linear map in the decoder's layers.

    Those are the mixers' ``in_proj`` and ``out_proj``, and the projections of attention and MLP, under whatever names
    the family has. Not the depthwise convolution, embeddings, head, connector or vision tower; nor what
    ``uncovered_weights`` names.
    """
    names = sorted({_numberless(name) for layer in layers_of(model) for name, _ in _linear_maps(layer)})
    return rf"{re.escape(_layers_path(model))}\.\d+\.({'|'.join(names)})"


def uncovered_weights(model: Any) -> list[str]:
    """Weights of the decoder's layers that no default target reaches, one name for all layers: experts and routers.

    Experts of a mixture are one parameter for all of them, and a router is a parameter of a module of its own; neither
    is a linear module. Norms, biases and convolutions are left out here: they are no weights of projections.
    """
    found = set()
    for layer in layers_of(model):
        # By the name of its class, as in distill.roles: some norms have a row for each head.
        known = {
            f"{name}.weight"
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D | nn.Conv1d) or "Norm" in type(module).__name__
        }
        found |= {
            re.sub(r"\b\d+\b", "*", name)
            for name, parameter in layer.named_parameters()
            if parameter.dim() > 1 and name not in known
        }
    return sorted(found)


def require_norms(model: Any, targets: str) -> None:
    """Refuse DoRA where it would divide by zero: a row of zeros has no direction.

    Args:
        targets: as given to ``LoraConfig``.

    Raises:
        UserError: names the weights, the rows, and what to do.
    """
    empty = []
    for name, module in model.named_modules():
        if re.fullmatch(targets, name) and isinstance(module, nn.Linear | Conv1D):
            weight_OI = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
            rows = (weight_OI == 0).all(1).nonzero()[:, 0].tolist()
            if rows:
                empty.append(f"{name} ({_rows_in_words(model, module, rows)})")
    if empty:
        raise UserError(
            f"dora divides by the norm of every row of a weight, and rows of zeros are in {_some(empty)}. A student is"
            " so before its mixers were trained; tune what a stage after conversion wrote, or use lora or rslora"
        )


def require_gradients(model: nn.Module) -> None:
    """Refuse adapters that do not train; call it after the first backward, before gradients are cleared.

    A gradient of zeros counts as none, but for an A whose B is zero: such an A has none yet.

    Raises:
        UserError: names the adapters' parameters without a gradient.
    """
    waiting = _behind_zeros(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    dead = [
        name
        for name, parameter in trained
        if parameter.grad is None or (name not in waiting and not bool(parameter.grad.any()))
    ]
    if not trained:
        raise UserError("nothing is trained: no parameter of the model asks for a gradient")
    if dead:
        raise UserError(
            f"{len(dead)} of {len(trained)} adapter parameters had no gradient in the first step and would stay as they"
            f" are: {_some(dead)}. Something reads these modules' weights without calling them, or nothing that is"
            " scored depends on them; leave them out of the targets"
        )


def _behind_zeros(model: nn.Module) -> set[str]:
    """Names of LoRA's A where B is zero, which it still is in the first step."""
    parameters = dict(model.named_parameters())
    return {
        name
        for name in parameters
        if ".lora_A." in name and not bool(parameters[name.replace(".lora_A.", ".lora_B.")].detach().any())
    }


def _linear_maps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _layers_path(model: Any) -> str:
    layers = layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers)


def _numberless(name: str) -> str:
    """A module's name as an expression, with any number for a number: experts.0.w1 → experts\\.\\d+\\.w1."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _rows_in_words(model: Any, module: nn.Module, rows: list[int]) -> str:
    """Which rows: for a mixer's ``in_proj`` by what they make, such as dt."""
    for mixer in map(attention_of, layers_of(model)):
        if getattr(mixer, "in_proj", None) is module:
            parts = {name: range(part.start, part.stop) for name, part in mixer.in_rows().items()}
            return "the rows of " + ", ".join(name for name, part in parts.items() if set(part) & set(rows))
    return f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows, the first is {rows[0]}"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
