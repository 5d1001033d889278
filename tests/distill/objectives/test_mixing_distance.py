"""mixing_distance and attention_matrix beside versions with loops, and beside Hugging Face's eager attention."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from distill.objectives import attention_matrix, mixing_distance


def naive_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> float:
    B, H, T, _ = student.shape
    total = 0.0
    for b in range(B):
        for h in range(H):
            square = 0.0
            for t in range(T):
                for s in range(T):
                    if valid[b, t] and valid[b, s]:
                        square += float(student[b, h, t, s] - teacher[b, h, t, s]) ** 2
            total += math.sqrt(square)
    return total / (B * H)


def naive_relative_error(student: Tensor, teacher: Tensor, valid: Tensor) -> float:
    B, H, T, _ = student.shape
    total = 0.0
    for b in range(B):
        columns = [s for s in range(T) if valid[b, s]]
        for h in range(H):
            for t in columns:
                error = math.sqrt(sum(float(student[b, h, t, s] - teacher[b, h, t, s]) ** 2 for s in columns))
                size = math.sqrt(sum(float(teacher[b, h, t, s]) ** 2 for s in columns))
                total += error / max(size, 1 / math.sqrt(T)) / len(columns)
    return total / (B * H)


def naive_attention(q, k, scaling, document, window, softcap) -> Tensor:
    B, H, T, D = q.shape
    weights = torch.zeros(B, H, T, T, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                row = {}
                for s in range(t + 1):
                    score = scaling * sum(float(q[b, h, t, d] * k[b, h, s, d]) for d in range(D))
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    same = document is None or document[b, t] == document[b, s]
                    if same and (window is None or t - s < window):
                        row[s] = math.exp(score)
                for s, weight in row.items():
                    weights[b, h, t, s] = weight / sum(row.values())
    return weights


@pytest.fixture
def matrices() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return student, teacher, valid


def test_it_equals_the_loops(matrices):
    student, teacher, valid = matrices
    everywhere = torch.ones_like(valid)
    expected = naive_distance(student, teacher, valid)
    assert mixing_distance(student, teacher, valid).item() == pytest.approx(expected, rel=1e-14)
    expected = naive_distance(student, teacher, everywhere)
    assert mixing_distance(student, teacher).item() == pytest.approx(expected, rel=1e-14)


def test_relative_errors_equal_the_loops(matrices):
    student, teacher, valid = matrices
    teacher[0, 1, 2] /= 100  # a row smaller than any of attention's: its size counts as T^-1/2
    expected = naive_relative_error(student, teacher, valid)
    assert mixing_distance(student, teacher, valid, form="row_normalised").item() == pytest.approx(expected, rel=1e-14)
    expected = naive_relative_error(student, teacher, torch.ones_like(valid))
    assert mixing_distance(student, teacher, form="row_normalised").item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("length", [3, 30, 300])
def test_a_student_of_zeros_has_a_relative_error_of_one_at_every_length(length):
    q, k = torch.randn(2, 1, 2, length, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    teacher = attention_matrix(q, k, scaling=1.0)
    loss = mixing_distance(torch.zeros_like(teacher), teacher, form="row_normalised")
    torch.testing.assert_close(loss, torch.ones_like(loss))


def test_the_square_is_that_of_each_heads_norm(matrices):
    student, teacher, valid = matrices
    heads = [
        mixing_distance(student[b : b + 1, h : h + 1], teacher[b : b + 1, h : h + 1], valid[b : b + 1])
        for b in range(2)
        for h in range(3)
    ]
    expected = torch.stack(heads).square().mean()
    torch.testing.assert_close(mixing_distance(student, teacher, valid, form="squared"), expected)


@pytest.mark.parametrize("form", ["unsquared", "squared", "row_normalised"])
def test_the_gradient_is_that_of_the_value(matrices, form):
    student, teacher, valid = matrices
    assert torch.autograd.gradcheck(lambda s: mixing_distance(s, teacher, valid, form=form), student.requires_grad_())


def test_another_form_is_refused(matrices):
    with pytest.raises(ValueError, match="form is 'unsquared', 'squared', 'row_normalised', not 'cubed'"):
        mixing_distance(*matrices, form="cubed")


def test_sum_is_over_sequences_of_the_mean_over_heads(matrices):
    student, teacher, valid = matrices
    total = mixing_distance(student, teacher, valid, reduction="sum")
    torch.testing.assert_close(total, 2 * mixing_distance(student, teacher, valid))


def test_equal_matrices_have_distance_and_gradient_zero(matrices):
    student = matrices[0].float().requires_grad_()
    loss = mixing_distance(student, student.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_rows_and_columns_of_padding_do_not_matter(matrices, junk):
    student, teacher, valid = matrices
    clean = mixing_distance(student, teacher, valid)
    padding = ~(valid[:, :, None] & valid[:, None, :])[:, None].expand_as(student)
    student[padding] = junk
    student.requires_grad_()
    loss = mixing_distance(student, teacher, valid)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (student.grad[padding] == 0).all()
    assert student.grad.isfinite().all()


def test_padding_a_sequence_does_not_change_its_distance(matrices):
    student, teacher, _ = matrices
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[:, 5:] = False
    padded = [torch.nn.functional.pad(x, (0, 2, 0, 2), value=9.0 + i) for i, x in enumerate((student, teacher))]
    torch.testing.assert_close(mixing_distance(*padded, valid), mixing_distance(student, teacher))


def test_more_sequences_or_heads_of_the_same_have_the_same_mean(matrices):
    student, teacher, valid = matrices
    longer = student.repeat(3, 2, 1, 1), teacher.repeat(3, 2, 1, 1), valid.repeat(3, 1)
    torch.testing.assert_close(mixing_distance(*longer), mixing_distance(student, teacher, valid))


def test_bf16_matrices_give_an_fp32_loss(matrices):
    student, teacher = matrices[0].bfloat16().requires_grad_(), matrices[1].bfloat16()
    loss = mixing_distance(student, teacher)
    loss.backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), mixing_distance(student.double(), teacher.double()), rtol=1e-6, atol=0)


def test_the_teacher_gets_no_gradient(matrices):
    student, teacher, _ = matrices
    mixing_distance(student.requires_grad_(), teacher.requires_grad_()).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1, 1], [4, 4, 2, 3, 3, 3]]])
def test_attention_equals_the_loops(documents, window, softcap):
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 2, 2, 6, 4, generator=generator, dtype=torch.float64)
    document = None if documents is None else torch.tensor(documents)
    got = attention_matrix(q, k, scaling=0.7, document_BT=document, window=window, softcap=softcap)
    torch.testing.assert_close(got, naive_attention(q, k, 0.7, document, window, softcap))
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, 6, dtype=torch.float64))


def test_attention_gradients_are_those_of_the_values():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    document = torch.tensor([[0, 0, 1, 1]])

    def weights(q: Tensor, k: Tensor) -> Tensor:
        return attention_matrix(q, k, scaling=0.5, document_BT=document, window=2, softcap=3.0)

    assert torch.autograd.gradcheck(weights, (q, k))


def test_attention_is_in_fp32_even_under_autocast():
    q, k = torch.randn(2, 1, 2, 4, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = attention_matrix(q.double(), k.double(), scaling=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_matrix(q, k, scaling=1.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_attention_stays_finite_at_extreme_scores():
    q, k = torch.randn(2, 1, 1, 4, 8, generator=torch.Generator().manual_seed(4)) * 1e4
    q.requires_grad_()
    weights = attention_matrix(q, k, scaling=1.0)
    weights.square().sum().backward()
    assert weights.isfinite().all()
    assert q.grad.isfinite().all()


def test_attention_equals_hugging_faces_eager_attention():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    seen = {}
    attention = model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    ids = torch.randint(32, (2, 9))
    with torch.no_grad():
        expected = model(ids, output_attentions=True, use_cache=False).attentions[0]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

        shape = (2, 9, -1, attention.head_dim)
        q = attention.q_proj(seen["hidden_states"]).view(shape).transpose(1, 2)
        k = attention.k_proj(seen["hidden_states"]).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *seen["position_embeddings"])
        got = attention_matrix(q, repeat_kv(k, 2), scaling=attention.scaling)
    torch.testing.assert_close(got, expected)
