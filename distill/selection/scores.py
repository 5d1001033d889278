"""What each layer's attention is worth, by forward passes over a text; the higher the score, the more.

    restore   KL(teacher ‖ student) − KL(teacher ‖ student_{l})                 nats a token that layer l gives back
    greedy    S ← S ∪ {argmax_l KL(teacher ‖ student_S) − KL(teacher ‖ student_{S ∪ {l}})}, again and again
    mixing    the distance of layer l's mixing matrix from attention's           as stage 1 measures it
    hidden    the distance of layer l's output from attention's                  as stage 2 measures it

student is the aligned one without any attention, student_S as in `distill.selection.restoring`. The first two ask what
the whole model would gain; the others how badly a mixer does alone what attention did, whether or not that matters.

Restoring one layer, training and ranking by the loss is the selection of "Distilling to hybrid attention models via
KL-guided layer selection" (KL-LS); here nothing is trained, so a layer costs a forward pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from distill.evaluating import evaluating
from distill.evaluation import evaluate
from distill.objective import Batch, Objective
from distill.selection.ranking import Layers, Ranking, by_score
from distill.selection.restoring import restored

Divergence = Callable[[Layers], float]
"""KL(teacher ‖ student_S), nats a token, of a set S of layers that have their attention back."""

GAIN = "fall of KL, nats a token"


def divergence(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int], batches: Iterable[Batch]
) -> float:
    """KL(teacher ‖ student_S) in nats, a mean over scored tokens.

    Args:
        student: aligned, without attention where ``layers`` are.
        layers: S; no layer is the student itself.
        batches: text; at best text that nobody measures by later.
    """
    with restored(student, teacher, layers) as model:
        kl = evaluate(model, teacher, batches).kl
    assert kl is not None
    return kl


def restore_one(candidates: Sequence[int], kl: Divergence) -> Ranking:
    """Ranks by what each layer gives back alone.

    Args:
        candidates: layers that may keep attention.
        kl: of a set of layers.
    """
    start = kl(())
    scores = {layer: start - kl((layer,)) for layer in candidates}
    return by_score(scores, GAIN)


def greedy(candidates: Sequence[int], kl: Divergence, keep: int) -> Ranking:
    """Takes the layer that gives back most, ranks the others again beside it, and so on until ``keep`` are chosen.

    The first round is ``restore_one``. A layer that does what a chosen one does already gives back little later on.
    """
    chosen: list[int] = []
    rounds: list[Mapping[int, float]] = []
    best = kl(())
    while len(chosen) < keep:
        left = [layer for layer in candidates if layer not in chosen]
        found = {layer: kl(tuple(sorted((*chosen, layer)))) for layer in left}
        ranking = by_score({layer: best - found[layer] for layer in left}, GAIN)
        rounds.append(ranking.scores)
        chosen.append(ranking.order[0])
        best = found[chosen[-1]]
    rest = [layer for layer in ranking.order if layer not in chosen]
    scores = dict(rounds[-1]) | {layer: scores[layer] for layer, scores in zip(chosen, rounds, strict=True)}
    return Ranking((*chosen, *rest), scores, GAIN, tuple(rounds))


def distances(objective: Objective, models: Sequence[PreTrainedModel], batches: Iterable[Batch]) -> dict[int, float]:
    """A layerwise stage's loss, layer by layer, without training.

    Args:
        objective: with a part ``layers.N`` for each layer, such as those of the first two stages.
        models: those it calls.
    """
    assert objective.layerwise, "only of layers that share nothing is there a loss for each"
    sums: dict[int, Tensor] = {}
    weight = 0.0
    with evaluating(*models):
        for batch in batches:
            weight += objective.weight(batch)
            for part in objective.parts(batch):
                layer, loss = int(part.name.removeprefix("layers.")), part.loss_sum().double()
                sums[layer] = sums[layer] + loss if layer in sums else loss
    return {layer: float(total) / weight for layer, total in sums.items()}
