"""Each head gets the memory that fits: found again where it is known, and the best of the grid where it is not."""

import pytest
import torch

from distill import convert
from distill.attention import views
from distill.capture import layer_traces, sequence_arguments
from distill.fitting import memories
from distill.fitting.memories import MEMORIES, SET_MEMORY, fit_memories_, memories_of
from distill.mixers import MIXERS
from distill.objectives import attention_matrix
from distill.student import mixers_of
from tests.conftest import tiny

NAMES = [name for name, kind in MIXERS.items() if kind in SET_MEMORY]
SIZED = [name for name in NAMES if name not in ("gated_deltanet", "hedgehog")]
LENGTH = 48


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Two rows of documents of these lengths."""
    torch.manual_seed(2)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    ids = torch.randint(3, 97, positions.shape)
    return {"input_ids": ids, "position_ids": positions, "valid": torch.ones_like(ids, dtype=torch.bool)}


def made(name: str, rope: str = "keep", family: str = "llama", lengths: tuple[int, ...] = (LENGTH,)):
    """A teacher's first attention in fp64, the mixer seeded from it, and what both read."""
    teacher = tiny(family).double()
    mixer = mixers_of(convert(teacher, mixer=name, rope=rope))[0]
    batch = batch_of(*lengths)
    trace = layer_traces(teacher, batch, [0], ["attention_input"])[0]
    return mixer, views(teacher, [0])[0], (trace, sequence_arguments(batch))


@torch.no_grad()
def matrix(mixer, read) -> torch.Tensor:
    trace, arguments = read
    return mixer.mixing_matrix(trace.attention_input, position_embeddings=trace.position_embeddings, **arguments)


def test_the_memories_that_made_a_matrix_are_found_again(name, monkeypatch):
    mixer, attention, read = made(name)
    wanted_H = torch.tensor([MEMORIES[place] for place in (2, 5, 12, 7)], dtype=torch.float64)
    SET_MEMORY[type(mixer)](mixer, wanted_H)
    target = 3.7 * matrix(mixer, read)
    monkeypatch.setattr(memories, "_attention", lambda *_: target)
    SET_MEMORY[type(mixer)](mixer, torch.full_like(wanted_H, 40.0))
    fit_memories_(mixer, attention, [read])
    torch.testing.assert_close(memories_of(mixer), wanted_H, rtol=1e-9, atol=0)
    if name in SIZED:
        torch.testing.assert_close(matrix(mixer, read), target, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lengths", [(LENGTH,), (20, 9, 19)], ids=["whole", "packed"])
def test_no_other_memory_of_the_grid_comes_nearer(name, lengths):
    mixer, attention, read = made(name, family="qwen2", lengths=lengths)
    fit_memories_(mixer, attention, [read])
    found_H = memories_of(mixer)
    trace, arguments = read
    q, k = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
    document = None if len(lengths) == 1 else arguments["resets_BT"].cumsum(1)
    teacher = attention_matrix(q, k, scaling=attention.scaling, document_BT=document).double()
    distances = []
    for memory in MEMORIES:
        SET_MEMORY[type(mixer)](mixer, torch.full_like(found_H, memory))
        student = matrix(mixer, read).double()
        rest_H = []
        for head in range(len(found_H)):
            column, wanted = student[:, head].reshape(-1, 1), teacher[:, head].reshape(-1, 1)
            scale = float(torch.linalg.lstsq(column, wanted).solution)
            rest_H.append(float((max(scale, 0.0) * column - wanted).norm()))
        distances.append(rest_H)
    best_H = torch.tensor(MEMORIES, dtype=torch.float64)[torch.tensor(distances).argmin(dim=0)]
    torch.testing.assert_close(found_H, best_H, rtol=1e-6, atol=0)
    # Rows that sum to one are best as long as they go, beside a random attention that looks at everything alike.
    assert len(set(best_H.tolist())) > 1 or (name == "hedgehog" and len(lengths) == 1)


@pytest.mark.parametrize("name", SIZED)
def test_the_matrix_has_attentions_size_again(name):
    mixer, attention, read = made(name, rope="drop")
    fit_memories_(mixer, attention, [read])
    size_H = matrix(mixer, read).square().sum(dim=(0, 2, 3)).sqrt()
    trace, _ = read
    q, k = attention.queries_and_keys(trace.attention_input, trace.position_embeddings)
    wanted_H = attention_matrix(q, k, scaling=attention.scaling).square().sum(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(size_H, wanted_H, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"hedgehog"}))  # which without a query reads all alike
def test_a_head_that_reads_nothing_keeps_its_memory(name):
    mixer, attention, read = made(name)
    before_H = memories_of(mixer)
    query = mixer.in_rows()["q" if name == "gated_deltanet" else "C"]
    rows = slice(query.start, query.start + mixer.state_dim)
    with torch.no_grad():
        mixer.in_proj.weight[rows] = 0
    fit_memories_(mixer, attention, [read])
    assert memories_of(mixer)[0] == pytest.approx(float(before_H[0]), rel=0.2)  # the nearest of half octaves


def test_padding_has_no_say(name):
    mixer, attention, (trace, arguments) = made(name)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, 30:] = False
    fit_memories_(mixer, attention, [(trace, {**arguments, "valid_BT": valid})])
    padded_H = memories_of(mixer)
    trace.attention_input = trace.attention_input[:, :30]
    trace.layer_kwargs["position_embeddings"] = tuple(part[:, :30] for part in trace.position_embeddings)
    fit_memories_(mixer, attention, [(trace, arguments)])
    torch.testing.assert_close(memories_of(mixer), padded_H)
