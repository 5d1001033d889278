"""The view against the attention module it looks at: scores, values and output recomputed from its parts."""

import pytest
import torch
from transformers import AutoConfig

from distill.attention import family_of, view
from distill.capture import FIELDS, layer_traces, traced_layers
from distill.conversion import plan
from distill.documents import document_starts
from distill.errors import UserError
from distill.objectives import attention_matrix
from tests.conftest import tiny


def packed_batch(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    positions = torch.cat([torch.arange(n) for n in (9, 1, 14)])
    return {"input_ids": torch.randint(3, vocabulary, (2, 24)), "position_ids": positions.expand(2, -1)}


@pytest.mark.parametrize("window", [None, 5])
def test_attention_recomputed_through_the_view_is_the_modules_output(family, window):
    if window is not None and family != "mistral":
        pytest.skip("only Mistral's config has a sliding window here")
    teacher = tiny(family)
    teacher.config.sliding_window = window
    batch = packed_batch(teacher.config.vocab_size)
    traces = layer_traces(teacher, batch, range(3))
    for index, trace in traces.items():
        seen = view(teacher.get_decoder().layers[index].self_attn, family_of(teacher.config))
        assert seen.sliding_window == window
        q, k = seen.queries_and_keys(trace.attention_input, trace.position_embeddings)
        documents = document_starts(batch["position_ids"]).cumsum(1)
        matrix = attention_matrix(q, k, scaling=seen.scaling, document_BT=documents, window=window)
        mixed = torch.einsum("bhts,bshp->bthp", matrix, seen.values(trace.attention_input)).flatten(2)
        torch.testing.assert_close(seen.o(mixed), trace.attention_output, rtol=1e-5, atol=1e-5)


def test_traces_chain_from_layer_to_layer_and_end_before_the_final_norm(family):
    teacher = tiny(family)
    batch = packed_batch(teacher.config.vocab_size)
    traces = layer_traces(teacher, batch, range(3))
    for index in range(2):
        assert torch.equal(traces[index].layer_output, traces[index + 1].layer_input)
    hidden = teacher.get_decoder()(**batch, use_cache=False).last_hidden_state
    assert torch.equal(teacher.get_decoder().norm(traces[2].layer_output), hidden)
    assert not torch.allclose(traces[2].layer_output, hidden)


@pytest.mark.parametrize("wants", [(), ("attention_input",), ("layer_output", "layer_input"), FIELDS], ids=str)
def test_a_trace_holds_what_was_asked_for(family, wants):
    teacher, batch = tiny(family), packed_batch(97)
    whole = layer_traces(teacher, batch, [0, 2])
    for index, trace in layer_traces(teacher, batch, [2, 0], wants).items():
        assert vars(trace).keys() == {"layer_args", "layer_kwargs", *wants}
        assert trace.position_embeddings
        for name in wants:
            assert torch.equal(getattr(trace, name), getattr(whole[index], name))


def test_heads_are_what_the_output_projection_reads(family):
    teacher, batch = tiny(family), packed_batch(97)
    for index, trace in layer_traces(teacher, batch, range(3)).items():
        attention = teacher.get_decoder().layers[index].self_attn
        assert torch.equal(attention.o_proj(trace.head_outputs), trace.attention_output)
        seen = view(attention, family_of(teacher.config))
        assert trace.head_outputs.shape == (*batch["input_ids"].shape, seen.n_heads * seen.head_dim)


def test_a_layer_is_computed_when_it_is_asked_for_and_none_above_the_last(family):
    teacher, ran = tiny(family), []
    layers = teacher.get_decoder().layers
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    traces = traced_layers(teacher, packed_batch(97), [0, 1])
    assert ran == []
    assert next(traces)[0] == 0
    assert ran == [0]
    assert [index for index, _ in traces] == [1]
    assert ran == [0, 1]
    assert teacher.get_decoder().layers is layers


def test_every_layer_is_called_as_its_decoder_calls_it():
    """Qwen2 gives a mask with a window to some layers and one without to the others."""
    teacher = tiny("qwen2")
    config = teacher.config
    config.sliding_window, config.layer_types = 4, ["full_attention", "sliding_attention", "full_attention"]
    teacher = type(teacher)(config).eval()
    batch = packed_batch(97)
    hidden = teacher.get_decoder()(**batch, use_cache=False).last_hidden_state
    traces = layer_traces(teacher, batch, range(3))
    assert torch.equal(teacher.get_decoder().norm(traces[2].layer_output), hidden)
    masks = [traces[index].layer_kwargs["attention_mask"] for index in range(3)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_hooks_are_gone_afterwards(family):
    teacher = tiny(family)
    layer_traces(teacher, packed_batch(97), range(3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_a_family_without_attention_is_named():
    with pytest.raises(
        UserError, match="layer 0 of this rwkv cannot be converted: RwkvSelfAttention has no linear q_proj"
    ):
        plan(AutoConfig.for_model("rwkv", num_hidden_layers=1))


def test_a_layer_without_its_projections_is_refused_by_name():
    teacher = tiny("llama")
    attention = teacher.get_decoder().layers[0].self_attn
    del attention.k_proj
    with pytest.raises(UserError, match="LlamaAttention has no linear k_proj"):
        view(attention, family_of(teacher.config))
