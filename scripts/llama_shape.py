"""A Llama by its sizes, for the benchmarks whose weights are random."""

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class LlamaShape:
    """Numbers of a Llama's config; its tables of words are not tied."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    def config(self) -> LlamaConfig:
        """With room for a million positions."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2**20,
            tie_word_embeddings=False,
        )
