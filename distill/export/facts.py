"""What a student's config says of what it computes, in one vocabulary for all families: no weight is read.

Names and shapes of its parameters come from the model without weights; what parameters do not show (multipliers,
windows, where positions are rotated) from the config.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from distill.conversion import empty_model
from distill.decoder import attention_of, layers_of
from distill.export.changes import MixerSize
from distill.families import Family, family_of
from distill.layout import ATTENTION, kept_heads, mixer_layers


@dataclass(frozen=True)
class Scales:
    """The numbers that a family multiplies with, besides its weights.

    Attributes:
        embedding: token embeddings are multiplied with it.
        residual: what a mixer, attention or MLP adds is multiplied with it.
        logits: logits are divided by it.
        norm_plus_one: norms multiply with 1 + w instead of w.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    norm_plus_one: bool = False


def _plain(_config: Any) -> Scales:
    return Scales()


def _granite(config: Any) -> Scales:
    return Scales(config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)


def _gemma(config: Any) -> Scales:
    return Scales(embedding=config.hidden_size**0.5, norm_plus_one=True)


# The families known to compute x + attention(norm(x)), then x + mlp(norm(x)), with RMS norms and rotary halves, but for
# these numbers and for what the config facts below show.
SCALES: dict[str, Callable[[Any], Scales]] = {
    "llama": _plain,
    "mistral": _plain,
    "mixtral": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "phi3": _plain,
    "smollm3": _plain,
    "granite": _granite,
    "gemma": _gemma,
}


_ACTIVATION = ("hidden_act", "hidden_activation", "activation", "activation_function")


@dataclass(frozen=True)
class StudentFacts:
    """A student, as far as formats are concerned.

    Attributes:
        config: the student's.
        family: its teacher's ``model_type``.
        kinds: one name a layer, ``"attention"`` or a mixer's.
        shapes: of every parameter, by the name it is saved under; tied ones once.
        q_heads, kv_heads, head_dim: of the attention layers.
        scalings: by layer that keeps attention, what its scores are multiplied with.
        windows: by layer that keeps attention, how far back it sees; None where that is everything.
        rotary: by layer that keeps attention, whether it has rotary positions.
    """

    config: PreTrainedConfig
    family: str
    kinds: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    q_heads: int
    kv_heads: int
    head_dim: int
    scalings: Mapping[int, float]
    windows: Mapping[int, int | None]
    rotary: Mapping[int, bool]

    @property
    def kept(self) -> list[int]:
        return [index for index, kind in enumerate(self.kinds) if kind == ATTENTION]

    @property
    def mixers(self) -> list[int]:
        return mixer_layers(self.config)

    @property
    def heads(self) -> dict[int, list[int]]:
        """Heads that keep attention beside a mixer, by layer."""
        return kept_heads(self.config)

    @property
    def mixer(self) -> dict[str, Any]:
        """The arguments the mixers are built with."""
        return self.config.distill["mixer"]

    @property
    def mixer_size(self) -> MixerSize:
        return MixerSize(self.mixer["n_heads"], self.mixer["head_dim"], self.mixer["state_dim"])

    @property
    def activation(self) -> str:
        """The MLP's, by whatever name the family's config has it."""
        config = self.config.get_text_config()
        return next((str(getattr(config, name)) for name in _ACTIVATION if getattr(config, name, None)), "none")

    @property
    def experts(self) -> int:
        """How many a layer has; 0 for an ordinary MLP."""
        return int(getattr(self.config, "num_local_experts", 0))

    @property
    def all_attention(self) -> "StudentFacts":
        """The facts if every layer kept its attention."""
        config = copy.deepcopy(self.config)
        config.distill["layers"] = [ATTENTION] * len(self.kinds)
        config.distill.pop("heads", None)
        return facts_of(config)

    @property
    def scales(self) -> Scales:
        return SCALES.get(self.family, _plain)(self.config)

    @property
    def scaling(self) -> float:
        """What attention scores are multiplied with; the usual value where no layer keeps attention."""
        return next(iter(self.scalings.values()), self.head_dim**-0.5)

    def has(self, ending: str) -> bool:
        """Whether a parameter's name ends so."""
        return any(name.endswith(ending) for name in self.shapes)


def facts_of(config: PreTrainedConfig) -> StudentFacts:
    """Read the config of a student.

    Args:
        config: as ``distill.conversion.plan`` returns it, or of a student's folder.
    """
    model = empty_model(config)
    layers = layers_of(model)
    kinds = tuple(config.distill["layers"])
    kept = {index: attention_of(layers[index]) for index, kind in enumerate(kinds) if kind == ATTENTION}
    text = config.get_text_config()
    family = family_of(config) or Family()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return StudentFacts(
        config=config,
        family=config.distill["teacher"],
        kinds=kinds,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        q_heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=head_dim,
        scalings={index: float(getattr(attention, "scaling", head_dim**-0.5)) for index, attention in kept.items()},
        windows={index: _window(attention, text) for index, attention in kept.items()},
        rotary={index: family.rotates(attention) for index, attention in kept.items()},
    )


def _window(attention: nn.Module, text: Any) -> int | None:
    """How far back the layer sees, if that is less than the positions the model knows.

    Per layer where the family says so (Qwen2 mixes both kinds), else from the config (Mistral).
    """
    window = getattr(attention, "sliding_window", getattr(text, "sliding_window", None))
    return None if window is None or window >= text.max_position_embeddings else int(window)
