"""Losses through the head, chunk by chunk, beside the same losses on whole logits: values, gradients, and sizes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.errors import UserError
from distill.objectives import DIVERGENCES, chunked, logit_loss
from distill.objectives.chunked import Head
from distill.objectives.through_head import logit_loss_through_heads, topk_loss_through_head
from distill.objectives.topk import top_k_and_tail, topk_loss

N, D, V, K = 13, 8, 33, 7
CHUNKS = [1, 5, N, N + 1]

Leaves = dict[str, Tensor]


@pytest.fixture(params=CHUNKS)
def rows(request, monkeypatch) -> int:
    """Chunks of so many rows; most do not divide N."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: request.param)
    return request.param


def leaves(dtype: torch.dtype, *, bias: bool) -> Leaves:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    made = {"hidden": normal(N, D), "weight": normal(V, D)}
    return made | {"bias": normal(V)} if bias else made


def head_of(x: Leaves, scale: float, softcap: float | None) -> Head:
    return Head(x["weight"], x.get("bias"), scale, softcap)


def naive_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """As the families' own forwards write it."""
    logits_NV = linear(hidden_ND, head.weight_VD, head.bias_V) * head.scale
    return logits_NV if head.softcap is None else torch.tanh(logits_NV / head.softcap) * head.softcap


def as_batch(x_NX: Tensor) -> Tensor:
    """(1, N + 1, X): with the last token of a document, which predicts nothing."""
    return torch.cat([x_NX, x_NX.new_zeros(1, *x_NX.shape[1:])])[None]


def labels_of(target_N: Tensor) -> Tensor:
    return torch.cat([target_N.new_zeros(1), target_N])[None]


def value_and_gradients(loss: Tensor, x: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
    # Not 1: backward must scale.
    gradients = torch.autograd.grad(0.7 * loss, list(x.values()))
    return loss.detach(), dict(zip(x, gradients, strict=True))


def require_equal(got: Tensor, expected: Tensor, *, x: Leaves, tolerance: float) -> None:
    loss, gradients = value_and_gradients(got, x)
    wanted_loss, wanted = value_and_gradients(expected, x)
    assert loss.dtype == wanted_loss.dtype
    assert abs(loss - wanted_loss) <= tolerance * abs(wanted_loss)
    for name, gradient in wanted.items():
        assert gradients[name].dtype == x[name].dtype
        assert (gradients[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def teacher(dtype: torch.dtype) -> tuple[Tensor, Head]:
    """Of another width than the student."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=generator).to(dtype), Head(torch.randn(V, 6, generator=generator).to(dtype))


TARGET_N = torch.arange(N) * 5 % V
HEADS = list(itertools.product([False, True], [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)]))


@pytest.mark.parametrize(("bias", "kind"), HEADS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_loss_on_whole_logits(rows, divergence, bias, kind):
    teacher_ND, teacher_head = teacher(torch.float64)
    for temperature, ce_weight in itertools.product([1.0, 2.5], [0.0, 0.3, 1.0]):
        x = leaves(torch.float64, bias=bias)
        head = head_of(x, *kind)
        settings: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
        got = logit_loss_through_heads(x["hidden"], head, teacher_ND, teacher_head, TARGET_N, **settings)
        logits = naive_logits(x["hidden"], head), naive_logits(teacher_ND, teacher_head)
        require_equal(got, logit_loss(*map(as_batch, logits), labels_of(TARGET_N), **settings), x=x, tolerance=1e-10)


@pytest.mark.parametrize(("bias", "kind"), HEADS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_equals_the_loss_on_whole_logits(rows, divergence, bias, kind):
    for k, ce_weight in itertools.product([1, K, V], [0.0, 0.3, 1.0]):
        top = top_k_and_tail(as_batch(naive_logits(*teacher(torch.float64))), k)
        x = leaves(torch.float64, bias=bias)
        head = head_of(x, *kind)
        settings: dict[str, Any] = {"divergence": divergence, "ce_weight": ce_weight}
        got = topk_loss_through_head(x["hidden"], head, *(kept[0, :-1] for kept in top), TARGET_N, **settings)
        whole = topk_loss(as_batch(naive_logits(x["hidden"], head)), *top, labels_of(TARGET_N), **settings)
        require_equal(got, whole, x=x, tolerance=1e-10)


def in_fp64(x: Leaves) -> Leaves:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_is_exact_to_1e_6(rows, divergence):
    """Beside fp64, at logits of the size of 1: the rounding of a logit is an error of its softmax."""
    for temperature, ce_weight in itertools.product([1.0, 2.5], [0.0, 0.3]):
        settings: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "ce_weight": ce_weight}
        x = leaves(torch.float32, bias=True)
        scale = D**-0.5
        head = head_of(x, scale, None)
        got = logit_loss_through_heads(x["hidden"], head, *teacher(torch.float32), TARGET_N, **settings)
        assert got.dtype == torch.float32
        loss, gradients = value_and_gradients(got, x)

        double = in_fp64(x)
        logits = naive_logits(double["hidden"], head_of(double, scale, None)), naive_logits(*teacher(torch.float64))
        exact = logit_loss(*map(as_batch, logits), labels_of(TARGET_N), **settings)
        exact_loss, exact_gradients = value_and_gradients(exact, double)
        assert abs(loss - exact_loss) <= 1e-6 * exact_loss
        for name, gradient in exact_gradients.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


BF16 = 2**-7
"""Two roundings to 8 bits: in products of bfloat16 no two ways of adding up agree to more."""


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_under_autocast_as_the_naive_form_under_autocast(rows, divergence, monkeypatch):
    monkeypatch.setattr(chunked, "VOCABULARY_SLICE", 10)
    x = leaves(torch.float32, bias=True)
    teacher_ND, teacher_head = teacher(torch.bfloat16)
    head = head_of(x, 1.0, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = logit_loss_through_heads(
            x["hidden"], head, teacher_ND, teacher_head, TARGET_N, divergence=divergence, ce_weight=0.3
        )
        logits = naive_logits(x["hidden"], head), naive_logits(teacher_ND, teacher_head)
        whole = logit_loss(*map(as_batch, logits), labels_of(TARGET_N), divergence=divergence, ce_weight=0.3)
    assert got.dtype == torch.float32
    require_equal(got, whole, x=x, tolerance=4 * BF16)


def test_a_teacher_in_fp32_stays_so_under_autocast(rows):
    """It is the one that the recipe names, and that an offline cache holds. The student is fp64, which stays."""
    x = leaves(torch.float64, bias=True)
    head, theirs = head_of(x, 1.0, 5.0), teacher(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = logit_loss_through_heads(x["hidden"], head, *theirs, TARGET_N)
    logits = naive_logits(x["hidden"], head), naive_logits(*theirs).double()
    torch.testing.assert_close(got, logit_loss(*map(as_batch, logits), labels_of(TARGET_N)), rtol=1e-6, atol=0)


def test_products_are_in_16_bits_under_autocast(monkeypatch):
    """Else a GPU would be at a fraction of its speed."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: 5)
    seen = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func):
                seen.update(x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            return func(*args, **(kwargs or {}))

    x = leaves(torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16), Products():
        logit_loss_through_heads(x["hidden"], head_of(x, 1.0, None), *teacher(torch.bfloat16), TARGET_N).backward()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_finite_differences(divergence):
    """Apart from any autograd: the loss along a random direction of all leaves together."""
    x = leaves(torch.float64, bias=True)
    along = {name: torch.randn_like(tensor) for name, tensor in x.items()}

    def loss_at(step: float) -> Tensor:
        moved = {name: tensor + step * along[name] for name, tensor in x.items()}
        head = head_of(moved, 0.5, 3.0)
        settings: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.3}
        return logit_loss_through_heads(moved["hidden"], head, *teacher(torch.float64), TARGET_N, **settings)

    _, gradients = value_and_gradients(loss_at(0), x)
    slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert sum((gradients[name] * along[name]).sum() for name in x) / 0.7 == pytest.approx(float(slope), rel=1e-8)


def test_the_gradient_of_a_tied_head_is_that_of_both_uses():
    x = leaves(torch.float64, bias=False)
    ids_N = torch.arange(N)
    for loss_of in (through_heads, on_whole_logits):
        weight_VD = x["weight"].detach().requires_grad_()
        loss_of(torch.tanh(weight_VD[ids_N]) * 2, Head(weight_VD)).backward()
        x[loss_of.__name__] = weight_VD.grad
    assert torch.allclose(x["through_heads"], x["on_whole_logits"], rtol=1e-10)


def through_heads(hidden_ND: Tensor, head: Head) -> Tensor:
    return logit_loss_through_heads(hidden_ND, head, *teacher(torch.float64), TARGET_N)


def on_whole_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    logits = naive_logits(hidden_ND, head), naive_logits(*teacher(torch.float64))
    return logit_loss(*map(as_batch, logits), labels_of(TARGET_N))


def test_a_second_backward_pass_is_refused():
    x = leaves(torch.float64, bias=False)
    loss = through_heads(x["hidden"], Head(x["weight"]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_go_where_they_are_wanted():
    x = leaves(torch.float64, bias=True)
    frozen = Head(x["weight"].detach(), x["bias"].detach())
    through_heads(x["hidden"], frozen).backward()
    assert x["hidden"].grad is not None
    through_heads(x["hidden"].detach(), Head(x["weight"])).backward()
    assert x["weight"].grad is not None
    assert x["bias"].grad is None


def test_no_position_is_a_loss_of_zero_with_gradients_of_zero():
    """As on a process whose documents are all of one token: its gradients must still travel."""
    x = leaves(torch.float64, bias=True)
    hidden_ND, head = teacher(torch.float64)
    loss = logit_loss_through_heads(x["hidden"][:0], head_of(x, 1.0, None), hidden_ND[:0], head, TARGET_N[:0])
    loss.backward()
    assert loss == 0
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in x.values())


class Sizes(TorchDispatchMode):
    """Keeps the largest tensor that any operation returns, and the number of products."""

    largest, products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), 0)
        self.products += "mm" in str(func)
        return result


ROWS = 4
LOSSES: dict[str, Callable[[Tensor, Head], Tensor]] = {
    **{
        name: lambda hidden_ND, head, name=name: logit_loss_through_heads(
            hidden_ND, head, *teacher(torch.float32), TARGET_N, divergence=name, ce_weight=0.3, temperature=2.0
        )
        for name in DIVERGENCES
    },
    "top k": lambda hidden_ND, head: topk_loss_through_head(
        hidden_ND, head, *(x[0, :-1] for x in top_k_and_tail(as_batch(torch.randn(N, V)), K)), TARGET_N
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_a_chunk(monkeypatch, loss):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: ROWS)
    x = leaves(torch.float32, bias=True)
    top = top_k_and_tail(as_batch(torch.randn(N, V)), K)
    monkeypatch.setitem(
        LOSSES,
        "top k",
        lambda hidden, head: topk_loss_through_head(hidden, head, *(x[0, :-1] for x in top), TARGET_N),
    )
    with Sizes() as sizes:
        LOSSES[loss](x["hidden"], head_of(x, 1.0, 3.0)).backward()
    assert sizes.largest == max(V * D, ROWS * V) < N * V
    # Per chunk: logits of the student, of the teacher where one computes, and two gradients.
    assert sizes.products == -(-N // ROWS) * (3 if loss == "top k" else 4)


def test_without_gradients_only_logits_are_made(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda vocabulary: ROWS)
    x = leaves(torch.float32, bias=True)
    with torch.no_grad(), Sizes() as sizes:
        loss = LOSSES["forward_kl"](x["hidden"], head_of(x, 1.0, None))
    assert not loss.requires_grad
    assert sizes.products == -(-N // ROWS) * 2


def test_a_chunk_has_enough_rows_and_no_more():
    assert [chunked.chunk_rows(vocabulary) for vocabulary in (61, 32_768, 131_072, 262_144, 2**21)] == [
        *(1024, 512),
        *(128, 128, 128),
    ]


def test_what_does_not_belong_together_is_refused():
    x = leaves(torch.float64, bias=False)
    hidden_ND, head = teacher(torch.float64)
    ours = Head(x["weight"])
    for other_ND, other, target_N in [
        (hidden_ND[:-1], head, TARGET_N),
        (hidden_ND, Head(head.weight_VD[:-1]), TARGET_N),
        (hidden_ND, head, TARGET_N[:-1]),
    ]:
        with pytest.raises(ValueError, match="as many tokens at as many positions"):
            logit_loss_through_heads(x["hidden"], ours, other_ND, other, target_N)
    with pytest.raises(UserError, match="temperature"):
        logit_loss_through_heads(x["hidden"], ours, hidden_ND, head, TARGET_N, temperature=0.0)
    top = [x[0, :-1] for x in top_k_and_tail(as_batch(torch.randn(N, V)), K)]
    with pytest.raises(ValueError, match="ids and log_probs"):
        topk_loss_through_head(x["hidden"], ours, top[0][:-1], *top[1:], TARGET_N)
    with pytest.raises(UserError, match="divergence"):
        topk_loss_through_head(x["hidden"], ours, *top, TARGET_N, divergence="hellinger")
