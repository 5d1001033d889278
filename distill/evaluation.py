"""How well a student does its teacher's work: loss, divergence, agreement, distance per layer.

A prediction at position t is scored when ``labels[t + 1] != -100``, so nothing is ever predicted across a
document border or into padding. Models are called as packed batches demand it (distill/data): with
``position_ids``, without a cache, without an attention mask.

How numbers are summed: logits in fp32, made by the head for a chunk of positions at a time; totals over the data in
fp64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from distill.decoder import layers_of
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.head import ModelHead, final_states, head_of
from distill.objectives import scored_positions
from distill.objectives.chunked import Head, chunk_rows, full_dtype
from distill.objectives.logits import next_labels
from distill.within import opened, within

# A forward takes as many rows of a batch as keep its widest tensors (or its layers' outputs) under FORWARD elements.
FORWARD = 2**28

# Below this many nats a token, conversion has lost nothing that a share could be a share of.
NO_GAP = 1e-4

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Metrics:
    """Means over the scored positions of some text; what needs a teacher is None without one.

    Attributes:
        loss: the student's cross-entropy against the text, nats per token.
        perplexity: ``exp(loss)``.
        tokens: how many positions were scored.
        teacher_loss: the teacher's cross-entropy at the same positions, nats per token.
        kl: KL(teacher ‖ student) of the next-token distributions, nats per token.
        agreement: share of positions where both give the highest probability to the same token.
    """

    loss: float
    perplexity: float
    tokens: int
    teacher_loss: float | None = None
    kl: float | None = None
    agreement: float | None = None


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[Batch],
    *,
    device: torch.device | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Metrics:
    """Score ``student`` on ``batches`` and, where a teacher is given, compare the two token by token.

    Args:
        teacher: None for the student's own loss alone; the student itself is allowed (KL 0, agreement 1).
        batches: dicts of ``input_ids``, ``position_ids``, ``labels``, each (B, T) int64.
        device: where the batches go; the student's own by default.
        reduce: sums a tensor over processes that each score their own batches, for example
            ``lambda sums: accelerator.reduce(sums, "sum")``.

    Raises:
        UserError: nothing can be scored, or the two vocabularies differ in size.
    """
    device = device or device_of(student)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    models = [student]
    if teacher is not None and teacher is not student:
        _require_one_vocabulary(student, teacher)
        models.append(teacher)
    with evaluating(student, teacher):
        heads = [opened(model, head_of, model) for model in models]
        row_elements = _row_elements(student, heads)
        for batch in batches:
            for rows in _rows(batch, row_elements, device):
                sums += _inside(models, _score, models, heads, rows)
    tokens, *totals = (reduce(sums) if reduce else sums).tolist()
    if not tokens:
        raise UserError("there is no token to score: every document of the text is shorter than two tokens")
    loss, teacher_loss, kl, agreement = (total / tokens for total in totals)
    if teacher is None:
        return Metrics(loss, perplexity(loss), int(tokens))
    if teacher is student:
        return Metrics(loss, perplexity(loss), int(tokens), teacher_loss=loss, kl=0.0, agreement=1.0)
    return Metrics(loss, perplexity(loss), int(tokens), teacher_loss, kl, agreement)


def layer_distances(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    device: torch.device | None = None,
) -> list[float]:
    """Per decoder layer, the mean over valid tokens of ‖h_student − h_teacher‖ / ‖h_teacher‖.

    Both models read the same tokens from their own embeddings up, so a layer's number holds what all layers
    below it have lost as well. ``h`` is what the layer hands to the next one, before any final norm.

    Args:
        batches: dicts of ``input_ids``, ``position_ids`` (B, T) int64 and ``valid`` (B, T) bool.

    Raises:
        UserError: the models differ in depth, or no token is valid.
    """
    device = device or device_of(student)
    depth, teacher_depth = (len(layers_of(model)) for model in (student, teacher))
    if depth != teacher_depth:
        raise UserError(
            f"the student has {depth} layers and the teacher {teacher_depth}: layers are compared one to "
            "one, so give the teacher this student was converted from"
        )
    tokens = 0
    sums_L = torch.zeros(depth, dtype=torch.float64, device=device)
    row_elements = 2 * depth * student.config.get_text_config().hidden_size
    with evaluating(student, teacher):
        for batch in batches:
            for rows in _rows(batch, row_elements, device):
                tokens += int(rows["valid"].sum())
                pairs = zip(_layer_outputs(student, rows), _layer_outputs(teacher, rows), strict=True)
                for layer, (student_BTD, teacher_BTD) in enumerate(pairs):
                    sums_L[layer] += _relative_distance(student_BTD, teacher_BTD, rows["valid"])
    if not tokens:
        raise UserError("there is no valid token to compare the layers on")
    return (sums_L / tokens).tolist()


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity_ratio(teacher: float, now: float) -> float:
    """How many times the teacher's perplexity the student's is, both given as losses: ``exp(now − teacher)``.

    1.05 reads "5 % more perplexed by the same text"; below 1 the student predicts it better than its teacher.
    """
    return perplexity(now - teacher)


def recovered_share(teacher: float, start: float, now: float) -> float | None:
    """The share of the loss gap opened by conversion that training has closed again.

    ``1 − (now − teacher) / (start − teacher)``, all three losses in nats per token on the same text: 0 right
    after conversion, 1 where the student predicts the text as well as its teacher. It is not clipped: above
    1 the student is better than its teacher on this text, below 0 it is worse than it was at conversion.

    Nats are the honest scale for a share. In perplexities the first nats of a broken model would count for
    nearly everything, and every student would seem to have recovered 99 %.

    Returns None where conversion opened no gap (less than ``NO_GAP``), as with a layout that keeps attention
    everywhere, or where a loss is not finite.
    """
    gap = start - teacher
    if not all(map(math.isfinite, (teacher, start, now))) or gap < NO_GAP:
        return None
    return 1 - (now - teacher) / gap


def _inside(modules: Iterable[nn.Module], call: Callable[..., Tensor], *args: object) -> Tensor:
    """``call(*args)`` in the place of the forward of all ``modules``, one within the other."""
    call = partial(call, *args)  # hooks need not see these
    for module in modules:
        call = partial(within, module, call)
    return call()


def _row_elements(model: PreTrainedModel, heads: Sequence[ModelHead | None]) -> int:
    """The widest tensors of a forward, a token: logits, or where these come in chunks what is inside an MLP."""
    text = model.config.get_text_config()
    if None in heads:
        return text.vocab_size
    return 2 * max(getattr(text, "intermediate_size", 0), 4 * text.hidden_size)


def _score(models: Sequence[PreTrainedModel], heads: Sequence[ModelHead | None], rows: dict[str, Tensor]) -> Tensor:
    """Sums over the scored positions, (5,) fp64: tokens, loss, teacher's loss, KL, agreements.

    Args:
        models: the student, and its teacher if there is one; called in the place of their forward.
        heads: of each.
        rows: of a batch.
    """
    scored_BT = scored_positions(rows["labels"])
    next_N = next_labels(rows["labels"])[scored_BT]
    found = [head for head in heads if head is not None]
    if len(found) < len(models):
        logits = [_logits(model, rows)[scored_BT] for model in models]
        return _sums([partial(_taken, logits_NV) for logits_NV in logits], next_N, logits[0].shape[-1])
    states = [final_states(model, rows)[scored_BT] for model in models]

    def through_heads() -> Tensor:
        ways = [partial(_made, head.whole(), hidden_ND) for head, hidden_ND in zip(found, states, strict=True)]
        return _sums(ways, next_N, found[0].whole().vocabulary)

    return _inside([head.linear for head in found], through_heads)


def _taken(logits_NV: Tensor, rows: slice) -> Tensor:
    return logits_NV[rows].float()


def _made(head: Head, hidden_ND: Tensor, rows: slice) -> Tensor:
    shape = rows.stop - rows.start, head.vocabulary
    return head.logits(hidden_ND[rows], hidden_ND.new_empty(shape, dtype=full_dtype(hidden_ND.dtype)))


def _sums(logits: Sequence[Callable[[slice], Tensor]], next_N: Tensor, vocabulary: int) -> Tensor:
    """As ``_score``, from what gives each model's logits (n, V) of some of the scored positions."""
    sums = torch.zeros(5, dtype=torch.float64, device=next_N.device)
    most = chunk_rows(vocabulary)
    for start in range(0, len(next_N), most):
        rows = slice(start, min(start + most, len(next_N)))
        student_nV, *teachers = (log_softmax(of_rows(rows), dim=-1) for of_rows in logits)
        next_n1 = next_N[rows, None]
        sums[0] += len(next_n1)
        sums[1] -= student_nV.gather(-1, next_n1).sum(dtype=torch.float64)
        for teacher_nV in teachers:
            sums[2] -= teacher_nV.gather(-1, next_n1).sum(dtype=torch.float64)
            sums[3] += _kl(teacher_nV, student_nV)
            sums[4] += (teacher_nV.argmax(-1) == student_nV.argmax(-1)).sum()
    return sums


def _require_one_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}: their "
            "distributions can be compared only over one vocabulary"
        )


def _kl(teacher_nV: Tensor, student_nV: Tensor) -> Tensor:
    """Σ p_t (log p_t − log p_s) over positions and vocabulary, from log-probabilities; () fp64."""
    p_nV = teacher_nV.exp()
    # Tokens the teacher rules out altogether add nothing, though log p_t − log p_s may be −inf − (−inf).
    terms_nV = (p_nV * (teacher_nV - student_nV)).masked_fill_(p_nV == 0, 0.0)
    return terms_nV.sum(dtype=torch.float64)


def _relative_distance(student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor) -> Tensor:
    """Σ over valid tokens of ‖student − teacher‖ / ‖teacher‖; () fp64."""
    student_ND, teacher_ND = student_BTD[valid_BT].float(), teacher_BTD[valid_BT].float()
    norm_N = teacher_ND.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student_ND - teacher_ND).norm(dim=-1) / norm_N).sum(dtype=torch.float64)


def _logits(model: PreTrainedModel, rows: Batch) -> Tensor:
    """(B, T, V) in the model's dtype; called in the place of its forward."""
    return model.forward(input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False).logits


def _layer_outputs(model: PreTrainedModel, rows: Batch) -> list[Tensor]:
    """What each decoder layer hands on, (B, T, D) each.

    By hooks, since the last entry of ``output_hidden_states`` has already been through the final norm.
    """
    outputs: list[Tensor] = []

    def keep(_layer: nn.Module, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    decoder, layers = model.get_decoder(), layers_of(model)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        within(model, decoder, input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(outputs) == len(layers), "every decoder layer runs once in a forward"
    return outputs


def _rows(batch: Batch, elements_per_token: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batch on ``device``, split along B so that one forward's output stays under FORWARD elements."""
    per_row = batch["input_ids"].shape[1] * elements_per_token
    n_rows = max(1, FORWARD // per_row)
    names = ("input_ids", "position_ids", "labels", "valid")
    split = {name: batch[name].to(device).split(n_rows) for name in names if name in batch}
    return (dict(zip(split, rows, strict=True)) for rows in zip(*split.values(), strict=True))


def device_of(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
