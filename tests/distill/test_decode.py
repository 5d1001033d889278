"""Generation one token at a time: nothing grows, nothing moves, nothing waits, and a compiled step is compiled once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from distill import convert
from distill.mixers import MIXERS
from tests.conftest import disturbed, tiny

LAYOUTS = {"all mixers": (), "first kept": (0,), "last kept": (2,)}


@pytest.fixture(params=[(mixer, layout) for mixer in sorted(MIXERS) for layout in LAYOUTS], ids=" ".join)
def student(request) -> PreTrainedModel:
    mixer, layout = request.param
    return disturbed(convert(tiny("llama"), mixer=mixer, keep_attention=LAYOUTS[layout]))


def tokens(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def new_cache(kind: str, student: PreTrainedModel) -> Cache:
    if kind == "static":
        return StaticCache(config=student.config, max_cache_len=64)
    return DynamicCache(config=student.config)


def steps(student: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    return torch.cat([student(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], dim=1)


def held(cache: Cache) -> list[tuple[int, int]]:
    """Address and size of every tensor that any layer of a cache holds."""
    tensors = []
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors += value.values() if isinstance(value, dict) else [value]
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_steps_are_the_uncached_forward(student, kind):
    ids = tokens(3, 40)
    expected = student(ids, use_cache=False).logits
    cache = new_cache(kind, student)
    first = student(ids[:, :17], past_key_values=cache).logits
    close(torch.cat([first, steps(student, ids[:, 17:], cache)], dim=1), expected)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
@torch.no_grad()
def test_nothing_an_all_mamba_student_remembers_moves_or_grows(mixer, kind):
    student = convert(tiny("llama"), mixer=mixer)
    cache = new_cache(kind, student)
    student(tokens(2, 5), past_key_values=cache)
    before = held(cache)
    assert len(before) == 3 * 2 + 1  # convolution and state of three layers, and the count of tokens
    steps(student, tokens(2, 20), cache)
    assert held(cache) == before


@torch.no_grad()
def test_with_a_static_cache_nothing_a_hybrid_remembers_moves_or_grows(student):
    cache = new_cache("static", student)
    student(tokens(2, 5), past_key_values=cache)
    before = held(cache)
    steps(student, tokens(2, 20), cache)
    assert held(cache) == before


@torch.no_grad()
def test_a_batch_decodes_what_each_sequence_does_alone(student):
    ids = tokens(5, 20)
    cache = new_cache("dynamic", student)
    student(ids[:, :8], past_key_values=cache)
    together = steps(student, ids[:, 8:], cache)
    for row in range(5):
        alone = new_cache("dynamic", student)
        student(ids[row : row + 1, :8], past_key_values=alone)
        close(together[row : row + 1], steps(student, ids[row : row + 1, 8:], alone))


@torch.no_grad()
def test_a_step_is_compiled_once_and_whole(student):
    """Without graph breaks (``fullgraph``), and never again, although every step finds another count of tokens."""
    ids = tokens(2, 30)
    expected = student(ids, use_cache=False).logits[:, 10:]
    cache = new_cache("static", student)
    student(ids[:, :10], past_key_values=cache)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(student.__call__, backend="eager", fullgraph=True)
    got = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 30)]
    close(torch.cat(got, dim=1), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_compiles_a_step_once_and_whole_for_padded_prompts_too(family):
    student = disturbed(convert(tiny(family), keep_attention=[1]))
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    setting = CompileConfig(backend="eager", fullgraph=True, mode=None)
    setting._compile_all_devices = True
    arguments = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got = student.generate(ids, **arguments, cache_implementation="static", compile_config=setting)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(got, student.generate(ids, **arguments, use_cache=False))


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from a tensor into Python, for which a GPU would have to finish its work."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_step_waits_for_no_value(student, masked):
    cache = new_cache("static", student)
    student(tokens(2, 5), past_key_values=cache)
    mask = torch.ones(2, 6, dtype=torch.long) if masked else None
    with NoWaiting():
        student(tokens(2, 1), attention_mask=mask, position_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_padding_between_steps_is_as_if_it_had_not_been(student):
    """A row that waits (mask 0) while others go on: no gap in its convolution, no decay, no key that is read."""
    ids, cache, plain = tokens(2, 14), new_cache("dynamic", student), new_cache("dynamic", student)
    student(ids[:, :6], past_key_values=cache)
    student(ids[:, :6], past_key_values=plain)
    mask, got = torch.ones(2, 6, dtype=torch.long), []
    for t in range(6, 14):
        waits = torch.tensor([[1], [0 if t in (7, 8, 10) else 1]])
        mask = torch.cat([mask, waits], dim=1)
        positions = mask.cumsum(1)[:, -1:] - 1
        got.append(
            student(ids[:, t : t + 1], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        )
    seen = [t for t in range(6, 14) if t not in (7, 8, 10)]
    expected = steps(student, ids[1:, seen].expand(2, -1), plain)[1:]
    close(torch.cat(got, dim=1)[1:, [t - 6 for t in seen]], expected)


@torch.no_grad()
def test_a_token_behind_a_prompt_padded_on_the_right_is_refused(student):
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    cache = new_cache("dynamic", student)
    student(tokens(2, 8), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="padding between tokens"):
        student(tokens(2, 1), attention_mask=torch.cat([mask, mask[:, :1]], dim=1), past_key_values=cache)


def test_a_prompt_read_in_inference_mode_is_continued_outside_of_it(student):
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits[:, 12:]
    cache = new_cache("dynamic", student)
    with torch.inference_mode():
        student(ids[:, :12], past_key_values=cache)
    with torch.no_grad():
        close(steps(student, ids[:, 12:], cache), expected)


def test_gradients_through_cached_calls_are_those_of_one_call(student):
    ids, gradients = tokens(2, 12), []
    for pieces in ([12], [6, 1, 1, 4]):
        student.zero_grad()
        cache = new_cache("dynamic", student)
        logits = [student(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
        torch.cat(logits, dim=1).double().pow(2).mean().backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_a_cache_is_used_again_after_a_reset(student):
    cache = new_cache("static", student)
    student(tokens(2, 9), past_key_values=cache)
    steps(student, tokens(2, 4), cache)
    cache.reset()
    ids = tokens(2, 12)
    first = student(ids[:, :1], past_key_values=cache).logits
    close(torch.cat([first, steps(student, ids[:, 1:], cache)], dim=1), student(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 12
