"""Every family's attention recomputed through its view, and the model rebuilt with all of it kept."""

import pytest
import torch

from distill import convert
from distill.attention import views
from distill.capture import layer_traces
from distill.documents import document_starts
from distill.objectives import attention_matrix
from tests.distill.families.models import EVERY, tiny


@pytest.mark.support("view exact")
@pytest.mark.parametrize("case", EVERY)
def test_attention_recomputed_through_the_view_is_the_modules_output(case):
    teacher = tiny(case).double()
    teacher.config._experts_implementation = "eager"  # the other has no fp64
    torch.manual_seed(3)
    positions = torch.stack([torch.cat([torch.arange(n) for n in (9, 1, 14)]), torch.arange(24)])
    batch = {"input_ids": torch.randint(3, 97, (2, 24)), "position_ids": positions}
    documents = document_starts(positions).cumsum(1)
    traces = layer_traces(teacher, batch, range(3))
    for index, seen in views(teacher, range(3)).items():
        trace = traces[index]
        q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
        look = {"window": seen.sliding_window, "softcap": seen.softcap, "document_BT": documents}
        matrix = attention_matrix(q, k, scaling=seen.scaling, **look)
        mixed = torch.einsum("bhts,bshp->bthp", matrix, seen.values(trace.attention_input)).flatten(2)
        # Some families round to fp32 inside: norms, rotations, eager attention's softmax.
        torch.testing.assert_close(seen.o(mixed), trace.attention_output, rtol=1e-5, atol=1e-6)


@pytest.mark.support("view exact")
@pytest.mark.parametrize("case", EVERY)
def test_weights_and_biases_of_the_view_are_the_maps_that_it_calls(case):
    teacher = tiny(case)
    for seen in views(teacher, range(3)).values():
        wide, narrow = seen.n_heads * seen.head_dim, seen.n_kv_heads * seen.head_dim
        shapes = {"q": (wide, 32), "k": (narrow, 32), "v": (narrow, 32), "o": (32, wide)}
        for name, shape in shapes.items():
            projection = getattr(seen, name)
            assert projection.weight.shape == shape
            u = torch.randn(2, 5, shape[1])
            expected = torch.nn.functional.linear(u, projection.weight, projection.bias)
            torch.testing.assert_close(projection(u), expected)


@pytest.mark.support("copy exact")
@pytest.mark.parametrize("case", EVERY)
def test_with_all_attention_kept_the_student_is_the_teacher_bit_for_bit(case):
    teacher, ids = tiny(case), torch.arange(48).view(2, 24) + 3
    assert torch.equal(convert(teacher, keep_attention=range(3))(ids).logits, teacher(ids).logits)
