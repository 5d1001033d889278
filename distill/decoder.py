"""Where a Hugging Face model keeps its decoder layers, and a layer its attention: the names differ, the places do not.

model.get_decoder()          the text decoder, also inside a vision-language model
  .layers | .h | .blocks     its layers
    .self_attn | .attn | …   a layer's attention, or the mixer in its place
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from distill.errors import UserError

LAYERS = ("layers", "h", "blocks")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers of a model.

    Raises:
        UserError: the decoder has none where they are looked for.
    """
    decoder = model.get_decoder()
    return getattr(decoder, _layers_name(decoder))


def replace_layers(model: Any, layers: nn.ModuleList) -> None:
    """Let the decoder run ``layers`` instead of its own."""
    decoder = model.get_decoder()
    setattr(decoder, _layers_name(decoder), layers)


def attention_of(layer: nn.Module) -> Any:
    """What mixes over time in a decoder layer: its attention, or the mixer in its place.

    Raises:
        UserError: the layer has no attention where it is looked for.
    """
    return getattr(layer, _attention_name(layer))


def replace_attention(layer: nn.Module, mixer: nn.Module) -> None:
    """Put ``mixer`` where the layer's attention is."""
    setattr(layer, _attention_name(layer), mixer)


def learns_positions(model: Any) -> bool:
    """Whether the decoder has a vector for each position, and so an end to them, whatever its layers do (GPT-2)."""
    tokens, layers = model.get_input_embeddings(), set(layers_of(model).modules())
    others = (module for module in model.get_decoder().modules() if module is not tokens and module not in layers)
    return any(isinstance(module, nn.Embedding) for module in others)


def norm_eps(config: PreTrainedConfig) -> float:
    """What a family's norms add to the mean square, by whatever name its config has it; 1e-5 where it has none."""
    text = config.get_text_config()
    return next((float(getattr(text, name)) for name in NORM_EPS if getattr(text, name, None) is not None), 1e-5)


def _layers_name(decoder: nn.Module) -> str:
    name = next((name for name in LAYERS if isinstance(getattr(decoder, name, None), nn.ModuleList)), None)
    if name is None:
        raise UserError(
            f"{type(decoder).__name__} has no list of layers under {', '.join(LAYERS)}; take a teacher of another"
            " family, or add the name that it has to LAYERS in distill/decoder.py"
        )
    return name


def _attention_name(layer: nn.Module) -> str:
    name = next((name for name in ATTENTION if isinstance(getattr(layer, name, None), nn.Module)), None)
    if name is None:
        raise UserError(
            f"{type(layer).__name__} has no attention under {', '.join(ATTENTION)}; take a teacher of another family,"
            " or add the name that it has to ATTENTION in distill/decoder.py"
        )
    return name
