"""DeepSpeed ZeRO 1, 2 and 3: the optimizer's states in shards, then the gradients too, then the weights too.

Weights, gradients and states are fp32, as everywhere in this project; bfloat16 is the recipe's autocast. On a CPU
DeepSpeed talks through gloo, and its compiled shared-memory transport is left out.
"""

import errno
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from distill.decoder import layers_of
from distill.engines import processes
from distill.engines.engine import Groups, Parts
from distill.engines.joint import detached, joint, total
from distill.errors import UserError
from distill.within import through, whole_shape

TAG = "zero"
_NO_SPACE = 2**20  # bytes; what is left of a disk that a write has failed on


class ZeroEngine:
    """See ``Engine``."""

    def __init__(
        self,
        student: nn.Module,
        groups: Groups,
        *,
        layerwise: bool,
        config: dict[str, Any],
        accumulate: int,
        clip: float | None,
    ) -> None:
        self.student, self.layerwise = student, layerwise
        self.data_rank, self.data_ranks = processes.rank(), processes.world()
        self.clip = clip
        told = _config(config, student) | {"gradient_accumulation_steps": accumulate, "gradient_clipping": clip or 0.0}
        self.engine, self.optimizer = _initialize(student, told, AdamW([dict(group) for group in groups]))

    def backward(self, parts: Parts, scale: float, *, last: bool) -> dict[str, Tensor]:
        # DeepSpeed averages over processes; micro-batches are already part of the scale.
        # Told and not counted: a step that was given up halfway would leave its own count of micro-batches off.
        self.engine.set_gradient_accumulation_boundary(last)
        losses = through(self.engine, self.student, joint, parts, recompute=self.layerwise)
        self.engine.backward(total(losses, scale * self.data_ranks), scale_wrt_gas=False)
        return detached(losses)

    def step(self, clip: float | None) -> float:
        assert clip == self.clip, "DeepSpeed clips at what it was initialised with"
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def forget(self) -> None:
        self.engine.zero_grad()

    def settle(self) -> None:
        """Every share is up to date after each step; weights fetched ahead for a pass that never came go back."""
        self.engine.empty_partition_cache()

    def close(self) -> None:
        self.engine.destroy()
        _forget_what_was_fetched()

    def save(self, folder: Path) -> None:
        with _failing_at_the_end(self.engine, folder):
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self._require_readable(folder)
        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)

    def _require_readable(self, folder: Path) -> None:
        """DeepSpeed reads only what it wrote, with weights cut up as now, on as many processes."""
        shards = len(list((folder / TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        if not shards:
            raise UserError(
                f"{folder} was not written by DeepSpeed, which reads its own checkpoints only; go on with ddp.yaml,"
                " fsdp2.yaml or one process, whichever wrote it"
            )
        cut_up = not (folder / TAG / "mp_rank_00_model_states.pt").is_file()
        if cut_up != (self.engine.zero_optimization_stage() == 3):
            wrote = "zero3.yaml" if cut_up else "zero1.yaml or zero2.yaml"
            raise UserError(f"{folder} was written by another stage of ZeRO; go on with {wrote}")
        if shards != processes.world():
            raise UserError(
                f"{folder} was written by DeepSpeed on {shards} processes and this run has {processes.world()};"
                " launch as many as before"
            )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights in fp32 that ``ZeroEngine.save`` wrote, whole, on the CPU, without any processes."""
    library()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it tells its progress there
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), TAG, exclude_frozen_parameters=True)


def partition(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Split the weights of ``model`` over all processes, in place; they are the main process's (ZeRO-3)."""
    deepspeed = library()
    deepspeed.zero.Init(module=model, config_dict_or_path=_config(config, model), dtype=model.dtype)


def serve(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Let a frozen, partitioned ``model`` gather each module's weights when it runs (ZeRO-3)."""
    told = _config(config, model)
    if model.dtype == torch.bfloat16:
        told["bf16"] = {"enabled": True}
    engine, _ = _initialize(model, told, None)
    model.__dict__["_zero_engine"] = engine  # as long as the model lives, and no part of its module tree


@contextmanager
def whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, partitioned parameters are whole on every process (ZeRO-3); changes are lost."""
    with library().zero.GatheredParameters(parameters):
        yield


@contextmanager
def _failing_at_the_end(engine: Any, folder: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is no error yet: DeepSpeed would leave the other processes waiting.

    Raises:
        OSError: the disk is full. torch's writer of zip files does not say so.
    """
    write, failures = engine.checkpoint_engine.save, []

    def attempt(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    (folder / TAG).mkdir(parents=True, exist_ok=True)
    engine.checkpoint_engine.save = attempt
    engine._copy_recovery_script = lambda folder: None  # zero_to_fp32.py, which ``read_weights`` calls where it is
    try:
        yield
    finally:
        engine.checkpoint_engine.save = write
    if failures and shutil.disk_usage(folder).free < _NO_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from failures[0]
    if failures:
        raise failures[0]


def _initialize(model: nn.Module, config: dict[str, Any], optimizer: AdamW | None) -> tuple[Any, Any]:
    engine, optimizer, _, _ = library().initialize(model=model, optimizer=optimizer, config=config)
    _leave_to_its_holder(model)
    return engine, optimizer


def _forget_what_was_fetched() -> None:
    """Empty ZeRO-3's cache of which weights go after a module: it belongs to the class and holds the modules.

    It is an ``lru_cache`` inside another decorator, which has it in its closure only.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def _leave_to_its_holder(model: nn.Module) -> None:
    """Take ``model`` off the list of modules whose forward is running, where ZeRO-3 puts every root for good.

    It would live as long as the process. Once a forward runs, hooks put what runs on the list and take it off again.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not model]


def _config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's config: the launch config's, less what the recipe decides.

    Unless the launch config says how much, buffers hold one decoder layer and two layers' weights are whole at a time;
    DeepSpeed's own numbers, half a billion and more, would be gigabytes that a model of a few layers has no use for.
    """
    layer = max(whole_shape(parameter).numel() for parameter in model.parameters())
    layer = max(layer, *(_numel(each) for each in _decoder_layers(model)))
    sizes = {
        "reduce_bucket_size": layer,
        "allgather_bucket_size": layer,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": layer,
    }
    zero = {key: value for key, value in config["zero_optimization"].items() if value not in ("none", None)}
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") in ("none", None):
            zero.pop(part, None)
    return {
        "zero_optimization": sizes | zero,
        "train_micro_batch_size_per_gpu": 1,  # the loop makes the batches
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves where DeepSpeed's cannot be compiled
        "steps_per_print": math.inf,
    }


def _decoder_layers(model: Any) -> list[nn.Module]:
    return list(layers_of(model))


def _numel(module: nn.Module) -> int:
    return sum(whole_shape(parameter).numel() for parameter in module.parameters())


def library() -> Any:
    """DeepSpeed, imported so that it works on this machine; it does not have to be installed otherwise."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    # It calls torch by names that a later torch will drop, and would say so at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        # It would be compiled with g++ at the first start, for minutes; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
