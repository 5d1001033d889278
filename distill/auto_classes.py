"""Which classes of transformers make a model from a config, by kind: text models, and those that read images too."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from distill.vision import FAMILIES, is_vision

_TABLES: dict[Any, Any] = {
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
}


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads a model of this config, student or teacher."""
    return AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM


def auto_classes(model_class: type[PreTrainedModel]) -> list[Any]:
    """Every Auto class that loads a teacher's class, and so its student's."""
    config: Any = model_class.config_class
    return [auto for auto, table in _TABLES.items() if config in table and table[config] is model_class]


def stock_class(model_type: str, config: type[PreTrainedConfig]) -> Any:
    """A teacher's class; None where transformers has none for its config."""
    table = _TABLES[AutoModelForImageTextToText if model_type in FAMILIES else AutoModelForCausalLM]
    return table.get(config, None)
