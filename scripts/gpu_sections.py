"""What `scripts.gpu_check` runs: one program a section, its options at real and at tiny sizes, and its seconds.

Real sizes are those of the layers of Llama-3.2-1B and Llama-3.1-8B. An 8B model with its optimizer does not fit one
device, so 8B steps have 4 layers; a compiled decoding step has 8, since compiling takes the time that there is.
"""

from dataclasses import dataclass

ONE_B = "--hidden 2048 --heads 32 --kv-heads 8 --intermediate 8192 --vocab 128256"
EIGHT_B = "--hidden 4096 --heads 32 --kv-heads 8 --intermediate 14336 --vocab 128256"
TINY = "--hidden 64 --heads 4 --kv-heads 2 --intermediate 128 --vocab 500"
KERNELS = "-q -rs -n 8 tests/distill/ssd/test_kernels.py tests/distill/ssd/test_mamba_ssm.py"
CONTENDERS = '--only distill --only "transformers, chunk 256" --only "mamba-ssm kernel" --only SDPA'


@dataclass(frozen=True)
class Section:
    """One program.

    Attributes:
        name: what its table is called, and its file of figures.
        module: run with ``-m``.
        real: options at real sizes.
        small: options that take seconds on a CPU; None leaves it out there.
        seconds: after which it is ended; it may take less.
        output: whether it writes its figures to the file that --output names.
        typed: whether it takes a device and a dtype.
    """

    name: str
    module: str
    real: str
    small: str | None
    seconds: int
    output: bool = True
    typed: bool = True


PARITY = (
    Section("kernels", "pytest", KERNELS, None, 300, output=False, typed=False),
    *(
        Section(f"parity: {check}", "scripts.gpu_parity", f"--check {check}", f"--check {check}", 300, typed=False)
        for check in ("scans", "mixing", "logits", "mixers", "decoding")
    ),
    Section("programs", "scripts.gpu_programs", "", "--tokens 4K", 300, typed=False),
)
"""All at once. Triton takes a minute or two to compile and choose among the variants of a kernel."""
BENCHMARKS = (
    Section("ceilings", "scripts.ceilings", "", "--size 256 --mebibytes 16 --repeats 2", 30),
    Section(
        "decoding 1B",
        "scripts.bench_decode",
        f"{ONE_B} --layers 16 --context 4096 --context 131072 --steps 16 --blocks 3 --memory 60",
        f"{TINY} --layers 8 --context 128 --steps 1 --blocks 1",
        100,
    ),
    Section(
        "steps 1B",
        "scripts.bench_steps",
        f"{ONE_B} --layers 16 --length 2048 --batch 4",
        f"{TINY} --layers 4 --length 64 --batch 2 --repeats 1",
        70,
    ),
    Section(
        "logits 1B",
        "scripts.bench_logits",
        "--vocabulary 128K --tokens 8192 --hidden 2048",
        "--vocabulary 1K --tokens 64 --hidden 32 --repeats 1 --without liger",
        60,
    ),
    Section("mixing", "scripts.bench_mixing", "--lengths 2048,4096", "--lengths 64 --repeats 1", 60),
    Section(
        "scan 1B",
        "scripts.bench_scan",
        f"--heads 32 --head-dim 64 --state-dim 64 --lengths 2048 --lengths 16384 --no-memory {CONTENDERS}",
        "--heads 2 --head-dim 16 --state-dim 16 --lengths 64 --repeats 1 --no-memory --only distill --only SDPA",
        90,
    ),
    Section(
        "decoding 8B",
        "scripts.bench_decode",
        f"{EIGHT_B} --layers 8 --context 131072 --batch 4 --steps 16 --blocks 3 --memory 70",
        None,
        80,
    ),
    Section("steps 8B", "scripts.bench_steps", f"{EIGHT_B} --layers 4 --length 2048 --batch 4", None, 60),
    Section("logits 8B", "scripts.bench_logits", "--vocabulary 128K --tokens 4096 --hidden 4096", None, 50),
    Section(
        "scan 8B",
        "scripts.bench_scan",
        f"--heads 32 --head-dim 128 --state-dim 128 --lengths 2048 --lengths 8192 --no-memory {CONTENDERS}",
        None,
        80,
    ),
    Section(
        "decoding 1B compiled",
        "scripts.bench_decode",
        f"{ONE_B} --layers 8 --context 131072 --steps 16 --blocks 5 --memory 60 --compile",
        None,
        100,
    ),
)
"""The most telling first: who comes last may find no time left."""
