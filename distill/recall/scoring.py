"""Whether a model writes the answer, and whether it prefers it: the two are not the same.

    written     greedy decoding through the model's own cache gives exactly the answer's ids
    rank        1 + how many of the other choices c have log p(c | prompt) above that of the answer
    gap         share with rank 1 − share written: what likelihood sees and generation does not

Both read rows that end together, padded on the left: as ``generate`` is used, and so that the head makes only the last
logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.decoder import learns_positions
from distill.decoding import decode
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.evaluation import device_of
from distill.prompts import left_padded
from distill.recall.example import Example

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What one example showed.

    Attributes:
        written: the model wrote the answer.
        log_probability: of the whole answer after the prompt, in nats.
        rank: of the answer among the choices; 1 where the model prefers it to all.
        choices: how many there were, so that 1 / choices of blind guesses have rank 1.
        distance: tokens from the answer's place in the prompt to its end.
        tokens: of the prompt.
    """

    written: bool
    log_probability: float
    rank: int
    choices: int
    distance: int
    tokens: int


def examine(model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int = 16) -> list[Result]:
    """Both scores of a model, student or teacher, on each example.

    Raises:
        UserError: an example is too long for a model that has a vector for each position, or has ids that it lacks.
    """
    _require_fit(model, examples)
    wrote = write(model, examples, batch_size)
    rows = [(one.prompt, choice) for one in examples for choice in one.choices]
    scores = iter(log_probabilities(model, rows, batch_size))
    found = [[next(scores) for _ in one.choices] for one in examples]
    return [
        Result(
            written == one.answer,
            logs[one.label],
            1 + sum(log > logs[one.label] for log in logs),
            len(one.choices),
            one.distance,
            len(one.prompt),
        )
        for one, written, logs in zip(examples, wrote, found, strict=True)
    ]


def write(model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> list[Ids]:
    """What the model writes after each prompt, greedily: as many ids as the answer has, or fewer to an end of text."""
    written: list[Ids] = [()] * len(examples)
    with evaluating(model):
        for group in _groups([len(one.prompt) for one in examples], batch_size):
            inputs = left_padded([examples[i].prompt for i in group], device=device_of(model))
            new_BT = decode(model, inputs, max(len(examples[i].answer) for i in group))
            for i, row in zip(group, new_BT.tolist(), strict=True):
                written[i] = tuple(row[: len(examples[i].answer)])
    return written


def log_probabilities(model: PreTrainedModel, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> list[float]:
    """log p(continuation | prompt) of each pair, in nats.

    Pairs that are read alike (all but their last id) are read once: so choices of one token cost one row.
    """
    reads = list(dict.fromkeys(prompt + after[:-1] for prompt, after in pairs))
    members: dict[Ids, list[int]] = {read: [] for read in reads}
    for number, (prompt, after) in enumerate(pairs):
        members[prompt + after[:-1]].append(number)
    logs = [0.0] * len(pairs)
    with evaluating(model):
        for group in _groups([len(read) for read in reads], batch_size):
            batch = [reads[i] for i in group]
            longest = max(len(pairs[number][1]) for read in batch for number in members[read])
            for read, logs_TV in zip(batch, _last_logs(model, batch, longest), strict=True):
                for number in members[read]:
                    after_T1 = torch.tensor(pairs[number][1], device=logs_TV.device)[:, None]
                    logs[number] = float(logs_TV[-len(after_T1) :].gather(-1, after_T1).sum(dtype=torch.float64))
    return logs


def _last_logs(model: PreTrainedModel, rows: Sequence[Ids], last: int) -> Tensor:
    """Log-probabilities of what follows the ``last`` positions of each row; (B, last, V) fp32."""
    inputs = left_padded(rows, device=device_of(model))
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    logits_BTV = model(**inputs, position_ids=position_ids, use_cache=False, logits_to_keep=last).logits
    return logits_BTV[:, -last:].float().log_softmax(-1)


def _groups(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of batches of like lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def _require_fit(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    text = model.config.get_text_config()
    longest = max(len(one.prompt) + max(map(len, one.choices)) - 1 for one in examples)
    if learns_positions(model) and longest > text.max_position_embeddings:
        raise UserError(
            f"{longest} tokens of prompt and answer are more than the {text.max_position_embeddings} positions that "
            "the model knows; give smaller lengths"
        )
    highest = max(max(one.prompt + sum(one.choices, ())) for one in examples)
    if highest >= text.vocab_size:
        raise UserError(f"the examples have ids up to {highest}, and the model has only {text.vocab_size} tokens")
