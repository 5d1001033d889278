"""What tests share: the outside material where it lies, and tiny random models of the real families."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.student import mixers_of
from tests.support_table import (  # noqa: F401  (hooks)
    pytest_addoption,
    pytest_configure,
    pytest_runtest_makereport,
)

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = CHECKOUT.parent / "shared"

# Tiny tensors gain nothing from threads, and two of them fighting for a core lose much.
torch.set_num_threads(1)

# Under nohup or a shell's & signals are ignored, which processes inherit and runs respect. A handler that does nothing
# is as good here, and is not inherited.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda _number, _frame: None)


def outside(path: str) -> Path:
    """A file or folder that lies beside the checkout and is never part of it; skips where it is not there."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not beside this checkout (looked for ../shared/{path})")
    return found


@pytest.fixture(scope="session")
def stories_teacher() -> Path:
    """The public 260K-parameter TinyStories Llama, with GQA 8:4 and its own tokenizer."""
    return outside("teachers/stories260K")


@pytest.fixture(scope="session")
def stories_text() -> Path:
    return outside("text/tinystories.txt")


@pytest.fixture(scope="session")
def stdlib_teacher() -> Path:
    """The teacher this repository ships."""
    return CHECKOUT / "teachers" / "stdlib-1m"


# Four query heads over two key/value heads; Mistral's heads are wider than hidden / heads; Qwen2 has q, k, v biases.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=12, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random teacher whose every parameter is away from its initial value, biases and norms included."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def disturbed(student: PreTrainedModel, by: float = 0.1) -> PreTrainedModel:
    """The same, its mixers as if trained: what starts at zero is not zero."""
    torch.manual_seed(6)
    with torch.no_grad():
        for mixer in mixers_of(student).values():
            for parameter in mixer.parameters():
                parameter.add_(by * torch.randn_like(parameter))
    return student


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return tiny
