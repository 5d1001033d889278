"""The machine a plan is for: this one as measured, or accelerators by their data sheets."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill.errors import UserError
from distill.units import read_count, read_size

FITS = 0.9
"""The part of a device's memory that a plan may fill; the rest is the CUDA context's, NCCL's and fragmentation's."""

UTILISATION = 0.4
"""The part of a data sheet's peaks that training is taken to achieve: an assumption, not a measurement."""

BANDWIDTH = 200e9
"""Bytes a second that a device is taken to send to its peers unless told otherwise."""


class Accelerator(NamedTuple):
    """What a data sheet says.

    Attributes:
        memory: GiB, as PyTorch reports it.
        bfloat16: peak of dense matrix products in bfloat16, 10¹² operations a second.
        float32: the same in full float32.
        terabytes: peak of the memory, 10¹² bytes a second.
    """

    memory: float
    bfloat16: float
    float32: float
    terabytes: float


ACCELERATORS = {
    "a100": Accelerator(79, 312, 19.5, 2.0),
    "h100": Accelerator(79, 989, 67, 3.35),
    "h200": Accelerator(139, 989, 67, 4.8),
    "b200": Accelerator(178, 2250, 80, 8.0),
    "mi300x": Accelerator(191, 1307, 163, 5.3),
    "l40s": Accelerator(44, 362, 92, 0.86),
    "rtx4090": Accelerator(23.5, 165, 83, 1.0),
}
# Operations a second for each byte a second written, where only the operations are known: what the rows above have.
_FLOPS_PER_BYTE = 500


@dataclass(frozen=True)
class Rates:
    """How fast a device is.

    Attributes:
        flops: floating-point operations a second in matrix products.
        bytes: bytes a second written by elementwise operations into new tensors.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Machine:
    """Devices that train together, one process on each.

    Attributes:
        name: of a device.
        memory: bytes of a device; None where it is not known, then everything fits.
        rates: of one device.
        origin: where the rates come from, for people.
        bandwidth: bytes a second that a device sends to its peers.
        price: of a device-hour, in any currency; None if not given.
    """

    name: str
    devices: int
    memory: float | None
    rates: Rates
    origin: str
    bandwidth: float
    price: float | None

    def fits(self, n_bytes: float) -> bool:
        return self.memory is None or n_bytes <= FITS * self.memory


@dataclass(frozen=True)
class Wanted:
    """The machine as it was asked for; what is None is found out or assumed.

    Attributes:
        device: a key of `ACCELERATORS`.
        memory: bytes of a device.
        flops: operations a second that a device achieves.
        price: of a device-hour, in any currency.
        bandwidth: bytes a second that a device sends to its peers.
    """

    devices: int | None = None
    device: str | None = None
    memory: float | None = None
    flops: float | None = None
    price: float | None = None
    bandwidth: float = BANDWIDTH

    @property
    def nothing(self) -> bool:
        """Whether the plan is for one process on this machine, whatever it is."""
        return self == Wanted()


def wanted(
    devices: int | None,
    device: str | None,
    device_memory: str | None,
    flops: str | None,
    bandwidth: float,
    price: float | None,
) -> Wanted:
    """Reads the options of `distill plan`; the bandwidth is in GB a second.

    Raises:
        UserError: one of them cannot be read, or the accelerator is not known.
    """
    if device is not None and device not in ACCELERATORS:
        raise UserError(
            f"--device is {device!r}; known are {', '.join(ACCELERATORS)}. For another give --device-memory and --flops"
        )
    return Wanted(
        devices=devices,
        device=device,
        memory=_option("--device-memory", device_memory, read_size, "bytes with a unit, such as 80GB or 79GiB"),
        flops=_option("--flops", flops, read_count, "operations a second, such as 400T"),
        bandwidth=bandwidth * 1e9,
        price=price,
    )


def _option(name: str, text: str | None, read: Callable[[str], float], form: str) -> float | None:
    try:
        return None if text is None else read(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}; give {form}") from None


def machine(wanted: Wanted, dtype: str, hidden: int, *, cpu: bool) -> Machine:
    """The machine to plan for; its rates are measured here, for about a second, unless it is named or they are given.

    Args:
        dtype: the recipe's.
        hidden: D, which decides how large the measured products are.
        cpu: whether the recipe asks for the CPU though there is a GPU.
    """
    if wanted.device is not None:
        name, (memory, rates) = wanted.device, _by_data_sheet(wanted.device, dtype)
        origin = f"(taken to be {UTILISATION:.0%} of the data sheet)"
    elif wanted.flops is not None:
        name, memory, rates, origin = "device", None, Rates(wanted.flops, wanted.flops / _FLOPS_PER_BYTE), "(as given)"
    else:
        name = "cuda" if not cpu and torch.cuda.is_available() else "cpu"
        memory = torch.cuda.get_device_properties(0).total_memory if name == "cuda" else None
        rates, origin = measure(name, getattr(torch, dtype), hidden), f"as just measured on {name}"
    if wanted.device is not None and wanted.flops is not None:
        rates, origin = Rates(wanted.flops, rates.bytes), "(operations as given)"
    return Machine(
        name=name,
        devices=wanted.devices or 1,
        memory=wanted.memory or memory,
        rates=rates,
        origin=origin,
        bandwidth=wanted.bandwidth,
        price=wanted.price,
    )


def _by_data_sheet(name: str, dtype: str) -> tuple[float, Rates]:
    sheet = ACCELERATORS[name]
    peak = sheet.bfloat16 if dtype == "bfloat16" else sheet.float32
    # An elementwise operation reads as much as it writes.
    return sheet.memory * 2**30, Rates(peak * 1e12 * UTILISATION, sheet.terabytes * 1e12 * UTILISATION / 2)


def measure(device: str, dtype: torch.dtype, hidden: int, seconds: float = 1.0) -> Rates:
    """The rates of (2048, D) × (D, 4 D) products, which are a layer's largest, and of 64 MiB elementwise ones."""
    if device == "cpu":
        hidden = min(hidden, 1024)  # larger products take seconds each, at the same rate
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
