"""What holds of every student, whatever stands in its layers; tests of each kind ask it here."""

import torch
from transformers import DynamicCache, PreTrainedModel

from distill.capture import Batch, layer_traces
from distill.student import mixers_of


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def prompt(*shape: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(3, 97, shape)


def two_documents() -> Batch:
    """Two rows of 30 tokens, whose documents begin at 0 and 12; the second has padding behind."""
    ids = prompt(2, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 25:] = False
    positions = torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids, "valid": valid}


def pieces_agree(student: PreTrainedModel) -> None:
    """A prompt at once, in chunks and token by token through a cache gives what it gives without one."""
    ids = prompt(2, 40)
    expected = student(ids, use_cache=False).logits
    for pieces in ([40], [17, 3, 20], [1] * 40):
        cache, got = DynamicCache(config=student.config), []
        for piece in ids.split(pieces, dim=1):
            got.append(student(piece, past_key_values=cache).logits)
        close(torch.cat(got, dim=1), expected)
        assert cache.get_seq_length() == 40


def layers_alone_agree(student: PreTrainedModel, batch: Batch) -> None:
    """Called without the decoder, a layer hides by itself what its decoder would hide.

    Args:
        batch: two rows of 30 tokens, whose documents begin at 0 and 12.
    """
    whole = batch | {"valid": torch.ones(2, 30, dtype=torch.bool)}
    seen = layer_traces(student, whole, mixers_of(student), ["attention_input", "attention_output"])
    resets = torch.zeros(2, 30, dtype=torch.bool)
    resets[:, [0, 12]] = True
    for index, mixer in mixers_of(student).items():
        trace = seen[index]
        alone, _ = mixer(trace.attention_input, resets_BT=resets, position_embeddings=trace.position_embeddings)
        close(alone, trace.attention_output)
