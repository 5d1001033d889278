"""What part a parameter plays, so that a recipe can say which parts a stage trains."""

from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from distill.decoder import attention_of, layers_of
from distill.layout import mixer_layers
from distill.mixers.kept_heads import KeptHeads
from distill.student import is_student
from distill.vision import is_vision

Role = Literal["mixer", "attention", "norms", "mlp", "embeddings", "head", "connector", "vision"]
ROLES: tuple[Role, ...] = get_args(Role)

# What brings image features into the decoder's space: LLaVA, PaliGemma and Gemma 3; Idefics 3 and SmolVLM; Qwen-VL.
_CONNECTORS = ("multi_modal_projector", "connector", "visual.merger")


def roles(model: PreTrainedModel) -> dict[str, Role]:
    """The role of every parameter, by its name in ``model.named_parameters()`` (tied parameters appear once).

    Decided by where a parameter stands, never by a substring of its name: what stands in attention's place is a
    mixer or attention (single heads beside a mixer are attention), what a norm module holds is a norm, what else a
    decoder layer holds belongs to its MLP (experts too), and learned positions are embeddings. Around the decoder of a
    vision-language model stand its connector and its vision tower.
    """
    decoder = model.get_decoder()
    changed = set(mixer_layers(model.config)) if is_student(model) else set()
    by_id: dict[int, Role] = {}

    def mark(module: nn.Module | None, role: Role) -> None:
        for parameter in module.parameters() if module is not None else ():
            by_id.setdefault(id(parameter), role)

    mark(model.get_input_embeddings(), "embeddings")
    mark(model.get_output_embeddings(), "head")
    for module in decoder.modules():
        if isinstance(module, KeptHeads):
            mark(module, "attention")
    for index, layer in enumerate(layers_of(model)):
        mark(attention_of(layer), "mixer" if index in changed else "attention")
    for module in decoder.modules():
        if "Norm" in type(module).__name__:
            mark(module, "norms")
    for layer in layers_of(model):
        mark(layer, "mlp")
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            mark(module, "embeddings")
    if is_vision(model.config):
        for name in _CONNECTORS:
            mark(dict(model.base_model.named_modules()).get(name), "connector")
        mark(model.base_model, "vision")
    unknown = [name for name, parameter in model.named_parameters() if id(parameter) not in by_id]
    assert not unknown, f"parameters without a role: {unknown}"
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}
