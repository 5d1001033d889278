"""How a model writes here: by what a call asks for, and by none of the settings that its checkpoint carries.

``generate`` fills whatever a call leaves unset from the model's own ``generation_config``: penalties, sampling, n-grams
that may not come again. A measurement must not depend on them, nor may two models that are compared differ by them.
Of those settings only the ids that end a text are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: of the distribution drawn from; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()
GREEDILY = {"do_sample": False}


def ends_of(model: PreTrainedModel) -> list[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return [ends] if isinstance(ends, int) else list(ends or ())


def plain_settings(model: PreTrainedModel) -> GenerationConfig:
    """What is kept of a checkpoint's settings, for programs that call ``generate`` themselves."""
    return GenerationConfig(eos_token_id=ends_of(model) or None)


def decode(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    new_tokens: int,
    *,
    pad: int = 0,
    sampling: Sampling = GREEDY,
    streamer: Any = None,
    sharded: bool = False,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """What the model writes after each row: (B, new) int64, new ≤ ``new_tokens``, padded behind the end of a text.

    The random state of the process is left as it was.

    Args:
        inputs: ``input_ids`` and ``attention_mask`` (B, T), rows ending together; images where the model reads them.
        pad: any id will do, since ``distill.prompts.until`` cuts rows at their ends.
        streamer: transformers' own, for text as it appears.
        sharded: several processes call this, each with its part of the weights: none stops before the last.
        ends: the ids that end a text; None for the model's own.
    """
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = plain_settings(model)
    if ends is not None:
        settings.update(eos_token_id=list(ends) or None)
    settings.update(max_new_tokens=new_tokens, pad_token_id=pad, **(drawn if sampling.temperature else GREEDILY))
    generate = cast(Callable[..., Tensor], model.generate)
    with _without_own_settings(model), torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        out_BT = generate(**inputs, generation_config=settings, streamer=streamer, synced_gpus=sharded)
    return out_BT[:, inputs["input_ids"].shape[1] :]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = own
