"""The table of teachers in docs/export.md says what the refusals say."""

from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill.conversion import plan
from distill.export.facts import facts_of
from distill.export.limits import LIMITS
from distill.export.refusals import refusals
from distill.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "export.md"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
# What published checkpoints have and what is in the way by itself stands in the table's last column.
WITHOUT = {name: {"sliding_window": None} for name in ("mistral", "mixtral")}

# Some are read only inside a model of images and text.
ALONE = sorted(family for family in FAMILIES if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _rows() -> dict[str, list[str]]:
    """The formats' answers by family, of the table that begins with "teacher"."""
    table = PAGE.read_text(encoding="utf-8").partition("| teacher |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {row[0]: row[1:4] for row in rows}


@pytest.mark.parametrize("family", ALONE)
def test_rows_are_true(family: str) -> None:
    config = AutoConfig.for_model(family, **SIZES, **WITHOUT.get(family, {}))
    # The last layer; of SmolLM3, one of those without positions.
    facts = facts_of(plan(config, keep_attention=[3]))
    said = ["no" if refusals(facts, LIMITS[to]) else "yes" for to in ("granite", "bamba", "gguf")]
    assert _rows().get(family, _rows()["every other family"]) == said
