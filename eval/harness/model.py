"""A student or teacher as lm-evaluation-harness calls its models: ``distill``, beside the harness's own ``hf``.

What is different:

    loading     a folder without some of its weights is refused; ``hf`` would draw them at random
    writing     the checkpoint's own generation settings, such as penalties, have no say (distill.decoding)
    processes   requests are divided under ``accelerate launch`` also on CPUs, where with ``hf`` each answers all
    length      a student of mixers alone reads prompts of any length; ``hf`` cuts them to the positions of its teacher

In rolling likelihoods the windows are as long as the model's positions also then, so that students and teachers get the
same ones. ``register`` makes the name known to the harness, which (0.4.13) does not look for models of other packages.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from distill.decoder import learns_positions
from distill.decoding import plain_settings
from distill.engines import processes
from distill.errors import UserError
from distill.student import reads_any_length
from eval.loading import load_model, load_tokenizer

NAME = "distill"
ANY_LENGTH = 2**30

# What the harness's own class takes beside a model that is already there.
PASSED_ON = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


class DistillLM(HFLM):
    """As the harness makes it: ``--model distill --model_args pretrained=FOLDER,max_length=2048``.

    Args:
        pretrained: a Hugging Face folder, or a hub id.
        tokenizer: another folder's, if not its own.
        device: as ``eval.loading.load_model`` has it, or one of torch's; several processes choose for themselves.
        dtype: of the weights, such as ``bfloat16``; as saved by default.
        max_length: tokens of the longest request, and of the windows of rolling likelihoods. Longer ones lose their
            beginning. By default the model's positions; none for prompts where the model counts no positions.
        trust_remote_code: not needed; accepted, since ``hf`` takes it.
        others: see PASSED_ON.

    Raises:
        UserError: there is no such model, or an argument is not one of these, or positions end before ``max_length``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        _require_known(others)
        here = processes.start("cpu" if device == "cpu" else "auto")
        place = str(here) if processes.world() > 1 else _place(device)
        model: Any = processes.together(lambda: load_model(pretrained, place))
        require_positions(model, max_length)
        if dtype != "auto":
            model = model.to(_dtype(dtype))
        model.generation_config = plain_settings(model)
        super().__init__(
            pretrained=model,
            tokenizer=load_tokenizer(tokenizer or pretrained),
            max_length=max_length,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            **others,
        )
        # HFLM divides requests only for a model that it loads itself, on GPUs, and by these names.
        self.accelerator: Any = _Processes()
        self._rank, self._world_size = processes.rank(), processes.world()
        # To find the largest batch the harness tries requests of this length.
        if max_length is None and not str(batch_size).startswith("auto") and reads_any_length(model):
            self._max_length = ANY_LENGTH

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """In windows of ``max_length``, or of the model's positions."""
        given: Any = self._max_length
        self._max_length = None if given == ANY_LENGTH else given  # type: ignore[assignment]
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._max_length = given


def register() -> None:
    """Make the name known to the harness; again is no harm."""
    register_model(NAME)(DistillLM)


class _Processes:
    """What HFLM asks of an Accelerator, which on CPUs would not see the other processes of a launch for GPUs."""

    def gather(self, tensor: Tensor) -> Tensor:
        """() of every process as (processes,)."""
        return torch.stack(processes.gather(tensor))

    def wait_for_everyone(self) -> None:
        processes.wait()

    def unwrap_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return model


def _require_known(others: dict[str, Any]) -> None:
    unknown = sorted(others.keys() - set(PASSED_ON))
    if unknown:
        allowed = ["pretrained", "tokenizer", "device", "dtype", "max_length", "batch_size", *PASSED_ON]
        raise UserError(
            f"--model_args {', '.join(unknown)}: the model {NAME!r} does not take it. It takes {', '.join(allowed)};"
            " merge an adapter first; a quantised or otherwise changed model runs by --model hf"
        )


def _place(device: str | None) -> str:
    """The harness asks for ``cuda:0`` wherever it runs, unless told otherwise."""
    on_gpu = device is not None and device.startswith("cuda:")
    return "auto" if device is None or (on_gpu and not torch.cuda.is_available()) else device


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"--model_args dtype={name}: give one of torch's, such as float32 or bfloat16, or auto")
    return found


def require_positions(model: PreTrainedModel, max_length: int | None) -> None:
    """Refuse requests that go beyond the positions a model has learned; rotary ones go on."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length and positions and max_length > positions and learns_positions(model):
        raise UserError(
            f"max_length={max_length}: the model has a vector for each of {positions} positions and no more"
        )
