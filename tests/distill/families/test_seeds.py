"""What is particular about seeding from families whose queries and keys go through a norm."""

import pytest
import torch

from distill import convert
from distill.attention import views
from distill.calibration import calibrate
from distill.conversion import convert_with_report
from distill.objectives import attention_matrix
from distill.student import mixers_of
from tests.distill.families.models import tiny

NORMED = ("Cohere *", "Gemma 3", "OLMo 2", "Phi", "Qwen3")


@pytest.mark.parametrize("case", NORMED)
def test_reads_and_writes_are_as_near_to_normed_queries_and_keys_as_a_factor_brings_them(case):
    """Before rotation. The best factor a channel has the residual at right angles to what it multiplies."""
    teacher = tiny(case)
    student = convert(teacher, mixer="discrete_mamba2")  # no activation behind the convolution
    for index, trace in calibrate(teacher, range(3)):
        seen, u = views(teacher, [index])[index], trace.attention_input
        terms, _ = mixers_of(student)[index]._terms(u, None, None, None)
        q = seen.by_head(seen.q(u), seen.n_heads, seen.q_norm)
        k = seen.per_query_head(seen.by_head(seen.k(u), seen.n_kv_heads, seen.k_norm), dim=2)
        for ours, theirs in ((terms.C_BTHN, q), (terms.B_BTHN, k)):
            ours_HN, cross_HN = ours.square().sum((0, 1)), (ours * theirs).sum((0, 1))
            # One factor a head is left, which sets the matrix to attention's size.
            factor_H = cross_HN.sum(-1) / ours_HN.sum(-1)
            torch.testing.assert_close(cross_HN, factor_H[:, None] * ours_HN, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", NORMED)
def test_every_head_starts_with_a_matrix_of_attentions_size(case):
    teacher = tiny(case)
    student = convert(teacher, seed=3)
    for index, trace in calibrate(teacher, [0, 1, 2], seed=3):
        seen = views(teacher, [index])[index]
        q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
        theirs = attention_matrix(q, k, scaling=seen.scaling, window=seen.sliding_window, softcap=seen.softcap)
        ours = mixers_of(student)[index].mixing_matrix(trace.attention_input)
        torch.testing.assert_close(ours.square().sum((0, 2, 3)), theirs.square().sum((0, 2, 3)), rtol=1e-3, atol=0)


def test_the_report_says_where_norms_went():
    _, report = convert_with_report(tiny("Qwen3"))
    sources = {part.target: part.source for part in report.seeded[0]}
    assert "the norm's weight / mean size before the norm" in sources["in_proj B"]
    _, report = convert_with_report(tiny("Llama"))
    assert not any("norm's" in part.source for part in report.seeded[0])
