"""Every mixer: matrix = forward, cache = no cache, documents and padding apart, equal to other implementations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BambaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from distill.cache import adopt
from distill.mixers import MIXERS, Mamba2Mixer
from tests.distill.objectives.matrix_pairs import written_out

HIDDEN, HEADS, HEAD, STATE = 24, 3, 5, 4
FACTORED = sorted(name for name, made in MIXERS.items() if made.without_factors is None)
"""The mixers whose matrix has factors."""
DECAYS = {"discrete_mamba2": "A_log_bias", "gated_deltanet": "dt_bias", "mamba2": "dt_bias"}
"""The mixers whose decay is trained, and the parameter that shifts it."""


@pytest.fixture(params=sorted(MIXERS))
def mixer(request) -> nn.Module:
    return make(request.param)


def make(name: str, **changes) -> nn.Module:
    """A mixer with every parameter away from its neutral start."""
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "n_heads": HEADS, "head_dim": HEAD, "state_dim": STATE} | changes
    made = MIXERS[name](**shape).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def hidden(length: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64)


def borders(length: int, *starts: int) -> torch.Tensor:
    resets = torch.zeros(2, length, dtype=torch.bool)
    resets[:, list(starts)] = True
    return resets


def mixed_and_values(mixer, u, *, resets_BT=None, position_embeddings=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y_BTHP, v_BTHP): what the heads make and the values they mix, before the gate."""
    terms, _ = mixer._terms(u, None, resets_BT, None, position_embeddings)
    return terms.run(resets_BT=resets_BT, cache=None), terms.values


@pytest.mark.parametrize("resets", [None, borders(70, 9, 40)])
def test_matrix_times_values_is_what_forward_mixes(mixer, resets):
    u = hidden(70)
    y, x = mixed_and_values(mixer, u, resets_BT=resets)
    product = torch.einsum("bhts,bshp->bthp", mixer.mixing_matrix(u, resets_BT=resets), x)
    torch.testing.assert_close(product, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resets", [None, borders(70, 9, 40)])
@pytest.mark.parametrize("name", FACTORED)
def test_the_matrix_is_that_of_its_factors(name, resets):
    mixer, u = make(name), hidden(70)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, 60:] = False
    matrix = mixer.mixing_matrix(u, valid_BT=valid, resets_BT=resets)
    factors = mixer.matrix_factors(u, valid_BT=valid, resets_BT=resets)
    documents = None if resets is None else resets.cumsum(1)
    written = written_out(factors, documents).masked_fill(~(valid[:, None, :, None] & valid[:, None, None]), 0)
    torch.testing.assert_close(written, matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(MIXERS) - {"based", "hedgehog"}))  # which have no gate
def test_what_the_terms_make_is_what_forward_uses(name):
    """Change the gate alone: forward must follow it, and what the terms make, which ends before it, must not."""
    mixer, u = make(name), hidden(12)
    before, (mixed, _) = mixer(u)[0], mixed_and_values(mixer, u)
    with torch.no_grad():
        mixer.in_proj.weight[mixer.in_rows()["z"]] *= -1.5
    assert not torch.allclose(mixer(u)[0], before)
    torch.testing.assert_close(mixed_and_values(mixer, u)[0], mixed)


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [7, 1, 1, 13, 8], [2, 28]])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_every_way_of_cutting_a_sequence_gives_the_same_output(mixer, pieces, with_gradients):
    u = hidden(30)
    expected, _ = mixer(u)
    cache = adopt(DynamicCache(), [0], n_layers=1)
    with torch.set_grad_enabled(with_gradients):
        got = [mixer(piece, past_key_values=cache)[0] for piece in u.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_in_fp32_steps_and_prefill_agree_to_1e_5(mixer):
    mixer.float()
    u = hidden(40).float()
    expected, _ = mixer(u)
    cache = adopt(DynamicCache(), [0], n_layers=1)
    got = torch.cat([mixer(u[:, t : t + 1], past_key_values=cache)[0] for t in range(40)], dim=1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_step_updates_the_state_where_it_lies(mixer):
    cache = adopt(DynamicCache(), [0], n_layers=1)
    u = hidden(10)
    mixer(u[:, :6], past_key_values=cache)
    layer = cache.layers[0]
    addresses = layer.recurrent_states[0].data_ptr(), layer.conv_states[0].data_ptr()
    size = layer.nbytes()
    for t in range(6, 10):
        mixer(u[:, t : t + 1], past_key_values=cache)
    assert addresses == (layer.recurrent_states[0].data_ptr(), layer.conv_states[0].data_ptr())
    assert layer.nbytes() == size == 2 * mixer.state_bytes(torch.float64)  # a batch of two


def test_packed_documents_are_what_they_are_alone(mixer):
    u = hidden(50)
    together, _ = mixer(u, resets_BT=borders(50, 17, 18, 33))
    for start, end in [(0, 17), (17, 18), (18, 33), (33, 50)]:
        alone, _ = mixer(u[:, start:end])
        torch.testing.assert_close(together[:, start:end], alone, rtol=1e-10, atol=1e-10)


def test_padding_on_the_left_changes_nothing_and_its_content_does_not_matter(mixer):
    u = hidden(20)
    padded = torch.cat([torch.full((2, 6, HIDDEN), 1e3, dtype=torch.float64), u], dim=1)
    valid = torch.ones(2, 26, dtype=torch.bool)
    valid[:, :6] = False
    cache, plain = adopt(DynamicCache(), [0], n_layers=1), adopt(DynamicCache(), [0], n_layers=1)
    got, _ = mixer(padded, valid_BT=valid, past_key_values=cache)
    expected, _ = mixer(u, past_key_values=plain)
    torch.testing.assert_close(got[:, 6:], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cache.layers[0].state(), plain.layers[0].state(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cache.layers[0].conv_states[0], plain.layers[0].conv_states[0])


def test_padding_on_the_right_neither_writes_nor_decays(mixer):
    u = hidden(20)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 14:] = False
    cache, plain = adopt(DynamicCache(), [0], n_layers=1), adopt(DynamicCache(), [0], n_layers=1)
    mixer(u, valid_BT=valid, past_key_values=cache)
    mixer(u[:, :14], past_key_values=plain)
    torch.testing.assert_close(cache.layers[0].state(), plain.layers[0].state(), rtol=1e-10, atol=1e-10)
    matrix = mixer.mixing_matrix(u, valid_BT=valid)
    torch.testing.assert_close(matrix[:, :, :14, :14], mixer.mixing_matrix(u[:, :14]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_matrix_has_zeros_at_padding(mixer, side):
    """In its rows and columns, and nowhere else below the diagonal."""
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 14:] = False
    valid = valid.flip(1) if side == "left" else valid
    matrix = mixer.mixing_matrix(hidden(20), valid_BT=valid)
    said = (valid[:, :, None] & valid[:, None]).tril()
    assert torch.equal(matrix.ne(0).any(dim=1), said)


def test_mamba2_is_transformers_mamba2():
    """Against Bamba's mixer, an independent implementation, with one group per head and its own gated norm."""
    ours = make("mamba2", head_dim=HIDDEN // HEADS)
    config = BambaConfig(
        hidden_size=HIDDEN,
        mamba_n_heads=HEADS,
        mamba_d_head=HIDDEN // HEADS,
        mamba_n_groups=HEADS,
        mamba_d_state=STATE,
        mamba_d_conv=4,
        mamba_expand=1,
        mamba_chunk_size=16,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        rms_norm_eps=1e-5,
        hidden_act="silu",
    )
    theirs = BambaMixer(config, layer_idx=0).double()
    theirs.load_state_dict(ours.state_dict())  # the same names and shapes
    u = hidden(40)
    expected = theirs(u)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(ours(u)[0], expected, rtol=2e-5, atol=2e-6)  # theirs rounds its sums to fp32


@pytest.mark.parametrize("length", [1, 70])
def test_gated_deltanet_is_transformers_with_weights_written_from_ours(length):
    ours = make("gated_deltanet")
    config = Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_value_head_dim=HEAD,
        linear_key_head_dim=STATE,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    theirs = Qwen3NextGatedDeltaNet(config, layer_idx=0).double()
    rows = {part: ours.in_proj.weight[place] for part, place in ours.in_rows().items()}
    by_head = {part: weight.unflatten(0, (HEADS, -1)) for part, weight in rows.items()}
    written = {name: tensor for name, tensor in ours.state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(
        written
        | {
            "in_proj_qkvz.weight": torch.cat([by_head[part] for part in "qkvz"], dim=1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat([by_head[part] for part in "ba"], dim=1).flatten(0, 1),
            "norm.weight": torch.ones(HEAD),
            "out_proj.weight": ours.out_proj.weight * ours.norm.weight,
        }
    )
    u = hidden(length)
    torch.testing.assert_close(ours(u)[0], theirs(u), rtol=2e-5, atol=2e-6)  # theirs rounds its sums to fp32


def test_discrete_mamba2_is_mohawks_equations():
    """S_t = σ(−a') S + x⊗B, y = S C + D x, out = W (y ∘ SiLU(z + b)), with exp(−softplus(a)) = σ(−a), as a loop."""
    mixer = make("discrete_mamba2")
    u = hidden(15)
    with torch.no_grad():
        xBC, z, logit = mixer.in_proj(u).split([mixer.inner + 2 * mixer.wide, mixer.inner, HEADS], dim=-1)
        padded = F.pad(xBC.mT, (3, 0))
        xBC = F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=xBC.shape[-1]).mT
        x, B, C = (part.unflatten(-1, (HEADS, -1)) for part in xBC.split([mixer.inner, mixer.wide, mixer.wide], -1))
        decay = torch.sigmoid(-(logit + mixer.A_log_bias))
        state, rows = torch.zeros(2, HEADS, HEAD, STATE, dtype=torch.float64), []
        for t in range(15):
            state = decay[:, t, :, None, None] * state + torch.einsum("bhp,bhn->bhpn", x[:, t], B[:, t])
            rows.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + mixer.D[:, None] * x[:, t])
        y = torch.stack(rows, dim=1).flatten(2)
        expected = mixer.out_proj(y * F.silu(z + mixer.z_bias))
    torch.testing.assert_close(mixer(u)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rope", ["drop", "keep"])
def test_based_is_softmax_attention_with_a_taylor_series_for_the_exponential(rope):
    mixer, u = make("based", rope=rope), hidden(15)
    mixer.conv1d.open_()
    angle = torch.arange(15.0, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 0.3, 1.0, 0.3])
    rotation = angle.cos(), angle.sin()
    with torch.no_grad():
        parts = mixer.in_proj(u).split([mixer.wide, mixer.wide, mixer.inner], dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        if rope == "keep":
            q, k = apply_rotary_pos_emb(q, k, *rotation)
        scores = q @ k.mT
        weights = (1 + scores + scores.square() / 2).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        expected = mixer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(u, position_embeddings=rotation)[0], expected, rtol=1e-10, atol=1e-10)
    matrix = mixer.mixing_matrix(u, position_embeddings=rotation)
    torch.testing.assert_close(matrix, weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rope", ["drop", "keep"])
def test_hedgehog_forgets_and_averages_by_products_of_softmaxes(rope):
    mixer, u = make("hedgehog", rope=rope), hidden(15)
    mixer.conv1d.open_()
    angle = torch.arange(15.0, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 0.3, 1.0, 0.3])
    rotation = angle.cos(), angle.sin()
    with torch.no_grad():
        parts = mixer.in_proj(u).split([mixer.wide, mixer.wide, mixer.inner, HEADS], dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts[:3])
        if rope == "keep":
            q, k = apply_rotary_pos_emb(q, k, *rotation)
        near, far = ((sign * 2 * q).softmax(-1) @ (sign * 2 * k).softmax(-1).mT for sign in (1, -1))
        kept = torch.sigmoid(-(parts[3] + mixer.A_log_bias)).mT  # of what a position finds
        since = torch.stack(
            [torch.stack([kept[..., s + 1 : t + 1].prod(-1) for s in range(15)], -1) for t in range(15)], -2
        )
        weights = (since * (near + far)).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        expected = mixer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(u, position_embeddings=rotation)[0], expected, rtol=1e-10, atol=1e-10)
    matrix = mixer.mixing_matrix(u, position_embeddings=rotation)
    torch.testing.assert_close(matrix, weights, rtol=1e-10, atol=1e-10)


def spiky(scale: float) -> nn.Module:
    """Queries and keys so large that a query's and a key's features hardly meet: in 1e-13 at 5, in 1e-39 at 15."""
    mixer = make("hedgehog").float()
    with torch.no_grad():
        mixer.in_proj.weight[: 2 * mixer.wide] *= scale
    return mixer


@torch.no_grad()
def test_rows_of_hedgehog_sum_to_one_however_little_a_query_finds():
    mixer, u = spiky(5.0), hidden(70).float()
    matrix = mixer.mixing_matrix(u)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    y, x = mixed_and_values(mixer, u)
    torch.testing.assert_close(torch.einsum("bhts,bshp->bthp", matrix, x), y, rtol=1e-4, atol=1e-5)
    expected, cache = mixer(u)[0], adopt(DynamicCache(), [0], n_layers=1)
    got = torch.cat([mixer(piece, past_key_values=cache)[0] for piece in u.split([20] + [1] * 50, dim=1)], dim=1)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scale", [1.0, 15.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["forward", "mixing_matrix"])
def test_gradients_of_hedgehog_are_finite_however_little_a_query_finds(what, dtype, scale):
    """Down to nothing at all, behind padding on the left and where numbers of fp32 end."""
    mixer, valid = spiky(scale), torch.ones(4, 30, dtype=torch.bool)
    valid[:2, :5] = False
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        made = getattr(mixer, what)(hidden(30, batch=4).float(), valid_BT=valid)
    made = made[0] if what == "forward" else made
    (made.float() * torch.randn(made.shape)).sum().backward()
    assert made.isfinite().all()
    assert all(one.grad.isfinite().all() for one in mixer.parameters() if one.grad is not None)


def test_the_open_gate_of_discrete_mamba2_is_one():
    mixer = MIXERS["discrete_mamba2"](hidden_size=8, n_heads=2, head_dim=4, state_dim=4)
    torch.testing.assert_close(F.silu(mixer.z_bias), torch.ones(8))
    assert not mixer.in_proj.weight[mixer.in_rows()["z"]].any()


def test_every_parameter_gets_a_finite_gradient(mixer):
    (mixer(hidden(20))[0] ** 2).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
@pytest.mark.parametrize("bias", [-120.0, -60.0, 120.0])
@pytest.mark.parametrize(("name", "of_decay"), sorted(DECAYS.items()))
def test_decays_that_saturate_leave_everything_finite(name, of_decay, bias, autocast):
    """With these biases a state keeps all, or nothing: decays are 1, or too small for fp32."""
    mixer, u = make(name).float(), hidden(70).float().requires_grad_()
    with torch.no_grad():
        getattr(mixer, of_decay).fill_(bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, matrix = mixer(u)[0], mixer.mixing_matrix(u, resets_BT=borders(70, 9, 40))
    (out.float().square().sum() + matrix.float().square().sum()).backward()
    gradients = {each: parameter.grad for each, parameter in mixer.named_parameters()}
    for what, tensor in {"out": out, "matrix": matrix, "u": u.grad, **gradients}.items():
        assert torch.isfinite(tensor).all(), what


def test_bf16_weights_and_inputs_run_with_an_fp32_state(mixer):
    mixer.to(torch.bfloat16)
    cache = adopt(DynamicCache(), [0], n_layers=1)
    out, _ = mixer(hidden(9).to(torch.bfloat16), past_key_values=cache)
    assert out.dtype == torch.bfloat16
    assert cache.layers[0].state().dtype == torch.float32


def test_memories_span_a_few_to_a_few_hundred_positions():
    mixer = Mamba2Mixer(hidden_size=8, n_heads=4, head_dim=2, state_dim=2)
    terms, _ = mixer._terms(torch.randn(1, 5, 8), None, None, None)
    torch.testing.assert_close(-1 / terms.log_decay_BTH[0, 0], torch.tensor([4.0, 16.0, 64.0, 256.0]))
