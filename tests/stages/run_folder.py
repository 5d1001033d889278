"""What a run leaves in its folder, in forms that can be compared."""

import json
from pathlib import Path
from typing import Any

STAGES = ("convert", "mixing", "hidden", "logits")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes by its path, hidden ones included; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def metrics(stage: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what time decides."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
    timed = ("tokens_per_second", "cpu_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def require_same_run(got: Path, expected: Path) -> None:
    """Bitwise the same weights, losses and evaluations after every stage, and nothing left lying about."""
    for stage in STAGES:
        for name in ("model.safetensors", "evaluation.json", "matrices.npz"):
            assert (got / stage / name).read_bytes() == (expected / stage / name).read_bytes(), f"{stage}/{name}"
        if stage != "convert":
            assert metrics(got / stage) == metrics(expected / stage)
    assert contents(got).keys() == contents(expected).keys()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
