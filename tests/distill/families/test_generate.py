"""Every way to generate, with a cache and without: students like Llama, like Qwen3, like Gemma 2 and 3."""

import functools

import pytest
import torch
from transformers import PreTrainedModel

from distill import convert
from tests.conftest import disturbed
from tests.distill.families.models import tiny

LIKE = ("Gemma 2", "Gemma 3", "Llama", "Qwen3")
KEPT = ((), (1,))
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "4 beams": {"num_beams": 4, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "prefill in chunks": {"prefill_chunk_size": 4, "do_sample": False},
}
ABOUT_THE_CACHE = ("cache_implementation", "prefill_chunk_size")
LENGTHS = (3, 8, 13)  # windows are of 6 positions

pytestmark = pytest.mark.support("generates")


@functools.cache
def student_of(case: str, kept: tuple[int, ...]) -> PreTrainedModel:
    """Its mixers away from where they were seeded."""
    return disturbed(convert(tiny(case), keep_attention=kept), by=0.05)


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row for each length, padded on the left, and their mask."""
    torch.manual_seed(7)
    ids_BT, width = torch.randint(3, 97, (len(lengths), max(lengths))), max(lengths)
    mask_BT = torch.stack([torch.arange(width) >= width - length for length in lengths])
    return ids_BT * mask_BT, mask_BT.long()


def continued(student: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor, **mode: object) -> torch.Tensor:
    torch.manual_seed(0)
    return student.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=9, eos_token_id=None, pad_token_id=0, **mode
    )[:, ids_BT.shape[1] :]


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("kept", KEPT, ids=["all mixers", "hybrid"])
@pytest.mark.parametrize("case", LIKE)
def test_with_a_cache_as_without(case: str, kept: tuple[int, ...], mode: str) -> None:
    student, settings = student_of(case, kept), MODES[mode]
    plain = {name: value for name, value in settings.items() if name not in ABOUT_THE_CACHE}
    inputs = prompts(11, 11)
    expected = continued(student, *inputs, **plain, use_cache=False)
    assert torch.equal(continued(student, *inputs, **settings), expected)


@pytest.mark.parametrize("mode", ["greedy", "4 beams", "static cache", "prefill in chunks"])
@pytest.mark.parametrize("kept", KEPT, ids=["all mixers", "hybrid"])
@pytest.mark.parametrize("case", LIKE)
def test_in_a_left_padded_batch_as_alone(case: str, kept: tuple[int, ...], mode: str) -> None:
    student, settings = student_of(case, kept), MODES[mode]
    ids_BT, mask_BT = prompts(*LENGTHS)
    together = continued(student, ids_BT, mask_BT, **settings)
    for row, length in enumerate(LENGTHS):
        alone = ids_BT[row : row + 1, -length:]
        assert torch.equal(continued(student, alone, torch.ones_like(alone), **settings)[0], together[row])


@pytest.mark.parametrize("case", LIKE)
def test_assisted_by_a_small_model_is_refused_with_the_reason(case: str) -> None:
    with pytest.raises(ValueError, match="stateful"):
        continued(student_of(case, (1,)), *prompts(5), do_sample=False, assistant_model=tiny(case, seed=1))
