"""Which models can be read, and how: a Hugging Face config.json -> Config -> the names and shapes of the tensors.

A family is an entry in SUPPORTED. What its config.json leaves out takes the default of the transformers package (the
reference for all of these); what asks for arithmetic that `model.py` does not have is refused by the name of its key. No torch here.

    table.py          the families
    reading.py        values out of a config.json, checked
    experts.py        experts, read and written
    rope.py           rotary embeddings, read and written
    own_keys.py       layouts that keys of one family decide
    quant_methods.py  checkpoints whose weights are not plain numbers, and what to do with them
    tensors.py        names and shapes of the weights
    wrapped.py        the text model inside a model of text and images
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.config import Config
from litlora.families import own_keys
from litlora.families.experts import experts, experts_to_hf
from litlora.families.quant_methods import DEQUANTISED, quantised_by, unquantised
from litlora.families.reading import (
    LLAMA_PRO_LAYERS,
    Reader,
    activation,
    head_dim,
    inserted_layers,
    refuse_foreign_arithmetic,
    sliding,
    supported_family,
    unrotated_layers,
)
from litlora.families.rope import ropes, ropes_to_hf
from litlora.families.table import SUPPORTED, Family
from litlora.families.tensors import LATENT_BIASED, expected_tensors, is_beyond, is_derived, learns, linear_shapes, stored_name, tensor_name
from litlora.families.wrapped import is_beside, is_wrapped, spelt_as, text_values, with_changes

__all__ = [
    "DEQUANTISED",
    "LLAMA_PRO_LAYERS",
    "SUPPORTED",
    "changed_keys",
    "config_from_hf",
    "config_to_hf",
    "expected_tensors",
    "is_beside",
    "is_beyond",
    "is_derived",
    "learns",
    "linear_shapes",
    "quantised_by",
    "spelt_as",
    "stored_name",
    "tensor_name",
    "unquantised",
    "with_biases",
    "with_changes",
]


def config_from_hf(config: Mapping[str, Any], where: str | Path) -> Config:
    """The Config that a Hugging Face config.json describes.

    `where` is that file, for the messages. UserError, naming the key: a model type that is not SUPPORTED, a size that
    is missing or no whole number, or a value that asks for arithmetic that litlora does not have.
    """
    whole, config = config, text_values(config) if is_wrapped(config) else config
    reader = Reader(config, where, "text_config." if whole is not config else "")
    model_type, family = supported_family(reader)
    reader = Reader(config, where, reader.prefix, spelt=family.keys)
    refuse_foreign_arithmetic(reader, model_type, family)
    hidden, layers = (reader.integer(key) for key in ("hidden_size", "num_hidden_layers"))
    heads = reader.integer("num_attention_heads", family.num_attention_heads)
    context = reader.integer("max_position_embeddings", family.max_position_embeddings)
    own = own_keys.READ[model_type](reader) if model_type in own_keys.READ else {}
    kv_heads = own.pop("num_key_value_heads", None)
    if kv_heads is None:
        kv_heads = reader.integer("num_key_value_heads", family.num_key_value_heads or heads, null=heads)
    if heads % kv_heads:
        raise reader.refusal("num_key_value_heads", f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    size = own.pop("head_dim", None) or head_dim(reader, family, hidden, heads)
    window, layer_types = sliding(reader, model_type, family, layers)
    rope, local_rope = ropes(reader, family, context, own.get("qk_rope_head_dim") or size)
    dtype = reader.text("dtype", reader.text("torch_dtype", "float32"))
    return Config(
        model_type=model_type,
        text_of=whole["model_type"] if whole is not config else "",
        vocab_size=reader.integer("vocab_size", family.vocab_size),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", family.widening and family.widening * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        max_position_embeddings=context,
        hidden_act=activation(reader, model_type, family),
        rms_norm_eps=reader.number(family.eps_key, family.eps),
        rope=rope,
        local_rope=local_rope,
        unrotated_layers=unrotated_layers(reader, family, layers, layer_types),
        sliding_window=window,
        layer_types=layer_types,
        tie_word_embeddings=reader.flag("tie_word_embeddings", family.tied),
        llama_pro_layers=inserted_layers(reader, layers),
        initializer_range=reader.number("initializer_range", 0.02, zero=True),
        bos_token_id=reader.token("bos_token_id", family.bos_token_id),
        eos_token_ids=reader.tokens("eos_token_id", family.eos_token_id),
        pad_token_id=reader.token("pad_token_id", family.pad_token_id),
        torch_dtype=dtype.removeprefix("torch."),
        **(arithmetic(reader, family, hidden) | experts(reader, family, layers) | own),
    )


def arithmetic(reader: Reader, family: Family, hidden: int) -> dict[str, Any]:
    """The fields of Config in which families differ."""
    asked = family.bias in ("asked", "asked_qkv") and reader.flag(family.bias_key, family.biased)
    fields: dict[str, Any] = {
        **family.fixed,
        "attention_bias": asked or family.bias in ("qkv", "all"),
        "attention_out_bias": (asked and family.bias == "asked") or family.bias == "all",
    }
    if family.mlp_bias:
        fields["mlp_bias"] = reader.flag("mlp_bias")
    for key, default in family.numbers.items():
        fields[key] = reader.number(key, default) if default is not None or reader.values.get(key) is not None else None
        if key in reader.values and reader.values[key] is None and key.endswith("softcapping"):
            fields[key] = None
    if family.qk_norm_key and reader.flag(family.qk_norm_key):
        fields["qk_norm"] = family.qk_norm
    if family.scaled_embedding:
        fields["embedding_multiplier"] = math.sqrt(hidden)
    if family.parallel_key and reader.flag(family.parallel_key, family.parallel):
        fields |= {"parallel_residual": True, "norms": family.parallel_norms}
    return fields


def config_to_hf(config: Config) -> dict[str, Any]:
    """A config.json for `config`, in the old and the new spelling, so that readers of any age understand it.

    `config_from_hf` gives the same Config back, and transformers the same logits.
    """
    family = SUPPORTED[config.model_type]
    asked = {family.bias_key: config.attention_bias} if family.bias in ("asked", "asked_qkv") else {}
    assert family.bias != "asked" or config.attention_out_bias == config.attention_bias, "transformers has no such bias"
    values = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        **({} if family.square else {"head_dim": config.head_dim}),
        family.act_key: config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        **({family.eps_key: config.rms_norm_eps} if family.eps_key else {}),
        **ropes_to_hf(config, family),
        **asked,
        **({"mlp_bias": config.mlp_bias} if family.mlp_bias else {}),
        **{key: plain_number(key, getattr(config, key)) for key in family.numbers},
        **({family.parallel_key: config.parallel_residual} if family.parallel_key else {}),
        **({family.qk_norm_key: config.qk_norm is not None} if family.qk_norm_key else {}),
        **layers_to_hf(config, family),
        **experts_to_hf(config, family),
        "tie_word_embeddings": config.tie_word_embeddings,
        **({LLAMA_PRO_LAYERS: list(config.llama_pro_layers)} if config.llama_pro_layers else {}),
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.torch_dtype,
        "dtype": config.torch_dtype,
        "use_cache": True,
        **(own_keys.WRITE[config.model_type](config) if config.model_type in own_keys.WRITE else {}),
    }
    return {family.keys.get(key, key): value for key, value in values.items()}


def plain_number(key: str, value: float | None) -> float | int | None:
    """As transformers declares it: one of them is a whole number."""
    return int(value) if key == "query_pre_attn_scalar" and value is not None and value.is_integer() else value


def layers_to_hf(config: Config, family: Family) -> dict[str, Any]:
    """What says which layers slide and which see positions. Of qwen layer_types says it all; max_window_layers is for readers that do
    not know that key."""
    types = list(config.layer_types) or ["full_attention"] * config.num_hidden_layers
    keys: dict[str, Any] = {}
    if family.window != "none":
        keys["sliding_window"] = config.sliding_window
    if family.window in ("upper", "pattern") or family.unrotated == "listed":  # there transformers writes it too
        keys["layer_types"] = types
    if family.window == "upper":
        first = types.index("sliding_attention") if "sliding_attention" in types else config.num_hidden_layers
        keys |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": first}
    if family.unrotated == "listed":
        keys["no_rope_layers"] = [int(i not in config.unrotated_layers) for i in range(config.num_hidden_layers)]
    return keys


def with_biases(config: Config, modules: Iterable[str]) -> Config | None:
    """`config` with a bias on each of these Linears (others of their kind get one too); None where its model type has no key for one."""
    family, ends = SUPPORTED[config.model_type], {name.rpartition(".")[2] for name in modules}
    attention, out = ends & {"q_proj", "k_proj", "v_proj", "qkv_proj", *LATENT_BIASED}, ends & {"o_proj"}
    mlp = ends & {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    asked = family.bias in ("asked", "asked_qkv")
    no_qkv = attention and not (asked or config.attention_bias)
    no_out = out and not (family.bias == "asked" or config.attention_out_bias)
    if config.kv_lora_rank and ends & {"q_proj", "q_b_proj", "kv_b_proj"}:
        return None
    if no_qkv or no_out or (mlp and not (family.mlp_bias or config.mlp_bias)) or "lm_head" in ends:
        return None
    if asked and (attention or out):
        config = replace(config, attention_bias=True, attention_out_bias=config.attention_out_bias or family.bias == "asked")
    return replace(config, mlp_bias=True) if mlp else config


def changed_keys(before: Config, after: Config) -> dict[str, Any]:
    """What differs in config.json, so that a model derived from another keeps every key of it that it does not have to change."""
    old, new = config_to_hf(before), config_to_hf(after)
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    return changed | ({"decoder_sparse_step": 1} if "mlp_only_layers" in changed else {})  # the layers listed are all of them
