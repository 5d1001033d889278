"""What each layer's attention does for recall in the teacher alone: no student is needed, and no training.

    x = r r              r: ids of the text drawn at random, so that nothing but the first half says what comes next
    score_l = loss(teacher, attention of layer l ↦ its mean) − loss(teacher)          nats a token of the second half

The first token of the second half, which nothing announces, is not scored. A layer's attention is replaced by what it
puts out on average over the text (`distill.ablation`): what does not depend on the input stays, so that a layer is not
found important for a constant that the rest of the model needs.

Ids are those that the text has, each as often as any other, so that any vocabulary will do, and none of its ids that
the teacher never saw is drawn. Repeated random tokens as in "In-context learning and induction heads" (Olsson et al.
2022).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.ablation import ablated, mean_outputs
from distill.data.blocks import IGNORED
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.objective import Batch
from distill.selection.ranking import Ranking, by_score

LEAST = 16  # different ids that a text must have


def probe(
    teacher: PreTrainedModel,
    candidates: Sequence[int],
    text: Sequence[Batch],
    *,
    length: int,
    batch_size: int,
    bos: int | None,
    seed: int,
) -> Ranking:
    """Ranks layers by what the teacher's recall loses without their attention.

    Args:
        candidates: layers that may keep attention.
        text: batches whose tokens give ids and means; as many tokens of repetitions are read.
        length: of a row of repetitions, the BOS included.
        batch_size: rows at a time.
        bos: the id that rows begin with; None for none.
        seed: of what is drawn.

    Raises:
        UserError: the text has too few different ids.
    """
    tokens = sum(batch["input_ids"].numel() for batch in text)
    ids = torch.cat([batch["input_ids"][batch["valid"]] for batch in text]).unique()
    rows = list(repetitions(ids, max(1, tokens // length), length, batch_size, bos, seed))
    means = mean_outputs(teacher, candidates, text)
    intact = evaluate(teacher, None, rows).loss
    scores = {}
    for layer in candidates:
        with ablated(teacher, [layer], means):
            scores[layer] = evaluate(teacher, None, rows).loss - intact
    return by_score(scores, "rise of loss on repeated random tokens, nats")


def repetitions(ids: Tensor, n_rows: int, length: int, batch_size: int, bos: int | None, seed: int) -> Iterator[Batch]:
    """Batches of rows ``bos r r``, each row with ids of its own; packed text as `distill.data` makes it.

    Args:
        ids: (I,) the different ids to draw from, ``bos`` among them or not.
        length: at most; a row has two equal halves behind its BOS.

    Raises:
        UserError: there are too few ids.
    """
    drawn_from = ids if bos is None else ids[ids != bos]
    if len(drawn_from) < LEAST:
        raise UserError(f"the text has {len(drawn_from)} different tokens; a probe of recall needs {LEAST} at least")
    head = [] if bos is None else [bos]
    half = (length - len(head)) // 2
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n_rows, batch_size):
        n = min(batch_size, n_rows - start)
        r_BH = drawn_from[torch.randint(len(drawn_from), (n, half), generator=generator)]
        input_ids = torch.cat([torch.tensor(head, dtype=torch.int64).expand(n, -1), r_BH, r_BH], dim=1)
        labels = input_ids.clone()
        labels[:, : len(head) + half + 1] = IGNORED
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        yield {
            "input_ids": input_ids,
            "position_ids": positions.contiguous(),
            "labels": labels,
            "valid": torch.ones_like(input_ids, dtype=torch.bool),
        }
