"""Every family's attention recomputed through its view, and the model rebuilt with all of it kept."""

import pytest
import torch

from distill import convert
from distill.attention import views
from distill.capture import layer_traces
from distill.documents import document_starts
from distill.objectives import attention_matrix
from tests.distill.families.models import CASES, tiny


@pytest.mark.parametrize("case", CASES)
def test_attention_recomputed_through_the_view_is_the_modules_output(case):
    teacher = tiny(case)
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
        torch.testing.assert_close(seen.o(mixed), trace.attention_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_all_attention_kept_the_student_is_the_teacher_bit_for_bit(case):
    teacher, ids = tiny(case), torch.arange(48).view(2, 24) + 3
    assert torch.equal(convert(teacher, keep_attention=range(3))(ids).logits, teacher(ids).logits)
