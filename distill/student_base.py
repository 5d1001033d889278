"""What every student class adds to its teacher's class: mixers in some layers, and the masks they read.

Apart from ``distill.student``, because a student's folder carries this file (``distill.standalone``): it knows one
student, not the families there are.
"""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from distill.decoder import attention_of, layers_of, replace_attention
from distill.decoder_inputs import mask_for_generate, prepare_inputs_of
from distill.errors import UserError
from distill.layout import mixer_layers, settings_of
from distill.mixers import BESIDE, KINDS


class Student:
    """Stands before a teacher's class in a student class's bases.

    ``config.distill`` holds ``layers`` (one name a layer: ``"attention"`` or a mixer's) and ``mixer`` (the arguments
    the mixers are built with, those of all kinds together); where single heads keep attention beside a mixer, ``heads``
    has what these are built with, by layer, as a string.
    """

    # A state cannot be rolled back, which assisted generation would need: generate refuses it by this flag.
    _is_stateful = True

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_mixers(self, config.distill)  # type: ignore[arg-type]

    @staticmethod
    def create_masks_for_generate(**arguments: Any) -> Any:
        """What ``generate`` passes as mask: the 2-D mask itself, which mixers read, or a mask for one step."""
        return mask_for_generate(arguments)


def install_mixers(model: PreTrainedModel, layout: dict[str, Any]) -> None:
    """Put mixers where the layout says, in place, and let the decoder prepare what they read.

    Raises:
        UserError: the layout names a mixer that there is none of, in a folder's own code: one it was not written for.
    """
    layers, places = layers_of(model), mixer_layers(model.config)
    beside = layout.get("heads", {})
    unknown = {layout["layers"][index] for index in places} - KINDS.keys()
    if unknown:
        raise UserError(
            f"config.json has layers of the kind {', '.join(sorted(unknown))}, and this code has"
            f" {', '.join(sorted(KINDS)) or 'no mixers'}: they are not of one student; export it again"
        )
    for index in places:
        kind = layout["layers"][index]
        made: Any = KINDS[kind]
        if made.of_attention:
            mixer = made(attention_of(layers[index]), layer_idx=index, **settings_of(layout, kind))
        else:
            hidden_size = model.config.get_text_config().hidden_size
            mixer = made(hidden_size=hidden_size, layer_idx=index, **settings_of(layout, kind))
        if str(index) in beside:
            mixer = BESIDE["heads"](mixer, attention_of(layers[index]), **beside[str(index)])
        replace_attention(layers[index], mixer.to(dtype=model.dtype))
    # Also where all attention is kept: whether packed documents stay apart must not depend on the layout.
    prepare_inputs_of(model, {index: attention_of(layers[index]) for index in places})
