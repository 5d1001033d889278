"""A recipe's run before it runs: which layers change, how large everything is, what each stage takes."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distill.checks import RecipeFacts
from distill.conversion import CONTEXTS, Report, empty_model, report
from distill.conversion import plan as plan_student
from distill.costs import Memory, flops_per_token, kept_for_backward, memory, sizes_of
from distill.data.pack import MANIFEST, Blocks
from distill.recipe import Recipe, StageName

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# How often what backward needs is moved: written in the forward, read in the backward, its gradient written.
_PASSES = 3


@dataclass(frozen=True)
class Rates:
    """How fast a machine is.

    Attributes:
        flops: floating-point operations a second in matrix products.
        bytes: bytes a second written by elementwise operations into new tensors.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class StagePlan:
    """One stage, as far as it is known beforehand.

    Attributes:
        tokens: what its steps really take, the recipe's tokens rounded down to whole steps.
        epochs: passes over the training text; None while the text is not prepared.
        flops: floating-point operations, teacher and student.
        seconds: the operations at the measured rate, and the memory traffic at its own; evaluation and start-up
            come on top.
    """

    name: StageName
    tokens: int
    steps: int
    epochs: float | None
    flops: float
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What `distill plan` shows.

    Attributes:
        conversion: layers, parameters by role, state and cache bytes.
        rates: what this machine was measured at, or what was given.
    """

    recipe: Recipe
    conversion: Report
    stages: list[StagePlan]
    rates: Rates
    device: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes, times in seconds."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "layers": self.conversion.layers,
            "parameters": {"teacher": self.conversion.parameters_before, "student": self.conversion.parameters_after},
            "state_bytes": self.conversion.state_bytes,
            "cache_bytes": {
                tokens: dict(zip(("student", "teacher"), self.conversion.cache_bytes(tokens), strict=True))
                for tokens in CONTEXTS
            },
            "stages": [{**asdict(stage), "memory": _with_total(stage.memory)} for stage in self.stages],
            "rates": asdict(self.rates),
            "device": self.device,
        }


def make_plan(
    recipe: Recipe,
    facts: RecipeFacts,
    *,
    training_tokens: int | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Computes the plan of a checked recipe; both models are built without weights.

    Args:
        recipe: the recipe.
        facts: what `distill.checks.check` found.
        training_tokens: tokens of the training text, if it is prepared.
        rates: of this machine; measured for about a second if None.
    """
    teacher = empty_model(facts.config)
    teacher.to(_DTYPES[recipe.teacher.dtype])  # type: ignore[arg-type]  # transformers hides nn.Module's signature
    student = empty_model(
        plan_student(
            facts.config,
            mixer=recipe.student.mixer,
            keep_attention=facts.kept,
            state_dim=recipe.student.state_dim,
            conv_width=recipe.student.conv_width,
        )
    )
    conversion = report(teacher, student)
    block = recipe.data.block
    sizes = sizes_of(student, block, conversion.parameters_before, conversion.parameters_after)
    device = "cuda" if recipe.device != "cpu" and torch.cuda.is_available() else "cpu"
    rates = rates or measure(device, _DTYPES[recipe.dtype], sizes.hidden)
    stages = []
    for name, stage in recipe.stages.named().items():
        steps = facts.steps[name]
        tokens = steps * stage.batch_size * stage.accumulate * block
        flops = tokens * flops_per_token(sizes, stage)
        kept = kept_for_backward(recipe, stage, sizes, student)
        traffic = _PASSES * kept.in_all * steps * stage.accumulate
        stages.append(
            StagePlan(
                name=name,
                tokens=tokens,
                steps=steps,
                epochs=tokens / training_tokens if training_tokens else None,
                flops=flops,
                seconds=flops / rates.flops + traffic / rates.bytes,
                memory=memory(recipe, stage, sizes, kept),
            )
        )
    return Plan(recipe, conversion, stages, rates, device)


def prepared_tokens(recipe: Recipe) -> int | None:
    """Tokens of the training text, if an earlier run has prepared it."""
    folder = recipe.run_dir / "data"
    return Blocks(folder, "train", recipe.data.block).n_tokens if (folder / MANIFEST).is_file() else None


def measure(device: str, dtype: torch.dtype, hidden: int, seconds: float = 1.0) -> Rates:
    """The rates of (2048, D) × (D, 4 D) products, which are a layer's largest, and of 64 MiB elementwise ones."""
    x = torch.randn(2048, hidden, device=device, dtype=dtype)
    w = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    long = torch.randn(2**24, device=device)
    return Rates(
        flops=2 * x.numel() * w.shape[1] * _per_second(lambda: x @ w, device, seconds / 2),
        bytes=long.nbytes * _per_second(lambda: long * long, device, seconds / 2),
    )


def _per_second(call: Callable[[], object], device: str, seconds: float) -> float:
    for _ in range(3):  # the first ones pay for start-up
        call()
    _wait(device)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or not calls:
        for _ in range(5):
            call()
        calls += 5
        _wait(device)
    return calls / passed


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _with_total(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "total": memory.total}
