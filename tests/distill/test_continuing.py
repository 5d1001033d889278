"""Writing and preferring against one row at a time, without a cache."""

import pytest
import torch

from distill.continuing import Cut, continued, greedily, shared
from tests.conftest import SHAPE, tiny


def drawn(number: int) -> list[Cut]:
    ids = torch.randint(3, SHAPE["vocab_size"], (number, 14), generator=torch.Generator().manual_seed(0)).tolist()
    return [Cut(tuple(row[: 5 + i]), tuple(row[10:])) for i, row in enumerate(ids)]


@torch.no_grad()
def test_both_scores_by_hand():
    model = tiny("llama").double()
    model.generation_config.eos_token_id = None
    cuts = drawn(4)  # as many as there are choices: each text stands beside all others
    cuts[0] = Cut(cuts[0].prompt, greedily(model, cuts, 4, 2)[0])
    cuts[1] = Cut(cuts[1].prompt, (greedily(model, cuts, 4, 2)[1][0], *cuts[1].after[1:]))
    wrote = greedily(model, cuts, 4, 3)
    by_hand = []
    for cut in cuts:
        ids = list(cut.prompt)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        by_hand.append(tuple(ids[-4:]))
    assert wrote == by_hand

    def log(prompt, after):
        logits = model(torch.tensor([prompt + after]), use_cache=False).logits[0].log_softmax(-1)
        return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(after))

    one, four = continued(model, cuts, wrote, [1, 4], seed=0, batch_size=3)
    assert (one.tokens, one.written) == (1, sum(w[0] == c.after[0] for w, c in zip(wrote, cuts, strict=True)) / 4)
    assert one.written >= 0.5
    assert four.written == sum(w == c.after for w, c in zip(wrote, cuts, strict=True)) / 4 >= 0.25
    best = [max(cuts, key=lambda other, prompt=cut.prompt: log(prompt, other.after)) is cut for cut in cuts]
    assert four.preferred == sum(best) / 4
    assert four.gap == four.preferred - four.written
    assert four.chance == 0.25
    expected = sum(log(cut.prompt, cut.after) for cut in cuts) / 16
    assert four.log_probability == pytest.approx(expected, rel=1e-6)


def test_texts_that_begin_alike_are_no_choice():
    model, cuts = tiny("llama"), [Cut((5, 6), (7, n)) for n in (8, 9, 9)]
    one, two = continued(model, cuts, [(), (), ()], [1, 2], seed=0, batch_size=4)
    assert (one.chance, one.preferred) == (1.0, 1.0)  # nothing else to prefer
    assert two.chance == 0.5


def test_what_is_shared_counts_up_to_a_length():
    assert shared([(1, 2), (1, 3)], [(1, 2), (1, 4)], 1) == 1
    assert shared([(1, 2), (1, 3)], [(1, 2), (1, 4)], 2) == 0.5
    assert shared([(1,)], [(1, 2)], 2) == 0  # ended before
