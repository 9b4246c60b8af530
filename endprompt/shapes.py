"""Shapes of models: the named ones of measurements and estimates, and what is counted from a shape."""

from dataclasses import dataclass
from typing import Any

#: Llama shapes: vocabulary, hidden, layers, heads, key/value heads, intermediate, window, RoPE base, tied.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "llama3-8b": (128256, 4096, 32, 32, 8, 14336, 8192, 500000.0, False),
    "llama2-7b": (32000, 4096, 32, 32, 32, 11008, 4096, 10000.0, False),
    "mistral-7b": (32768, 4096, 32, 32, 8, 14336, 32768, 1000000.0, False),
    "llama3-1b": (128256, 2048, 16, 32, 8, 8192, 8192, 500000.0, True),
    "smollm2-135m": (49152, 576, 30, 9, 3, 1536, 8192, 100000.0, True),
    "small": (1024, 512, 6, 8, 4, 1536, 256, 10000.0, False),
    "tiny": (256, 64, 2, 4, 2, 128, 64, 10000.0, False),
}


def model_config(shape: str) -> Any:
    """LlamaConfig of a named shape."""
    from transformers import LlamaConfig

    vocabulary, hidden, layers, heads, groups, intermediate, window, base, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        max_position_embeddings=window,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )


GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. query: width of all query heads, default `hidden`. stored: parameters of all decoder layers
    together; active: those in matrices that a token is multiplied with, fewer where it is sent to some of the experts;
    both default to those of Llama's layers. other: parameters neither in a layer nor in embeddings and head. base: of
    RoPE, 1 / its slowest frequency.
    """

    vocabulary: int
    hidden: int
    layers: int
    kv: int
    intermediate: int
    window: int
    tied: bool
    query: int = -1
    head_dim: int = 128
    stored: int = -1
    active: int = -1
    other: int = -1
    base: float | None = None

    def __post_init__(self) -> None:
        matrices = self.layers * (2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate)
        norms = 2 * self.layers * self.hidden
        defaults = {"query": self.hidden, "stored": matrices + norms, "active": matrices, "other": self.hidden}
        for key, value in defaults.items():
            if getattr(self, key) < 0:  # 0 is a number of parameters: OLMo's norms have none
                object.__setattr__(self, key, value)

    @property
    def embeddings(self) -> int:
        """Parameters of embeddings and head together."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with, the head's included."""
        return self.active + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.stored + self.other + self.embeddings


def tokens_at_a_time(vocabulary: int, device: str = "cuda") -> int:
    """Tokens whose logits are there at once: at most 2**30 logits on a GPU, in a multiple of 256 (cuBLAS makes products
    in tiles of so many rows, and what a last tile lacks is lost), 2**23 on a CPU.
    """
    if device != "cuda":
        return max(1, 2**23 // vocabulary)
    tokens = max(1, 2**30 // vocabulary)
    return tokens - tokens % 256 or tokens
