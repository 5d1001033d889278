"""Whether a model goes on as the text does: by writing, and by preferring it to other texts.

    x       a prompt, cut out of a document         y      the n tokens behind it
    ŷ(x)    what the model writes, greedily         y' …   what stands behind other prompts

    written_n     share of prompts with ŷ = y
    same_n        share of prompts with ŷ = the teacher's ŷ
    preferred_n   share of prompts with log p(y | x) > log p(y' | x) for all y'

All three fall with n, but likelihoods see one token at a time with everything before it right, and writing does not: a
student may prefer as its teacher does and yet write something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from distill.recall.example import CHOICES, Example
from distill.recall.scoring import Ids, log_probabilities, write


@dataclass(frozen=True)
class Cut:
    """A prompt and what stands behind it, in ids."""

    prompt: Ids
    after: Ids


@dataclass(frozen=True)
class Continued:
    """Shares of prompts, over the first ``tokens`` after each.

    Attributes:
        written, preferred: as above.
        gap: preferred − written.
        chance: what blind guesses would prefer.
        log_probability: of the text, mean nats a token.
    """

    tokens: int
    written: float
    preferred: float
    gap: float
    chance: float
    log_probability: float


def greedily(model: PreTrainedModel, cuts: Sequence[Cut], tokens: int, batch_size: int) -> list[Ids]:
    """What the model writes behind each prompt; fewer tokens where it ends the text."""
    return write(model, [Example(cut.prompt, (cut.after[:tokens],), 0, 0) for cut in cuts], batch_size)


def continued(
    model: PreTrainedModel,
    cuts: Sequence[Cut],
    wrote: Sequence[Ids],
    lengths: Sequence[int],
    *,
    seed: int,
    batch_size: int,
) -> list[Continued]:
    """Both scores at each length.

    Args:
        cuts: at least two whose texts differ from the first token on, or a prompt has nothing to be preferred to.
        wrote: what the model wrote behind each; see ``greedily``.
        seed: of which other texts stand beside each; every model gets the same.
    """
    found = []
    for tokens in lengths:
        choices = _choices(cuts, tokens, seed)
        pairs = [(cut.prompt, choice) for cut, those in zip(cuts, choices, strict=True) for choice in those]
        logs = iter(log_probabilities(model, pairs, batch_size))
        scores = [[next(logs) for _ in those] for those in choices]
        written = shared([cut.after for cut in cuts], wrote, tokens)
        preferred = _mean([float(all(own > other for other in others)) for own, *others in scores])
        found.append(
            Continued(
                tokens=tokens,
                written=written,
                preferred=preferred,
                gap=preferred - written,
                chance=_mean([1 / len(those) for those in choices]),
                log_probability=_mean([own for own, *_ in scores]) / tokens,
            )
        )
    return found


def shared(some: Sequence[Ids], others: Sequence[Ids], tokens: int) -> float:
    """The share of pairs whose first ``tokens`` are the same."""
    return _mean([float(one[:tokens] == other[:tokens]) for one, other in zip(some, others, strict=True)])


def _choices(cuts: Sequence[Cut], tokens: int, seed: int) -> list[list[Ids]]:
    """Behind each prompt its own text first, then up to CHOICES − 1 of the others', no two alike."""
    drawn = np.random.default_rng([seed, tokens])
    found = []
    for cut in cuts:
        texts = [cut.after[:tokens], *(cuts[i].after[:tokens] for i in drawn.permutation(len(cuts)))]
        found.append(list(dict.fromkeys(texts))[:CHOICES])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
