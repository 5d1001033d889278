"""Both scores against one example at a time, without padding, cache or batches, in fp64; teacher and students."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill import convert
from distill.errors import UserError
from distill.recall import Example, examine, row_examples
from distill.recall.scoring import log_probabilities, write
from tests.conftest import FAMILIES, SHAPE

V = SHAPE["vocab_size"]


def examples() -> list[Example]:
    """Prompts of many lengths, with answers of one token and of three."""
    drawn = torch.Generator().manual_seed(0)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, V, (number,), generator=drawn).tolist())

    singles = [Example(ids(5 + 3 * n), tuple(ids(1) for _ in range(4)), n % 4, 2) for n in range(4)]
    return [*singles, *(Example(ids(9 - n), tuple(ids(3) for _ in range(4)), n % 4, 2) for n in range(5))]


@pytest.fixture(scope="module", params=["teacher", "learned positions", "mamba2", "hybrid"])
def model(request):
    torch.manual_seed(0)
    if request.param == "learned positions":  # in which a row must not be moved by its padding
        learned = GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
        return GPT2LMHeadModel(learned).double().eval()
    teacher = FAMILIES["llama"]().double().eval()
    teacher.generation_config.eos_token_id = None
    if request.param == "teacher":
        return teacher
    return convert(teacher, keep_attention=[] if request.param == "mamba2" else [1]).eval()


def log_by_hand(model, prompt, after) -> float:
    logits_TV = model(torch.tensor([prompt + after]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits_TV[len(prompt) + i - 1, token]) for i, token in enumerate(after))


@torch.no_grad()
def test_likelihoods_are_those_of_one_row_at_a_time(model):
    pairs = [(one.prompt, choice) for one in examples() for choice in one.choices]
    expected = [log_by_hand(model, *pair) for pair in pairs]
    for batch_size in (1, 4, 64):
        assert log_probabilities(model, pairs, batch_size) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_greedy_decoding_is_that_of_one_row_without_a_cache(model):
    expected = []
    for one in examples():
        ids = one.prompt
        for _ in one.answer:
            ids += (int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()),)
        expected.append(ids[len(one.prompt) :])
    for batch_size in (1, 4):
        assert write(model, examples(), batch_size) == expected


@torch.no_grad()
def test_results(model):
    """An example whose answer is what the model writes, beside those where it is not."""
    given = examples()
    wrote = write(model, given, 4)
    right = [Example(one.prompt, (*one.choices[:3], ids), 3, 7) for one, ids in zip(given, wrote, strict=True)]
    results = examine(model, [*given, *right], batch_size=4)
    assert [result.written for result in results[len(given) :]] == [True] * len(given)
    assert not any(result.written for result in results[: len(given)])
    for one, result in zip([*given, *right], results, strict=True):
        logs = [log_by_hand(model, one.prompt, choice) for choice in one.choices]
        assert result.rank == 1 + sorted(logs, reverse=True).index(logs[one.label])
        assert result.log_probability == pytest.approx(logs[one.label], rel=1e-5)
        assert (result.choices, result.distance, result.tokens) == (4, one.distance, len(one.prompt))


def test_a_checkpoints_own_settings_change_nothing():
    torch.manual_seed(0)
    model, (given, *_) = FAMILIES["llama"]().eval(), examples()[4:]
    model.generation_config.eos_token_id = None
    plain = write(model, [given], 1)
    assert len(set(plain[0])) < 3  # a penalty would be seen
    own = model.generation_config
    own.update(repetition_penalty=9.0, do_sample=True, no_repeat_ngram_size=1)
    assert write(model, [given], 1) == plain
    assert model.generation_config is own


def test_an_end_of_text_stops_the_answer():
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    (one,) = (Example((5, 6, 7), ((8, 9, 10), (1, 1, 1)), 0, 1),)
    first, *_ = write(model, [one], 1)[0]
    model.generation_config.eos_token_id = first
    assert write(model, [one], 1) == [(first,)]


def test_prompts_beyond_learned_positions_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="36 tokens of prompt and answer are more than the 32 positions"):
        examine(model, row_examples("copying", 4, 33, samples=1, seed=0, vocabulary=512))


def test_ids_that_the_model_lacks_are_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(UserError, match="has only 97 tokens"):
        examine(model, row_examples("copying", 4, 0, samples=1, seed=0, vocabulary=512))
