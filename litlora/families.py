"""Which models can be read, and how: a Hugging Face config.json -> Config -> the names and shapes of the tensors.

A family is an entry in SUPPORTED. What its config.json leaves out takes the default of the transformers package (the
reference for all of these); what asks for arithmetic that `model.py` does not have is refused by the name of its key.
Two spellings exist and both are read: `rope_theta`, `rope_scaling`, `torch_dtype`, and `rope_parameters`, `dtype`
since transformers 5. No torch here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from litlora.config import Config, LayerType, Rope
from litlora.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model type differs from Llama, and what its config.json means where it is silent."""

    architecture: str  # the class that transformers loads it with
    num_key_value_heads: int | None = None  # None: as many as query heads
    max_position_embeddings: int = 2048
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    bias: Literal["none", "qkv", "asked"] = "none"  # on the attention's projections; asked: q, k, v and o if attention_bias
    mlp_bias: bool = False  # whether config.json may ask for one
    qk_norm: bool = False
    window: Literal["none", "all", "upper"] = "none"  # the layers that slide: all, or those from max_window_layers up


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
    "qwen2": Family(architecture="Qwen2ForCausalLM", num_key_value_heads=32, max_position_embeddings=32_768, bias="qkv", window="upper"),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        num_key_value_heads=32,
        max_position_embeddings=32_768,
        head_dim=128,
        bias="asked",
        qk_norm=True,
        window="upper",
    ),
}

ALSO_KNOWN_AS = "Llama 1 to 3, TinyLlama and SmolLM2 are llama; Qwen 2.5 is qwen2"
LLAMA_PRO_LAYERS = "llama_pro_layers"  # our own key of config.json: which layers were inserted; other readers ignore it
DEFAULT_WINDOW, DEFAULT_MAX_WINDOW_LAYERS = 4096, 28  # transformers' defaults for mistral and qwen

# Keys of relatives of these families, with the values that change nothing. transformers ignores most of them under our
# four model types; a config that carries one with another value was not written for the model type it names.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
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
    "per_layer_config": (None, {}),
}

ACTION = {
    "quantization_config": "use the directory of the model before it was quantised",
    "pretraining_tp": "set it to 1 in config.json: the weights are the same",
}


def config_from_hf(config: Mapping[str, Any], where: str | Path) -> Config:
    """The Config that a Hugging Face config.json describes.

    `where` is that file, for the messages. UserError, naming the key: a model type that is not SUPPORTED, a size that
    is missing or no whole number, or a value that asks for arithmetic that litlora does not have.
    """
    reader = Reader(config, where)
    model_type, family = supported_family(reader)
    refuse_foreign_arithmetic(reader, model_type, family)
    hidden, heads, layers = (reader.integer(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    context = reader.integer("max_position_embeddings", family.max_position_embeddings)
    kv_heads = reader.integer("num_key_value_heads", family.num_key_value_heads or heads, null=heads)
    if heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    asked = family.bias == "asked" and reader.flag("attention_bias")
    window, layer_types = sliding(reader, model_type, family, layers)
    dtype = reader.text("dtype", reader.text("torch_dtype", "float32"))
    return Config(
        model_type=model_type,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim(reader, family, hidden, heads),
        max_position_embeddings=context,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope(reader, context),
        attention_bias=asked or family.bias == "qkv",
        attention_out_bias=asked,
        mlp_bias=family.mlp_bias and reader.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        sliding_window=window,
        layer_types=layer_types,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        llama_pro_layers=inserted_layers(reader, layers),
        initializer_range=reader.number("initializer_range", 0.02, zero=True),
        bos_token_id=reader.token("bos_token_id", family.bos_token_id),
        eos_token_ids=reader.tokens("eos_token_id", family.eos_token_id),
        pad_token_id=reader.token("pad_token_id", None),
        torch_dtype=dtype.removeprefix("torch."),
    )


def config_to_hf(config: Config) -> dict[str, Any]:
    """A config.json for `config`, in the old and the new spelling, so that readers of any age understand it.

    `config_from_hf` gives the same Config back, and transformers the same logits.
    """
    family = SUPPORTED[config.model_type]
    window = {"none": {}, "all": {"sliding_window": config.sliding_window}, "upper": upper_window(config)}[family.window]
    asked = {"attention_bias": config.attention_bias} if family.bias == "asked" else {}
    assert config.attention_out_bias == bool(asked.get("attention_bias")), "transformers has no such bias"
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_to_hf(config.rope),
        **asked,
        **({"mlp_bias": config.mlp_bias} if family.mlp_bias else {}),
        **window,
        "tie_word_embeddings": config.tie_word_embeddings,
        **({LLAMA_PRO_LAYERS: list(config.llama_pro_layers)} if config.llama_pro_layers else {}),
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.torch_dtype,
        "dtype": config.torch_dtype,
        "use_cache": True,
    }


def with_biases(config: Config, modules: Iterable[str]) -> Config | None:
    """`config` with a bias on each of these Linears (others of their kind get one too); None where its model type has no key for one."""
    family, ends = SUPPORTED[config.model_type], {name.rpartition(".")[2] for name in modules}
    attention, out, mlp = ends & {"q_proj", "k_proj", "v_proj"}, ends & {"o_proj"}, ends & {"gate_proj", "up_proj", "down_proj"}
    asked = family.bias == "asked"
    missing = (attention and not (asked or config.attention_bias)) or (out and not asked) or (mlp and not family.mlp_bias)
    if missing or "lm_head" in ends:
        return None
    if asked and (attention or out):
        config = replace(config, attention_bias=True, attention_out_bias=True)
    return replace(config, mlp_bias=True) if mlp else config


def changed_keys(before: Config, after: Config) -> dict[str, Any]:
    """What differs in config.json, so that a model derived from another keeps every key of it that it does not have to change."""
    old, new = config_to_hf(before), config_to_hf(after)
    return {key: value for key, value in new.items() if key not in old or old[key] != value}


# ---- names and shapes of the weights ---------------------------------------------------------------------------------


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Every Linear of the model by its module name, in the model's order: (out, in). The head is among them, tied or not."""
    C, D, inner = config.hidden_size, config.head_dim, config.intermediate_size
    H, K = config.num_attention_heads, config.num_key_value_heads
    block = {
        "self_attn.q_proj": (H * D, C),
        "self_attn.k_proj": (K * D, C),
        "self_attn.v_proj": (K * D, C),
        "self_attn.o_proj": (C, H * D),
        "mlp.gate_proj": (inner, C),
        "mlp.up_proj": (inner, C),
        "mlp.down_proj": (C, inner),
    }
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in block.items()} | {"lm_head": (config.vocab_size, C)}


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a base of this Config holds; no lm_head.weight where the embedding is the head."""
    C, D = config.hidden_size, config.head_dim
    biased = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias) | {"o_proj": config.attention_out_bias}
    biased |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), config.mlp_bias)
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, C)}
    for name, (rows, columns) in linear_shapes(config).items():
        if name == "lm_head":
            continue
        tensors[f"{name}.weight"] = (rows, columns)
        if biased[name.rpartition(".")[2]]:
            tensors[f"{name}.bias"] = (rows,)
    for layer in (f"model.layers.{i}" for i in range(config.num_hidden_layers)):
        tensors |= {f"{layer}.input_layernorm.weight": (C,), f"{layer}.post_attention_layernorm.weight": (C,)}
        if config.qk_norm:
            tensors |= {f"{layer}.self_attn.q_norm.weight": (D,), f"{layer}.self_attn.k_norm.weight": (D,)}
    tensors["model.norm.weight"] = (C,)
    return tensors if config.tie_word_embeddings else tensors | {"lm_head.weight": (config.vocab_size, C)}


def tensor_name(name: str) -> str:
    """The parameter that a checkpoint's tensor belongs to: saved without its head, a model drops the `model.` in front."""
    return f"model.{name}" if re.match(r"(layers|embed_tokens|norm)\.", name) else name


def is_derived(name: str) -> bool:
    """Whether a tensor of a checkpoint holds nothing that was learnt: old Llamas carry their rotary frequencies along."""
    return name.endswith(".rotary_emb.inv_freq")


# ---- reading ---------------------------------------------------------------------------------------------------------


class Reader:
    """Values of a config.json by key, checked. A key that is absent or null takes the default given."""

    def __init__(self, values: Mapping[str, Any], where: str | Path, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def refusal(self, key: str, why: str, hint: str = "") -> UserError:
        return UserError(why, where=f"{self.where}: {self.prefix}{key}", hint=hint)

    def integer(self, key: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive whole number. Without a default it must be there; `null` is what a null means, where that differs."""
        value = self.values.get(key, default)
        value = (null or default) if value is None else value
        if value is None:
            raise self.refusal(key, "missing", "config.json must say how large the model is")
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
            raise self.refusal(key, f"a positive whole number is needed, found {value!r}")
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number; `zero`: or zero."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refusal(key, "missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or (zero and value == 0)):
            raise self.refusal(key, f"a positive number is needed, found {value!r}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, f"true or false is needed, found {value!r}")
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, f"a name is needed, found {value!r}")
        return default if value is None else value

    def tokens(self, key: str, default: int | None) -> tuple[int, ...]:
        """Token ids: config.json has one, a list or null. An absent key takes the default, a null is no token."""
        value = self.values.get(key, default)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.refusal(key, f"a token id or a list of them is needed, found {value!r}")
        return tuple(token for token in ids if token >= 0)  # -1 is an old way to say that there is none

    def token(self, key: str, default: int | None) -> int | None:
        ids = self.tokens(key, default)
        return ids[0] if ids else None


def supported_family(reader: Reader) -> tuple[str, Family]:
    model_type = reader.values.get("model_type")
    names = ", ".join(SUPPORTED)
    if not isinstance(model_type, str):
        raise reader.refusal("model_type", "missing, so this is no model's config.json", f"supported: {names}")
    if model_type not in SUPPORTED:
        guess = did_you_mean(model_type, SUPPORTED)
        hint = f"supported: {names} ({ALSO_KNOWN_AS})"
        raise reader.refusal("model_type", f"{model_type!r} is not supported{'; ' + guess if guess else ''}", hint)
    return model_type, SUPPORTED[model_type]


def refuse_foreign_arithmetic(reader: Reader, model_type: str, family: Family) -> None:
    for key, neutral in NEUTRAL.items():
        if key in reader.values and reader.values[key] not in neutral:
            supported = next((value for value in neutral if value is not None), "to leave it out")
            shown = repr(reader.values[key])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise reader.refusal(key, f"{shown} is not supported", ACTION.get(key, f"supported: {supported}"))
    if family.bias == "none" and reader.flag("attention_bias"):
        raise reader.refusal("attention_bias", f"a {model_type} model has no attention bias")
    if not family.mlp_bias and reader.flag("mlp_bias"):
        raise reader.refusal("mlp_bias", f"a {model_type} model has no MLP bias")


def head_dim(reader: Reader, family: Family, hidden: int, heads: int) -> int:
    size = reader.integer("head_dim", family.head_dim or max(1, hidden // heads))
    derived = reader.values.get("head_dim") is None and family.head_dim is None
    if derived and hidden % heads:
        raise reader.refusal("num_attention_heads", f"hidden_size {hidden} is no multiple of {heads} heads, and there is no head_dim")
    if size % 2:
        raise reader.refusal("head_dim" if not derived else "num_attention_heads", f"a head of {size} cannot be rotated in pairs")
    return size


def sliding(reader: Reader, model_type: str, family: Family, layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
    """The window in tokens and each layer's type; (None, ()) where every layer looks all the way back."""
    types = reader.values.get("layer_types")
    plain = types is None or (family.window == "none" and all(kind == "full_attention" for kind in types))
    if family.window != "upper" and not plain:  # transformers reads a mistral with layer_types as another model type
        raise reader.refusal("layer_types", f"layers of several types are not supported in a {model_type} model")
    if family.window == "none":
        return None, ()
    if family.window == "all":
        if "sliding_window" in reader.values and reader.values["sliding_window"] is None:
            return None, ()
        slides: LayerType = "sliding_attention"
        return reader.integer("sliding_window", DEFAULT_WINDOW), (slides,) * layers
    window = None
    if reader.flag("use_sliding_window") and reader.values.get("sliding_window", DEFAULT_WINDOW) is not None:
        window = reader.integer("sliding_window", DEFAULT_WINDOW)
    if types is None:
        first = reader.values.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int):
            raise reader.refusal("max_window_layers", f"a whole number is needed, found {first!r}")
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    return checked_layers(reader, types, window, layers)


def checked_layers(reader: Reader, types: Any, window: int | None, layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
    if not isinstance(types, list) or len(types) != layers:
        raise reader.refusal("layer_types", f"{layers} types are needed, one per layer")
    kinds: list[LayerType] = types
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise reader.refusal("layer_types", f"{kind!r} is not supported", "supported: full_attention, sliding_attention")
    if "sliding_attention" not in kinds:
        return None, ()
    if window is None:
        raise reader.refusal("sliding_window", "layer_types has sliding layers, but no window is given or use_sliding_window is not true")
    return window, tuple(kinds)


def inserted_layers(reader: Reader, layers: int) -> tuple[int, ...]:
    value = reader.values.get(LLAMA_PRO_LAYERS) or []
    if not isinstance(value, list) or any(type(layer) is not int or not 0 <= layer < layers for layer in value):
        raise reader.refusal(LLAMA_PRO_LAYERS, f"a list of layer numbers below {layers} is needed, found {value!r}")
    return tuple(sorted(set(value)))


def rope(reader: Reader, context: int) -> Rope:
    """`context` is max_position_embeddings, which is also what a stretched model's first context defaults to."""
    key = "rope_scaling" if reader.values.get("rope_scaling") else "rope_parameters"  # as transformers decides
    values = reader.values.get(key) or {}
    if not isinstance(values, Mapping):
        raise reader.refusal(key, f"an object is needed, found {values!r}")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise reader.refusal(key, "an embedding for each type of layer is not supported")
    inner = Reader(values, reader.where, f"{key}.")
    theta = inner.number("rope_theta", reader.number("rope_theta", 10_000.0))
    name = "rope_type" if values.get("rope_type") is not None else "type"
    kind = inner.text(name, "default")
    if inner.number("partial_rotary_factor", 1.0) != 1.0:
        raise inner.refusal("partial_rotary_factor", "rotating a part of each head is not supported")
    if kind == "default":
        return Rope(rope_theta=theta)
    if kind == "linear":
        return Rope(rope_theta=theta, rope_type="linear", factor=inner.number("factor"))
    if kind not in ("llama3", "yarn"):
        raise inner.refusal(name, f"{kind!r} is not supported", "supported: default, linear, llama3, yarn")
    original = reader.integer("original_max_position_embeddings", inner.integer("original_max_position_embeddings", context))
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise inner.refusal("high_freq_factor", f"{high} must be more than low_freq_factor {low}")
        return Rope(
            rope_theta=theta,
            rope_type="llama3",
            factor=inner.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return Rope(
        rope_theta=theta,
        rope_type="yarn",
        factor=inner.number("factor", context / original),
        original_max_position_embeddings=original,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        attention_factor=inner.number_or_none("attention_factor"),
        mscale=inner.number_or_none("mscale"),
        mscale_all_dim=inner.number_or_none("mscale_all_dim"),
        truncate=inner.flag("truncate", True),
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for readers of the old spelling, `rope_parameters` for those of the new."""
    if rope.rope_type == "default":
        scaling: dict[str, Any] | None = None
    else:
        scaling = {"rope_type": rope.rope_type, "factor": rope.factor}
        if rope.rope_type == "llama3":
            scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        if rope.rope_type == "yarn":
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
            optional = {name: getattr(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
            scaling |= {name: value for name, value in optional.items() if value is not None}
        if rope.rope_type in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    parameters = {"rope_theta": rope.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": rope.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def upper_window(config: Config) -> dict[str, Any]:
    """Qwen's keys for a sliding window: layer_types says it all, max_window_layers is for readers that do not know that key."""
    types = list(config.layer_types) or ["full_attention"] * config.num_hidden_layers
    first = types.index("sliding_attention") if "sliding_attention" in types else config.num_hidden_layers
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": types,
    }
