"""``rope: keep``: B and C turned as transformers turns keys and queries, however the sequence comes."""

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distill.cache import adopt
from distill.mixers import MIXERS
from distill.mixers.rotary import rotate
from tests.distill.mixers.test_mixers import HEADS, HIDDEN, borders, hidden, make, mixed_and_values

STATE, WIDTH = 8, 6


@pytest.fixture(params=sorted(MIXERS))
def mixer(request) -> nn.Module:
    return make(request.param, state_dim=STATE, rope="keep")


def angles(positions_BT: Tensor, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, T, width), as a decoder makes them from positions."""
    frequency = 0.7 ** torch.arange(width // 2, dtype=torch.float64)
    angle = positions_BT[..., None] * torch.cat([frequency, frequency])
    return angle.cos(), angle.sin()


def counted(length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length).expand(2, -1)


def part(rotation: tuple[Tensor, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    cos, sin = rotation
    return cos[:, start:end], sin[:, start:end]


def test_it_is_transformers_rotation_and_leaves_columns_past_its_width():
    torch.manual_seed(2)
    B, C = torch.randn(2, 2, 9, HEADS, STATE, dtype=torch.float64)
    rotation = angles(torch.randint(0, 50, (2, 9)))  # any positions, as on the axes of an image
    expected = apply_rotary_pos_emb(B[..., :WIDTH], C[..., :WIDTH], *rotation, unsqueeze_dim=2)
    for got, turned, given in zip(rotate(B, C, rotation), expected, (B, C), strict=True):
        torch.testing.assert_close(got, torch.cat([turned, given[..., WIDTH:]], dim=-1), rtol=1e-14, atol=1e-14)


def test_only_the_distance_between_positions_counts():
    torch.manual_seed(2)
    B, C = torch.randn(2, 2, 9, HEADS, STATE, dtype=torch.float64)
    near, far = (rotate(B, C, angles(counted(9, start))) for start in (0, 1000))
    scores = [torch.einsum("bthn,bshn->bhts", C_, B_) for B_, C_ in (near, far)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scores[0], torch.einsum("bthn,bshn->bhts", C, B))


@pytest.mark.parametrize("name", ["discrete_mamba2", "mamba2"])
def test_matrix_and_gradients_are_those_of_the_rotated_factors(name):
    """Beside the same mixer with ``rope: drop``, whose factors transformers turns."""
    mixer = make(name, state_dim=STATE, rope="keep")
    u, resets = hidden(20), borders(20, 7)
    rotation = angles(torch.cat([counted(7), counted(13)], dim=1))

    def matrix_of_rotated() -> Tensor:
        mixer.rope = "drop"
        terms, _ = mixer._terms(u, None, resets, None)
        mixer.rope = "keep"
        turned = apply_rotary_pos_emb(terms.B_BTHN[..., :WIDTH], terms.C_BTHN[..., :WIDTH], *rotation, unsqueeze_dim=2)
        B, C = (
            torch.cat([new, old[..., WIDTH:]], -1)
            for new, old in zip(turned, (terms.B_BTHN, terms.C_BTHN), strict=True)
        )
        step = torch.ones_like(terms.log_decay_BTH) if terms.step_BTH is None else terms.step_BTH
        decayed = terms.log_decay_BTH.cumsum(1).mT
        matrix = torch.einsum("bthn,bshn->bhts", C, B) * (decayed[..., :, None] - decayed[..., None, :]).exp().tril()
        apart = resets.cumsum(1)[:, None, :, None] == resets.cumsum(1)[:, None, None, :]
        return matrix * apart * step.mT[:, :, None, :] + torch.diag_embed(mixer.D[:, None].expand(-1, 20))

    found = []
    for matrix in (mixer.mixing_matrix(u, resets_BT=resets, position_embeddings=rotation), matrix_of_rotated()):
        mixer.zero_grad()
        matrix.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
        found.append({"matrix": matrix.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-9, atol=1e-9, msg=name)


def test_forward_mixes_with_that_matrix(mixer):
    u, rotation = hidden(70), angles(counted(70))
    y, x = mixed_and_values(mixer, u, position_embeddings=rotation)
    matrix = mixer.mixing_matrix(u, position_embeddings=rotation)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", matrix, x), y, rtol=1e-10, atol=1e-10)
    before, _ = mixer(u, position_embeddings=rotation)
    assert not torch.allclose(mixer(u, position_embeddings=angles(2 * counted(70)))[0], before)


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 1, 13, 8]])
def test_every_way_of_cutting_a_sequence_gives_the_same_output(mixer, pieces):
    u, rotation = hidden(30), angles(counted(30))
    expected, _ = mixer(u, position_embeddings=rotation)
    cache, got, start = adopt(DynamicCache(), [0], n_layers=1), [], 0
    for piece in u.split(pieces, dim=1):
        end = start + piece.shape[1]
        got.append(mixer(piece, past_key_values=cache, position_embeddings=part(rotation, start, end))[0])
        start = end
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-10, atol=1e-10)


def test_documents_and_padding_stay_apart(mixer):
    u = hidden(30)
    positions = torch.cat([torch.zeros(2, 4), counted(9), counted(17)], dim=1)
    valid = torch.arange(30).expand(2, -1) >= 4
    arguments = {"resets_BT": borders(30, 4, 13), "valid_BT": valid, "position_embeddings": angles(positions)}
    together, _ = mixer(u, **arguments)
    for start, end in [(4, 13), (13, 30)]:
        alone, _ = mixer(u[:, start:end], position_embeddings=angles(counted(end - start)))
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_has_16_bits_is_turned_in_32_and_rounded_once(dtype):
    torch.manual_seed(2)
    B, C = torch.randn(2, 1, 5, HEADS, STATE, dtype=torch.bfloat16)
    cos, sin = (part.to(dtype) for part in angles(torch.arange(30_000, 30_005)[None], STATE))
    for got, given in zip(rotate(B, C, (cos, sin)), (B, C), strict=True):
        exact, _ = rotate(given.float(), given.float(), (cos.float(), sin.float()))
        assert torch.equal(got, exact.to(torch.bfloat16))


def test_without_positions_or_with_too_many_columns_it_raises(mixer):
    with pytest.raises(ValueError, match=r"pass position_embeddings=\(cos, sin\)"):
        mixer(hidden(5))
    with pytest.raises(ValueError, match=r"turns 10 columns and .* a head has 8: build .* state_dim of at least 10"):
        mixer(hidden(5), position_embeddings=angles(counted(5), 10))


def test_dropped_positions_have_no_say(mixer):
    mixer.rope = "drop"
    u = hidden(5)
    assert u.shape[-1] == HIDDEN
    assert torch.equal(mixer(u, position_embeddings=angles(counted(5)))[0], mixer(u)[0])
