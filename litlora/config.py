"""What a GPT is built from. The fields carry Hugging Face's config.json names; `families.py` reads one out of such a file.

No torch here: merging and listing need a model's shapes, not its arithmetic.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

SILENT = ("o_proj", "down_proj")  # what writes last to the residual stream: zero in a new block that adds nothing yet

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched beyond its first context."""

    rope_theta: float = 10_000.0
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0  # how many times longer the context became
    original_max_position_embeddings: int = 0  # tokens; 0 where it was never stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn (Peng et al. 2023, arXiv:2309.00071)
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: computed from factor (and the mscales)
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape and arithmetic of one GPT. Sizes are counts; the token ids may be several."""

    model_type: str
    vocab_size: int  # V; rows of the embedding, which may be more than the tokenizer has
    hidden_size: int  # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    max_position_embeddings: int  # tokens
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    attention_bias: bool = False  # on q, k and v
    attention_out_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: an RMSNorm of each head's q and k
    sliding_window: int | None = None  # tokens a query of a sliding layer looks back at, itself included
    layer_types: tuple[LayerType, ...] = ()  # one per layer; empty: all full_attention
    tie_word_embeddings: bool = False
    llama_pro_layers: tuple[int, ...] = ()  # the blocks that were inserted into an earlier, shallower model
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    torch_dtype: str = "float32"  # what the config says; the weights' own dtype decides

    def window(self, layer: int) -> int | None:
        """How far back layer number `layer` looks, in tokens; None is all the way."""
        sliding = bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


def merged_layers(config: Config, inserted: Iterable[int]) -> list[tuple[int, bool]]:
    """The layers of the model that has a new block after each of the layers `inserted`, in order: which of the first model's it
    comes from, and whether it is the block inserted after that."""
    after = set(inserted)
    return [(layer, is_new) for layer in range(config.num_hidden_layers) for is_new in ((False, True) if layer in after else (False,))]


def expanded_config(config: Config, inserted: Iterable[int]) -> Config:
    """`config` with a new block after each of the layers `inserted`: of the same type as that layer, and recorded as new.

    Blocks that an earlier expansion inserted have learnt by then: they are layers like any other.
    """
    places = merged_layers(config, inserted)
    if len(places) == config.num_hidden_layers:
        return config
    new = tuple(place for place, (_, is_new) in enumerate(places) if is_new)
    types = tuple(config.layer_types[layer] for layer, _ in places) if config.layer_types else ()
    return replace(config, num_hidden_layers=len(places), layer_types=types, llama_pro_layers=new)
