"""What a GPT is built from. The fields carry Hugging Face's config.json names; `families` reads one out of such a file.

No torch here: merging and listing need a model's shapes, not its arithmetic.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how it is stretched beyond its first context."""

    rope_theta: float = 10_000.0
    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    partial_rotary_factor: float = 1.0  # the share of each head, its first dimensions, that is turned
    interleaved: bool = False  # the pairs that turn are (2i, 2i + 1); else (i, i + half of what is turned)
    factor: float = 1.0  # how many times longer the context became
    original_max_position_embeddings: int = 0  # tokens; 0 where it was never stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn (Peng et al. 2023, arXiv:2309.00071)
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: computed from factor (and yarn's mscales)
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope (Ding et al. 2024, arXiv:2402.13753): one per pair, within the first context
    long_factor: tuple[float, ...] = ()  # longrope: beyond it

    def turned(self, head_dim: int) -> int:
        """How many dimensions of a head turn."""
        return int(head_dim * self.partial_rotary_factor)

    @property
    def depends_on_length(self) -> bool:
        """Whether the angle of a position is another one in a longer text."""
        return self.rope_type in ("dynamic", "longrope")

    def changes_between(self, one: int, other: int) -> bool:
        """Whether what was computed in a text of `one` tokens holds no longer in one of `other`."""
        first = self.original_max_position_embeddings
        return self.depends_on_length and (one > first) != (other > first)


@dataclass(frozen=True, kw_only=True)
class Norms:
    """The norms of a block by their names, in the order in which a token meets them; None: there is none at that place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # of what attention adds
    before_mlp: str | None = "post_attention_layernorm"  # None in a parallel block: both look through the first
    after_mlp: str | None = None  # of what the MLP adds

    @property
    def names(self) -> tuple[str, ...]:
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape and arithmetic of one GPT. Sizes are counts; the token ids may be several."""

    model_type: str
    text_of: str = ""  # the model type of a larger model, of text and images, whose text model this is
    vocab_size: int  # V; rows of the embedding, which may be more than the tokenizer has
    hidden_size: int  # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D
    max_position_embeddings: int  # tokens
    hidden_act: str = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norms: Norms = Norms()
    norm_offset: float = 0.0  # what is added to a norm's stored gains (Gemma: 1)
    norm_gain: bool = True  # whether norms have gains (OLMo: they have nothing)
    norm_bias: bool = False
    rms_norm_eps: float = 1e-6  # of norms of either kind
    parallel_residual: bool = False  # attention and MLP look at the same x
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of sliding layers, where they have their own
    unrotated_layers: tuple[int, ...] = ()  # NoPE: without any position
    qkv: Literal["apart", "stacked", "grouped"] = "apart"  # one Linear for all: q, k, v in turn, or for each k: its q, k, v
    attention_bias: bool = False  # on q, k and v
    attention_out_bias: bool = False  # on o
    kv_lora_rank: int = 0  # latent attention: keys and values of all heads are made of so many numbers; 0: each has its own projection
    q_lora_rank: int | None = None  # latent attention: and queries of so many; None: they have a projection as ever
    qk_rope_head_dim: int = 0  # latent attention: dimensions of a head that turn; of k they are the same in all heads
    v_head_dim: int = 0  # latent attention: of a value, where q and k have head_dim
    qk_norm: Literal["head", "heads", "heads_apart", "width"] | None = None  # of each head's q and k; with gains for each (apart: a
    # tensor for each); across all heads
    sliding_window: int | None = None  # tokens a query of a sliding layer looks back at, itself included
    layer_types: tuple[LayerType, ...] = ()  # one per layer; empty: all full_attention
    attention_multiplier: float | None = None  # what q k^T is multiplied by; None: 1 / sqrt(D)
    query_pre_attn_scalar: float | None = None  # the same as 1 / sqrt of this
    attn_logit_softcapping: float | None = None  # c: c tanh(q k^T / c)
    attention_sinks: bool = False  # one more score for each head in the softmax, that no value stands behind
    mlp: Literal["gated", "fused", "plain", "stacked"] = (
        "gated"  # fused: gate and up are one Linear; plain: no gate; stacked: experts as one
    )
    mlp_bias: bool = False
    num_experts: int = 0  # E: so many MLPs in place of one, of which each token goes through k; 0: there is one
    num_experts_per_tok: int = 0  # k
    moe_intermediate_size: int = 0  # of one expert
    mlp_only_layers: tuple[int, ...] = ()  # these have one MLP all the same
    router_bias: bool = False
    routing: Literal["softmax", "corrected"] = "softmax"  # corrected: by sigmoids, with a bias that counts for the choice alone
    n_group: int = 1  # experts stand in so many groups ...
    topk_group: int = 1  # ... and a token's are of the best so many of these
    routed_scaling_factor: float = 1.0  # of the weights of a token's experts
    n_shared_experts: int = 0  # an MLP of so many experts' size that every token goes through besides
    swiglu_limit: float = math.inf  # of stacked experts: gate and up are kept within it
    swiglu_alpha: float = 1.0  # of stacked experts: gate sigmoid(alpha gate)
    norm_topk_prob: bool = True  # whether the weights of a token's k experts sum to 1
    embedding_multiplier: float = 1.0  # rounded to the dtype that is computed in
    residual_multiplier: float = 1.0  # of what attention and MLP add
    logits_scaling: float = 1.0  # what logits are divided by
    logit_scale: float = 1.0  # what they are multiplied by
    final_logit_softcapping: float | None = None
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    llama_pro_layers: tuple[int, ...] = ()  # the blocks that were inserted into an earlier, shallower model
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    torch_dtype: str = "float32"  # what the config says; the weights' own dtype decides

    def window(self, layer: int) -> int | None:
        """How far back layer number `layer` looks, in tokens; None is all the way."""
        return self.sliding_window if self.slides(layer) else None

    def slides(self, layer: int) -> bool:
        return bool(self.layer_types) and self.layer_types[layer] == "sliding_attention"

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.mlp_only_layers

    def rope_of(self, layer: int) -> Rope | None:
        """How layer number `layer` sees positions; None: not at all."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope is not None and self.slides(layer) else self.rope

    @property
    def attention_scale(self) -> float:
        """What q k^T is multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        scale = 1 / math.sqrt(self.query_pre_attn_scalar or self.head_dim)
        if self.kv_lora_rank and self.rope.mscale_all_dim:  # DeepSeek-V2's own way with YaRN: the temperature of all dimensions
            scale *= yarn_temperature(self.rope, self.rope.mscale_all_dim) ** 2
        return scale

    @property
    def rotary_dim(self) -> int:
        """Of the part of a head that a rope sees."""
        return self.qk_rope_head_dim or self.head_dim

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    def silence(self, parameter: str) -> float | None:
        """What a parameter of a block holds while the block adds nothing (LLaMA-Pro), None where it may hold anything. What writes last
        to the residual stream is silent: the projections are zero, or, where a norm follows them, its gains."""
        nothing = -self.norm_offset
        attention, mlp = self.norms.after_attention, self.norms.after_mlp
        last = {attention: nothing} if attention else {"o_proj": 0.0}
        last |= {mlp: nothing} if mlp else {"down_proj": 0.0, "down_proj_bias": 0.0}
        return next((last[part] for part in parameter.split(".")[-2:] if part in last), None)


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
    return replace(
        config,
        num_hidden_layers=len(places),
        layer_types=tuple(config.layer_types[layer] for layer, _ in places) if config.layer_types else (),
        unrotated_layers=tuple(place for place, (layer, _) in enumerate(places) if layer in config.unrotated_layers),
        mlp_only_layers=tuple(place for place, (layer, _) in enumerate(places) if layer in config.mlp_only_layers),
        llama_pro_layers=new,
    )


# ---- angles ----------------------------------------------------------------------------------------------------------


def rotary_steps(rope: Rope, head_dim: int, length: int = 0) -> tuple[list[float], float]:
    """By what angle one position turns each pair of dimensions, and what cos and sin are multiplied by.

    `length` of the whole text in tokens: some ropes turn otherwise in a long one (`Rope.depends_on_length`).
    """
    size, theta, gain = rope.turned(head_dim), rope.rope_theta, 1.0
    first = rope.original_max_position_embeddings
    if rope.rope_type == "dynamic":  # NTK-aware: the slower a pair, the more of the whole stretch it takes
        stretch = rope.factor * max(length, first) / first - (rope.factor - 1)
        theta *= stretch ** (size / (size - 2))
    steps = [theta ** (-2 * i / size) for i in range(size // 2)]
    if rope.rope_type == "linear":
        steps = [step / rope.factor for step in steps]
    elif rope.rope_type == "llama3":
        steps = [llama3_step(step, rope) for step in steps]
    elif rope.rope_type == "yarn":
        steps, gain = yarn_steps(steps, rope, size), yarn_gain(rope)
    elif rope.rope_type == "longrope":
        factors = rope.long_factor if length > first else rope.short_factor
        steps, gain = [step / factor for step, factor in zip(steps, factors, strict=True)], longrope_gain(rope)
    return steps, gain


def llama3_step(step: float, rope: Rope) -> float:
    """Llama 3.1: dimensions that turn slowly are stretched by the whole factor, quick ones not at all."""
    turns = rope.original_max_position_embeddings * step / (2 * math.pi)  # over the first context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * step / rope.factor + share * step


def yarn_steps(steps: list[float], rope: Rope, head_dim: int) -> list[float]:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp over dimensions from unstretched to stretched by the factor."""

    def dimension(turns: float) -> float:  # the one that turns so often over the first context
        return head_dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(steps))]
    return [share * step / rope.factor + (1 - share) * step for step, share in zip(steps, ramp, strict=True)]


def yarn_gain(rope: Rope) -> float:
    """YaRN's attention temperature (section 3.4), which multiplies q and k each."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_temperature(rope, rope.mscale) / yarn_temperature(rope, rope.mscale_all_dim)
    return yarn_temperature(rope, 1.0)


def yarn_temperature(rope: Rope, mscale: float) -> float:
    return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0


def longrope_gain(rope: Rope) -> float:
    """LongRoPE's (arXiv:2402.13753, section 3.3)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
