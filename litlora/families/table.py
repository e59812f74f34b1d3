"""The families, one entry each: how a model type differs from Llama, and what its config.json means where it is silent.

Defaults are those of the transformers package, which is the reference for all of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from litlora.config import Norms


@dataclass(frozen=True, kw_only=True)
class ExpertKeys:
    """How a config.json speaks of experts, and what it means where it is silent."""

    count_key: str
    count: int
    per_token: int | None  # None: it must be there
    size: int | None = None  # of one: moe_intermediate_size; None: there is no such key, it is intermediate_size
    dense_layers: bool = False  # whether layers without experts can be asked for, by mlp_only_layers and decoder_sparse_step
    normed: bool | None = None  # norm_topk_prob; None: there is no such key, weights sum to 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model type differs from Llama, and what its config.json means where it is silent."""

    architecture: str  # the class that transformers loads it with
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of Config that are the same in the whole family
    numbers: Mapping[str, float | None] = field(
        default_factory=dict
    )  # keys that it has and Llama has not, each a field: what they default to
    names: Mapping[str, str] = field(default_factory=dict)  # of modules: ours -> what checkpoints call them, in this order
    keys: Mapping[str, str] = field(default_factory=dict)  # of config.json: Llama's -> what this family calls them
    refused: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # keys of its own that ask for foreign arithmetic -> values that do not
    vocab_size: int | None = None  # of those whose config.json may be silent
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None  # None: as many as query heads
    widening: int | None = None  # intermediate_size / hidden_size where config.json is silent; None: it may not be
    max_position_embeddings: int = 2048
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    square: bool = False  # whether it can be nothing else
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    tied: bool = False
    hidden_act: str = "silu"
    act_key: str = "hidden_act"
    eps: float = 1e-6
    eps_key: str = "rms_norm_eps"
    theta: float = 10_000.0
    rope: Mapping[str, Any] = field(default_factory=dict)  # how it is stretched where config.json is silent
    local_theta: float | None = None  # of sliding layers, where they turn by their own
    local_theta_key: str = "rope_local_base_freq"
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    partial: float | None = None  # the share of each head that is turned; None: all, and config.json cannot ask for less
    interleaved: bool = False  # whether the pairs that turn are neighbours
    interleaved_key: str = ""  # by which config.json may say otherwise
    latent: bool = False  # attention by latents (own_keys.py)
    bias: Literal["none", "qkv", "all", "asked", "asked_qkv"] = (
        "none"  # on the attention's projections; asked: q, k, v and o if config.json says so
    )
    bias_key: str = "attention_bias"
    biased: bool = False  # what it says where it is silent
    mlp_bias: bool = False  # whether config.json may ask for one
    qk_norm_key: str = ""  # by which config.json may ask for norms of q and k ...
    qk_norm: Literal["head", "heads", "heads_apart"] = "head"  # ... of this kind
    window: Literal["none", "all", "upper", "pattern"] = "none"  # the layers that slide: from max_window_layers up; all but every n-th
    sliding_window: int | None = 4096
    pattern: int = 0  # that n
    unrotated: Literal["none", "listed", "full"] = "none"  # NoPE layers: no_rope_layers, every n-th by default; or those that do not slide
    parallel_key: str = ""  # of the residual stream
    parallel: bool = False  # what it says where it is silent
    parallel_norms: Norms = Norms(before_mlp=None)  # of a parallel block
    scaled_embedding: bool = False  # times sqrt(hidden_size)
    experts: ExpertKeys | None = None


GEMMA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tied": True,
    "hidden_act": "gelu_pytorch_tanh",
    "act_key": "hidden_activation",
    "bias": "asked",
    "scaled_embedding": True,
}
AROUND = Norms(after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm", after_mlp="post_feedforward_layernorm")
AFTER = Norms(before_attention=None, after_attention="post_attention_layernorm", before_mlp=None, after_mlp="post_feedforward_layernorm")
GLM: dict[str, Any] = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
    "head_dim": 128,
    "eos_token_id": (151329, 151336, 151338),
    "pad_token_id": 151329,
    "eps": 1.5625e-07,
    "bias": "asked_qkv",
    "biased": True,
    "partial": 0.5,
    "interleaved": True,
}
COHERE: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "pad_token_id": 0,
    "tied": True,
    "eps": 1e-5,
    "eps_key": "layer_norm_eps",
    "bias": "asked",
    "interleaved": True,
    "numbers": {"logit_scale": 0.0625},
    "fixed": {"norm": "layer", "norms": Norms(before_mlp=None), "parallel_residual": True},
}

SUPPORTED: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", bos_token_id=1, eos_token_id=2, bias="asked", mlp_bias=True),
    "mistral": Family(
        architecture="MistralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        bos_token_id=1,
        eos_token_id=2,
        window="all",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        bos_token_id=1,
        eos_token_id=2,
        eps=1e-5,
        theta=1_000_000.0,
        window="all",
        sliding_window=None,
        experts=ExpertKeys(count_key="num_local_experts", count=8, per_token=2),
        names={"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        refused={"router_jitter_noise": (None, 0)},
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", num_key_value_heads=32, max_position_embeddings=32_768, bias="qkv", window="upper"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        num_key_value_heads=32,
        max_position_embeddings=32_768,
        head_dim=128,
        bias="asked",
        fixed={"qk_norm": "head"},
        window="upper",
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        bias="asked",
        fixed={"qk_norm": "head"},
        experts=ExpertKeys(count_key="num_experts", count=128, per_token=8, size=768, dense_layers=True, normed=False),
        refused={"use_sliding_window": (None, False)},
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        head_dim=64,
        bias="asked",
        biased=True,
        eps=1e-5,
        theta=150_000.0,
        rope={"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
        window="pattern",
        sliding_window=128,
        pattern=2,
        fixed={"mlp": "stacked", "router_bias": True, "attention_sinks": True},
        numbers={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        experts=ExpertKeys(count_key="num_local_experts", count=128, per_token=4),
        names={"mlp.gate": "mlp.router"},
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        **GEMMA | {"num_key_value_heads": 16, "act_key": "hidden_act"},
        fixed={"norm_offset": 1.0},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        **GEMMA,
        fixed={"norm_offset": 1.0, "norms": AROUND},
        numbers={"query_pre_attn_scalar": 256.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        window="pattern",
        pattern=2,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        vocab_size=262_208,
        num_attention_heads=8,
        **GEMMA | {"max_position_embeddings": 131_072},
        fixed={"norm_offset": 1.0, "norms": AROUND, "qk_norm": "head"},
        numbers={"query_pre_attn_scalar": 256.0, "final_logit_softcapping": None},
        theta=1_000_000.0,
        local_theta=10_000.0,
        window="pattern",
        pattern=6,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
        eps=1e-5,
        fixed={"qkv": "stacked", "mlp": "fused"},
        partial=1.0,
        window="all",
        sliding_window=None,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        bos_token_id=1,
        eos_token_id=2,
        bias="asked",
        mlp_bias=True,
        numbers={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "olmo": Family(
        architecture="OlmoForCausalLM",
        eos_token_id=50279,
        pad_token_id=1,
        bias="asked",
        eps=1e-5,
        eps_key="",
        fixed={"norm": "layer", "norm_gain": False},
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        eos_token_id=50279,
        pad_token_id=1,
        bias="asked",
        eps=1e-5,
        fixed={"norms": AFTER, "qk_norm": "width"},
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        eos_token_id=50279,
        pad_token_id=1,
        bias="asked",
        eps=1e-5,
        fixed={"norms": AFTER, "qk_norm": "width"},
        theta=500_000.0,
        local_theta=500_000.0,
        local_theta_key="",
        window="pattern",
        pattern=4,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        bos_token_id=128000,
        eos_token_id=128001,
        pad_token_id=128004,
        tied=True,
        bias="asked",
        mlp_bias=True,
        theta=2_000_000.0,
        unrotated="listed",
        refused={"use_sliding_window": (None, False)},
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        num_key_value_heads=32,
        max_position_embeddings=4096,
        square=True,
        bos_token_id=0,
        eos_token_id=0,
        eps=1e-5,
        eps_key="layer_norm_eps",
        bias="asked_qkv",
        bias_key="use_qkv_bias",
        partial=0.25,
        fixed={"norm": "layer", "norm_bias": True},
        qk_norm_key="qk_layernorm",
        qk_norm="heads_apart",
        parallel_key="use_parallel_residual",
        names={"self_attn.q_norm": "self_attn.q_layernorm", "self_attn.k_norm": "self_attn.k_layernorm"},
    ),
    "cohere": Family(architecture="CohereForCausalLM", **COHERE, theta=500_000.0, qk_norm_key="use_qk_norm", qk_norm="heads"),
    "cohere2": Family(architecture="Cohere2ForCausalLM", **COHERE, square=True, window="pattern", pattern=4, unrotated="full"),
    "phi": Family(
        architecture="PhiForCausalLM",
        square=True,
        bos_token_id=1,
        eos_token_id=2,
        hidden_act="gelu_new",
        eps=1e-5,
        eps_key="layer_norm_eps",
        bias="all",
        partial=0.5,
        fixed={
            "norm": "layer",
            "norm_bias": True,
            "norms": Norms(before_mlp=None),
            "parallel_residual": True,
            "mlp": "plain",
            "mlp_bias": True,
            "lm_head_bias": True,
        },
        qk_norm_key="qk_layernorm",
        names={
            "self_attn.o_proj": "self_attn.dense",
            "self_attn.q_norm": "self_attn.q_layernorm",
            "self_attn.k_norm": "self_attn.k_layernorm",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
            "model.norm": "model.final_layernorm",
        },
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        square=True,
        bos_token_id=0,
        eos_token_id=2,
        hidden_act="gelu",
        eps=1e-5,
        eps_key="layer_norm_eps",
        bias="asked",
        biased=True,
        partial=0.25,
        partial_key="rotary_pct",
        theta_key="rotary_emb_base",
        fixed={"norm": "layer", "norm_bias": True, "qkv": "grouped", "mlp": "plain", "mlp_bias": True},
        parallel_key="use_parallel_residual",
        parallel=True,
        parallel_norms=Norms(),
        names={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers": "gpt_neox.layers",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "self_attn.qkv_proj": "attention.query_key_value",
            "self_attn.o_proj": "attention.dense",
            "self_attn": "attention",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        square=True,
        bos_token_id=11,
        eos_token_id=11,
        tied=True,
        hidden_act="gelu",
        eps=1e-5,
        bias="asked",
        mlp_bias=True,
        widening=4,
        fixed={"norm": "layer", "norm_bias": True, "qkv": "grouped", "mlp": "plain"},
        refused={"alibi": (None, False)},
        keys={
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "attention_bias": "bias",
            "mlp_bias": "bias",
        },
        names={
            "model.embed_tokens": "transformer.word_embeddings",
            "model.layers": "transformer.h",
            "model.norm": "transformer.ln_f",
            "self_attn.qkv_proj": "self_attention.query_key_value",
            "self_attn.o_proj": "self_attention.dense",
            "self_attn": "self_attention",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        bos_token_id=1,
        eos_token_id=2,
        bias="asked",
        interleaved=True,
        latent=True,
        experts=ExpertKeys(count_key="n_routed_experts", count=64, per_token=None, size=1407, normed=False),
        refused={"norm_topk_prob": (None, False), "scoring_func": (None, "softmax"), "moe_layer_freq": (None, 1)},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        bias="asked",
        interleaved=True,
        interleaved_key="rope_interleave",
        latent=True,
        fixed={"routing": "corrected"},
        experts=ExpertKeys(count_key="n_routed_experts", count=256, per_token=8, size=2048, normed=True),
        refused={"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc"), "moe_layer_freq": (None, 1)},
    ),
    "glm": Family(architecture="GlmForCausalLM", **GLM, fixed={"mlp": "fused"}),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        **GLM,
        fixed={"mlp": "fused", "norms": Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")},
    ),
}

ALSO_KNOWN_AS = "Llama 1 to 3, TinyLlama and SmolLM2 are llama; Qwen 2.5 is qwen2; Phi 4 is phi3"

WHY_NOT = {  # model types that are asked for, and not supported
    "gpt2": "its matrices are stored transposed and its positions learnt; pythia (gpt_neox) is of its size and age",
    "bloom": "its positions are biases of the scores (ALiBi)",
    "mpt": "its positions are biases of the scores (ALiBi)",
    "llama4_text": "its attention is cut into chunks and its experts are fused",
    "mamba": "it is no transformer",
    "deepseek": "it is the first version, whose code is not in transformers; deepseek_v2 and deepseek_v3 are supported",
    "deepseek_v32": "its attention looks at chosen tokens only (an index); deepseek_v2 and deepseek_v3 are supported",
}

# What the names of activations mean here; gelu_new and gelu_fast write the same formula another way.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

# Keys of relatives of these families, with the values that change nothing. transformers ignores most of them under model types
# that do not have them; a config that carries one with another value was not written for the model type it names.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "final_logit_softcapping": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "clip_qkv": (None,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
    "kv_lora_rank": (None,),
    "per_layer_config": (None, {}),
}

ACTION = {
    "alibi": "supported: rotary positions",
    "pretraining_tp": "set it to 1 in config.json: the weights are the same",
}
