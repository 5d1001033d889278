"""What the offline teacher leaves out: its loss and gradient beside those of the whole vocabulary, on held-out text.

    python -m scripts.bench_offline_teacher recipes/quickstart.yaml evaluation.tokens=16K

For the recipe's teacher and two students (as converted, and the teacher itself with noise on its logits), a table by k:

    full      the mean divergence KL(teacher‖student) over the whole vocabulary
    k + tail  the same over the top k and one outcome for all others: before, and as read back from disk
    plain     over the top k alone, their probabilities scaled up to 1

and the cosine between each one's gradient with respect to the student's logits and that of the full loss. Then a table
of codes for the k log-probabilities, for this teacher and for made-up predictions over 128,256 tokens. All in fp64,
but for what is read back.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill import convert
from distill.convert_stage import conversion_of
from distill.objectives import logit_loss
from distill.objectives.topk import TopK, top_k_and_tail, topk_loss
from distill.run import Run
from distill.teacher_cache import Codec
from stages.command import run_program

KS = (8, 16, 32, 64, 128)
KEPT_K = 64
NOISE = 0.5  # nats on every logit

# Bits of a code c, and the power that turns it into a distance: d = d_max · (c / (2 ** bits − 1)) ** power
CODES = {
    "8 bits, uniform": (8, 1),
    "8 bits, square root": (8, 2),
    "8 bits, cube root": (8, 3),
    "10 bits, uniform": (10, 1),
    "10 bits, square root": (10, 2),
}


def main(run: Run) -> None:
    torch.manual_seed(run.recipe.seed)
    batches = [{name: rows.to(run.device) for name, rows in batch.items()} for batch in run.held_out()]
    teacher_BTV, labels_BT = logits_of(run.teacher, batches), torch.cat([batch["labels"] for batch in batches])
    students = {
        "the student as converted": logits_of(convert(run.teacher, **conversion_of(run)), batches),
        f"the teacher with noise of {NOISE} nats": teacher_BTV + NOISE * torch.randn_like(teacher_BTV),
    }
    print(
        f"{run.recipe.teacher.path}: {labels_BT.numel():,} held-out tokens, vocabulary of {teacher_BTV.shape[-1]:,}\n"
    )
    for name, student_BTV in students.items():
        print(f"KL to {name}:\n")
        print_table(by_k(teacher_BTV, student_BTV, labels_BT))
    print(f"Codes at k = {KEPT_K}, {run.recipe.teacher.path}:\n")
    print_table(by_code(teacher_BTV, students["the student as converted"], labels_BT))
    teacher_BTV = zipf_logits(positions=256, vocabulary=128_256)
    student_BTV = teacher_BTV + NOISE * torch.randn_like(teacher_BTV)
    print(f"Codes at k = {KEPT_K}, made-up predictions over {teacher_BTV.shape[-1]:,} tokens:\n")
    print_table(by_code(teacher_BTV, student_BTV, torch.zeros(teacher_BTV.shape[:2], dtype=torch.long)))


def by_k(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> Iterator[list[str]]:
    """One row a k."""
    yield [
        "k",
        "bytes",
        "teacher's mass",
        "full",
        "k + tail",
        "read back",
        "plain",
        *("cosine: k + tail", "read back", "plain"),
    ]
    full, full_gradient = loss_and_gradient(lambda z: logit_loss(z, teacher_BTV, labels_BT), student_BTV)
    for k in KS:
        codec, top = Codec(teacher_BTV.shape[-1], k), top_k_and_tail(teacher_BTV, k)
        alone = TopK(top.ids_BTK, top.log_probs_BTK.log_softmax(-1), torch.full_like(top.log_tail_BT, -torch.inf))
        versions = [top, read_back(codec, top), alone]
        losses, gradients = zip(
            *(loss_and_gradient(against(cut, labels_BT), student_BTV) for cut in versions),
            strict=True,
        )
        cosines = [cosine_similarity(gradient, full_gradient, dim=0) for gradient in gradients]
        mass = top.log_probs_BTK.exp().sum(-1).mean()
        numbers = [
            f"{mass:.2%}",
            *(f"{loss:.4f}" for loss in (full, *losses)),
            *(f"{cosine:.5f}" for cosine in cosines),
        ]
        yield [str(k), str(codec.record.itemsize), *numbers]


def by_code(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> Iterator[list[str]]:
    """One row a code."""
    yield ["code", "bytes", "KL(teacher‖read back)", "error of the loss", "of log p, rms", "of the gradient"]
    codec, top = Codec(teacher_BTV.shape[-1], KEPT_K), top_k_and_tail(teacher_BTV, KEPT_K)
    fixed = codec.record.itemsize - KEPT_K
    by_id = top.ids_BTK.argsort(-1)
    top = TopK(top.ids_BTK.gather(-1, by_id), top.log_probs_BTK.gather(-1, by_id), top.log_tail_BT)
    half = TopK(top.ids_BTK, top.log_probs_BTK.half(), top.log_tail_BT.half())
    versions = {name: (fixed + KEPT_K * bits // 8, coded(top, bits, power)) for name, (bits, power) in CODES.items()}
    versions |= {
        "float16": (fixed - 2 + 2 * KEPT_K, half),
        "as written": (codec.record.itemsize, read_back(codec, top)),
    }
    loss, gradient = loss_and_gradient(against(top, labels_BT), student_BTV)
    for name, (n_bytes, cut) in versions.items():
        other, other_gradient = loss_and_gradient(against(cut, labels_BT), student_BTV)
        distance_BTK = top.log_probs_BTK - cut.log_probs_BTK
        tail_BT = top.log_tail_BT.exp() * (top.log_tail_BT - cut.log_tail_BT)
        kl = ((top.log_probs_BTK.exp() * distance_BTK).sum(-1) + tail_BT).mean()
        share = (other_gradient - gradient).norm() / gradient.norm()
        numbers = [f"{kl:.1e}", f"{other - loss:+.1e}", f"{distance_BTK.square().mean().sqrt():.4f}", f"{share:.2%}"]
        yield [name, str(n_bytes), *numbers]


def coded(top: TopK, bits: int, power: int) -> TopK:
    """``top`` as another code would give it back, its tail and its range untouched."""
    steps = 2**bits - 1
    distance_BTK = top.log_probs_BTK.amax(-1, keepdim=True) - top.log_probs_BTK
    span_BT1 = distance_BTK.amax(-1, keepdim=True).clamp(min=1e-6)
    code_BTK = (steps * (distance_BTK / span_BT1) ** (1 / power)).round()
    kept_BTK = (-span_BT1 * (code_BTK / steps) ** power).log_softmax(-1)
    return top._replace(log_probs_BTK=kept_BTK + top.log_probs_BTK.logsumexp(-1, keepdim=True))


def read_back(codec: Codec, top: TopK) -> TopK:
    return TopK(*(x.to(top.ids_BTK.device) for x in codec.decode(codec.encode(top))))


def zipf_logits(positions: int, vocabulary: int) -> Tensor:
    """(1, positions, V): log-probabilities that fall with the rank's power 0.8 to 2.2, at random among the ids."""
    slope_N1 = 0.8 + 1.4 * torch.rand(positions, 1, dtype=torch.float64)
    rank_NV = torch.rand(positions, vocabulary).argsort(-1) + 1
    return (-slope_N1 * rank_NV.log())[None]


def against(top: TopK, labels_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the student's logits."""
    return lambda student_BTV: topk_loss(student_BTV, *top, labels_BT=labels_BT)


def loss_and_gradient(loss_of: Callable[[Tensor], Tensor], student_BTV: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to all logits, as one vector."""
    leaf_BTV = student_BTV.detach().requires_grad_()
    loss = loss_of(leaf_BTV)
    return loss.detach(), torch.autograd.grad(loss, leaf_BTV)[0].flatten()


@torch.no_grad()
def logits_of(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    def one(batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    return torch.cat([one(batch).double() for batch in batches])


def print_table(rows: Iterator[list[str]]) -> None:
    head = next(rows)
    for row in chain([head, ["---"] * len(head)], rows):
        print(f"| {' | '.join(row)} |", flush=True)
    print()


if __name__ == "__main__":
    run_program(main, "Measure what the offline teacher's top k leave out, on a recipe's teacher and held-out text.")
