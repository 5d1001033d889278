"""Which parameters a stage's loss depends on.

The others must not train. They have no gradient, or one that is always zero, and yet an optimizer would change them:
AdamW decays whatever it is given, and DeepSpeed takes a missing gradient for a zero.

    mixing                   what shapes the mixers' matrices, where these have factors
    hidden, target: mixer    the mixers
    hidden, target: heads    the mixers without their output projection
    hidden, target: block    the layers that have a mixer
    logits                   everything
"""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from distill.decoder import layers_of
from distill.mixers import is_mixer
from distill.recipe import HiddenStage, MixingStage, Stage
from distill.roles import roles
from distill.student import mixers_of


def reached(student: PreTrainedModel, stage: Stage) -> set[str]:
    """Names, as in ``student.named_parameters()``, of the parameters that the stage's loss depends on."""
    if not isinstance(stage, MixingStage | HiddenStage):
        return {name for name, _ in student.named_parameters()}
    mixers = mixers_of(student)
    layers = layers_of(student)
    parameters: Iterable[nn.Parameter]
    if isinstance(stage, MixingStage):
        matched = (mixer for mixer in mixers.values() if is_mixer(mixer) and mixer.without_factors is None)
        parameters = (parameter for mixer in matched for parameter in mixer.matrix_parameters())
    elif stage.target == "mixer":
        parameters = (parameter for mixer in mixers.values() for parameter in mixer.parameters())
    elif stage.target == "heads":
        projections = (mixer.out_proj for mixer in mixers.values() if is_mixer(mixer))
        unread = {id(parameter) for projection in projections for parameter in projection.parameters()}
        every = (parameter for mixer in mixers.values() for parameter in mixer.parameters())
        parameters = (parameter for parameter in every if id(parameter) not in unread)
    else:
        parameters = (parameter for index in mixers for parameter in layers[index].parameters())
    ids = {id(parameter) for parameter in parameters}
    return {name for name, parameter in student.named_parameters() if id(parameter) in ids}


def trained(student: PreTrainedModel, stage: Stage) -> dict[str, nn.Parameter]:
    """What a stage trains: of the roles that it names, what its loss reaches."""
    by_name, within_reach = roles(student), reached(student, stage)
    return {
        name: parameter
        for name, parameter in student.named_parameters()
        if name in within_reach and by_name[name] in stage.train
    }
