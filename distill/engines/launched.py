"""Which engine the launch config asks for.

``accelerate launch`` tells the processes it starts through environment variables what its config file says; this is
where they are read, by accelerate's own classes. Nothing about engines stands in a recipe.

    one       one process
    ddp       every process holds everything, gradients are averaged
    fsdp2     student, gradients, optimizer and teacher in shards (torch's fully_shard)
    zero1-3   DeepSpeed ZeRO: the optimizer's states in shards; then gradients too; then weights and teacher too
"""

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from distill.engines import processes, zero
from distill.errors import UserError

Kind = Literal["one", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Launched:
    """What was launched.

    Attributes:
        kind: the engine.
        settings: for ZeRO, DeepSpeed's config of the ``zero_optimization`` section and beside it; for FSDP2
            ``reshard_after_forward``; else empty.
    """

    kind: Kind = "one"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds only a part of the weights of student and teacher."""
        return self.kind in ("fsdp2", "zero3")

    @property
    def is_zero(self) -> bool:
        return self.kind.startswith("zero")


def launched() -> Launched:
    """What ``accelerate launch`` asked for, once ``processes.start`` has run.

    Raises:
        UserError: an engine that is not supported, or DeepSpeed is not installed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return _zero()
    if _is_set("ACCELERATE_USE_FSDP"):
        return _fsdp2()
    return Launched("ddp" if processes.world() > 1 else "one")


def _zero() -> Launched:
    try:
        zero.library()
    except ImportError as error:
        raise UserError(
            "the launch config asks for DeepSpeed, which is not installed: pip install 'distill-ssm[deepspeed]', or"
            " take recipes/launch/fsdp2.yaml, which needs nothing more"
        ) from error
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin().deepspeed_config
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"the launch config asks for ZeRO stage {stage}; allowed are 1, 2, 3 (and ddp.yaml for 0)")
    return Launched(f"zero{stage}", config)  # type: ignore[arg-type]


def _fsdp2() -> Launched:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launch config asks for FSDP 1; set fsdp_version: 2, as recipes/launch/fsdp2.yaml does")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError(
            "FSDP2 with offload is not supported; recipes/launch/zero3_offload.yaml keeps states on the host"
        )
    return Launched("fsdp2", {"reshard_after_forward": plugin.reshard_after_forward})


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
