"""Evaluation against naive loops: every document alone, in fp64, one position at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from distill import evaluation
from distill.errors import UserError
from distill.evaluation import (
    Metrics,
    evaluate,
    layer_distances,
    perplexity,
    perplexity_ratio,
    recovered_share,
)

VOCABULARY = 61
BLOCK = 12
# Documents as they are cut by blocks of 12: inside a block, across two blocks, and padding at the end of the last.
DOCUMENTS = [[5, 7, 1, 30, 2], [9, 3, 60, 41, 8, 8, 17, 20, 11], [4], [50, 22, 33], [12, 13, 14]]


def tiny_llama(seed: int, *, vocabulary: int = VOCABULARY, layers: int = 3) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def cut() -> list[list[list[int]]]:
    """The pieces of documents in each block."""
    blocks: list[list[list[int]]] = [[]]
    for document in DOCUMENTS:
        rest = document
        while rest:
            room = BLOCK - sum(map(len, blocks[-1]))
            if not room:
                blocks.append([])
                continue
            blocks[-1].append(rest[:room])
            rest = rest[room:]
    return blocks


def packed(blocks: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    rows: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": [], "valid": []}
    for pieces in blocks:
        padding = BLOCK - sum(map(len, pieces))
        rows["input_ids"].append([token for piece in pieces for token in piece] + [0] * padding)
        rows["position_ids"].append([at for piece in [*pieces, [0] * padding] for at in range(len(piece))])
        rows["labels"].append([x for piece in pieces for x in (-100, *piece[1:])] + [-100] * padding)
        rows["valid"].append([1] * (BLOCK - padding) + [0] * padding)
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return batch | {"valid": batch["valid"].bool()}


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    blocks = cut()
    assert len(blocks) == 2
    batches = [packed(blocks[:1]), packed(blocks[1:])]
    assert not batches[1]["valid"].all(), "the last block is padded"
    return batches


@pytest.fixture
def teacher() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture
def student() -> LlamaForCausalLM:
    """The teacher with noise on its weights: near enough to agree on some tokens."""
    student = tiny_llama(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


@torch.no_grad()
def naive(student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> Metrics:
    """Every piece of a document forwarded alone in fp64."""
    student, teacher = student.double(), teacher.double()
    losses, teacher_losses, divergences, agreed = [], [], [], []
    for piece in (piece for pieces in cut() for piece in pieces):
        ids = torch.tensor([piece])
        ours, theirs = student(ids, use_cache=False).logits[0], teacher(ids, use_cache=False).logits[0]
        for at in range(len(piece) - 1):
            losses.append(F.cross_entropy(ours[at], ids[0, at + 1]).item())
            teacher_losses.append(F.cross_entropy(theirs[at], ids[0, at + 1]).item())
            p, q = theirs[at].softmax(-1), ours[at].softmax(-1)
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            agreed.append(int(p.argmax()) == int(q.argmax()))
    n = len(losses)
    loss = sum(losses) / n
    return Metrics(loss, math.exp(loss), n, sum(teacher_losses) / n, sum(divergences) / n, sum(agreed) / n)


def assert_same(got: Metrics, expected: Metrics, rel: float) -> None:
    assert got.tokens == expected.tokens
    for name in ("loss", "perplexity", "teacher_loss", "kl", "agreement"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=rel), name


def test_metrics_equal_naive_loops_over_lone_documents(student, teacher, batches):
    got = evaluate(student, teacher, batches)
    expected = naive(student, teacher)
    assert 0 < expected.agreement < 1, "or the test could not tell agreement from a constant"
    assert_same(got, expected, rel=2e-6)


def test_batching_changes_nothing(student, teacher, batches):
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert_same(evaluate(student, teacher, [together]), evaluate(student, teacher, batches), rel=1e-6)


def test_no_slice_is_larger_than_allowed_and_slicing_changes_nothing(student, teacher, batches, monkeypatch):
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    whole = evaluate(student, teacher, [together])
    sizes, rows = [], []

    def spy(logits, dim):
        sizes.append(logits.numel())
        return logits.log_softmax(dim)

    monkeypatch.setattr(evaluation, "log_softmax", spy)
    monkeypatch.setattr(evaluation, "chunk_rows", lambda vocabulary: 3)
    monkeypatch.setattr(evaluation, "FORWARD", BLOCK * 2 * 4 * student.config.hidden_size + 1)
    student.get_decoder().register_forward_hook(lambda _module, _args, out: rows.append(len(out.last_hidden_state)))
    assert_same(evaluate(student, teacher, [together]), whole, rel=1e-6)
    assert max(sizes) == 3 * VOCABULARY
    assert rows == [1, 1, 1]  # the first to try the head


def test_half_precision_logits_are_scored_in_fp32(student, teacher, batches):
    student, teacher = student.bfloat16(), teacher.bfloat16()
    losses, divergences = [], []
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            ours, theirs = (m(**inputs, use_cache=False).logits.double() for m in (student, teacher))
            scored = batch["labels"][:, 1:] != -100
            p, q = theirs[:, :-1][scored].log_softmax(-1), ours[:, :-1][scored].log_softmax(-1)
            losses += F.cross_entropy(ours[:, :-1][scored], batch["labels"][:, 1:][scored], reduction="none").tolist()
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
    got = evaluate(student, teacher, batches)
    assert got.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert got.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-6)


def test_a_model_is_its_own_perfect_student(teacher, batches):
    forwards = []
    teacher.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    metrics = evaluate(teacher, teacher, batches)
    assert metrics.kl == 0
    assert metrics.agreement == 1
    assert metrics.loss == metrics.teacher_loss
    assert len(forwards) == len(batches) + 1, "one forward does for both, and one tries the head"


def test_a_copy_of_the_teacher_is_as_good(teacher, batches):
    metrics = evaluate(tiny_llama(0), teacher, batches)
    assert (metrics.kl, metrics.agreement) == (0, 1)


def test_without_a_teacher_only_the_text_is_scored(student, teacher, batches):
    metrics = evaluate(student, None, batches)
    assert metrics == Metrics(metrics.loss, metrics.perplexity, metrics.tokens)
    assert metrics.loss == evaluate(student, teacher, batches).loss


class FixedLogits(LlamaForCausalLM):
    """Predicts the same distribution everywhere."""

    logits_V: torch.Tensor

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.logits_V.expand(*input_ids.shape, -1))


def fixed(logits: list[float]) -> FixedLogits:
    model = FixedLogits(tiny_llama(0, vocabulary=len(logits)).config)
    model.logits_V = torch.tensor(logits)
    return model


def one_document(tokens: list[int]) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor([tokens])
    labels = torch.where(torch.arange(len(tokens)) == 0, -100, ids)
    valid = torch.ones_like(ids, dtype=torch.bool)
    return [{"input_ids": ids, "position_ids": torch.arange(len(tokens))[None], "labels": labels, "valid": valid}]


def test_tokens_that_are_ruled_out_do_not_spoil_the_divergence():
    student = fixed([0.0, math.log(3.0), -math.inf])
    teacher = fixed([0.0, 0.0, -math.inf])
    metrics = evaluate(student, teacher, one_document([0, 1, 1]))
    assert metrics.kl == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert evaluate(teacher, fixed([0.0, 0.0, 0.0]), one_document([0, 1, 1])).kl == math.inf


def test_a_broken_student_is_not_hidden():
    metrics = evaluate(fixed([math.nan, 0.0]), fixed([0.0, 0.0]), one_document([0, 1]))
    assert math.isnan(metrics.loss)
    assert math.isnan(metrics.kl)


def test_models_are_called_without_cache_and_mask_in_eval_mode(student, teacher, batches):
    calls = []

    def spy(module, _args, kwargs):
        calls.append((module.training, torch.is_grad_enabled(), kwargs))

    student.get_decoder().register_forward_pre_hook(spy, with_kwargs=True)
    evaluate(student.train(), teacher, batches)
    layer_distances(student.train(), teacher, batches)
    assert len(calls) == 2 * len(batches) + 1  # once to try the head
    for training, grad, kwargs in calls:
        assert not training
        assert not grad
        assert kwargs["use_cache"] is False
        assert kwargs.get("attention_mask") is None
        assert kwargs["position_ids"] is not None


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_own_mode_back(student, teacher, batches, fails):
    student.train()
    frozen = student.get_decoder().layers[1].mlp
    frozen.eval()
    teacher.eval()
    if fails:
        student.get_decoder().layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(student, teacher, batches)
    else:
        evaluate(student, teacher, batches)
    assert student.training
    assert student.get_decoder().layers[1].self_attn.training
    assert not any(module.training for module in [*frozen.modules(), *teacher.modules()])


def test_processes_add_up_their_shares(student, teacher, batches):
    shares = []
    for batch in batches:
        evaluate(student, teacher, [batch], reduce=lambda sums: shares.append(sums.clone()) or sums)
    got = evaluate(student, teacher, batches[:1], reduce=lambda sums: sums + shares[1])
    assert_same(got, evaluate(student, teacher, batches), rel=1e-12)


def test_nothing_to_score_is_said(student, teacher):
    with pytest.raises(UserError, match="no token to score"):
        evaluate(student, teacher, one_document([3]))
    with pytest.raises(UserError, match="no token to score"):
        evaluate(student, teacher, [])


def test_two_vocabularies_are_refused(teacher, batches):
    with pytest.raises(UserError, match="predicts 70 tokens and the teacher 61"):
        evaluate(tiny_llama(1, vocabulary=70), teacher, batches)


@torch.no_grad()
def naive_distances(student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> list[float]:
    """Documents alone, in fp64, the final norm taken out so that the last hidden state is a layer's output."""
    per_layer: list[list[float]] = [[] for _ in student.model.layers]
    for model in (student, teacher):
        model.double().model.norm = nn.Identity()
    for piece in (piece for pieces in cut() for piece in pieces):
        ids = torch.tensor([piece])
        ours, theirs = (
            m(ids, use_cache=False, output_hidden_states=True).hidden_states[1:] for m in (student, teacher)
        )
        for layer, (a_1TD, b_1TD) in enumerate(zip(ours, theirs, strict=True)):
            for a_D, b_D in zip(a_1TD[0], b_1TD[0], strict=True):
                per_layer[layer].append((torch.linalg.norm(a_D - b_D) / torch.linalg.norm(b_D)).item())
    return [sum(values) / len(values) for values in per_layer]


def test_layer_distances_equal_naive_loops(student, teacher, batches, monkeypatch):
    got = layer_distances(student, teacher, batches)
    assert not any(layer._forward_hooks for model in (student, teacher) for layer in model.model.layers)
    monkeypatch.setattr(evaluation, "FORWARD", 1)
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert layer_distances(student, teacher, [together]) == pytest.approx(got, rel=1e-6)
    assert got == pytest.approx(naive_distances(student, teacher), rel=2e-6)


def test_layers_before_a_change_are_at_distance_zero(teacher, batches):
    student = tiny_llama(0)
    nn.init.zeros_(student.model.layers[1].self_attn.o_proj.weight)
    first, *later = layer_distances(student, teacher, batches)
    assert first == 0
    assert all(distance > 0.01 for distance in later)


def test_models_of_different_depth_are_refused(teacher, batches):
    with pytest.raises(UserError, match="has 2 layers and the teacher 3"):
        layer_distances(tiny_llama(1, layers=2), teacher, batches)


@pytest.mark.parametrize(
    ("teacher_loss", "start", "now", "share"),
    [
        (1.0, 3.0, 3.0, 0.0),
        (1.0, 3.0, 1.0, 1.0),
        (1.0, 3.0, 1.5, 0.75),
        (1.0, 3.0, 0.8, 1.1),
        (1.0, 3.0, 4.0, -0.5),
        (1.0, 1.00001, 1.0, None),
        (1.0, 0.9, 0.8, None),
        (1.0, 3.0, math.nan, None),
        (1.0, math.inf, 2.0, None),
    ],
)
def test_recovered_share(teacher_loss, start, now, share):
    assert recovered_share(teacher_loss, start, now) == (share if share is None else pytest.approx(share))


def test_perplexities():
    assert perplexity_ratio(1.0, 1.0 + math.log(1.05)) == pytest.approx(1.05)
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
