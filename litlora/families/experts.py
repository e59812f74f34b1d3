"""Experts as config.json has them, read and written. No torch here."""

from typing import Any

from litlora.config import Config
from litlora.families.reading import EXPERT_COUNTS, Reader
from litlora.families.table import Family


def experts(reader: Reader, family: Family, layers: int) -> dict[str, Any]:
    """The fields of Config that say which layers have experts, how many, and how many of them a token goes through."""
    keys = family.experts
    if keys is None:
        return {}
    other = next((key for key in EXPERT_COUNTS if reader.values.get(key) is not None), keys.count_key)  # transformers 5 renames it
    called = keys.count_key if reader.values.get(keys.count_key) is not None else other
    count, per_token = reader.integer(called, keys.count), reader.integer("num_experts_per_tok", keys.per_token)
    if per_token > count:
        raise reader.refusal("num_experts_per_tok", f"a token cannot go through {per_token} of {count} experts")
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": reader.integer("moe_intermediate_size", keys.size) if keys.size else reader.integer("intermediate_size"),
        "mlp_only_layers": dense_layers(reader, layers) if keys.dense_layers else (),
        "norm_topk_prob": True if keys.normed is None else reader.flag("norm_topk_prob", keys.normed),
    }


def dense_layers(reader: Reader, layers: int) -> tuple[int, ...]:
    """The layers that have one MLP: those listed, and those that are not every n-th."""
    every, listed = reader.integer("decoder_sparse_step", 1), reader.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
        raise reader.refusal("mlp_only_layers", f"a list of layer numbers is needed, found {listed!r}")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % every)


def experts_to_hf(config: Config, family: Family) -> dict[str, Any]:
    keys = family.experts
    if keys is None:
        return {}
    return {
        keys.count_key: config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        **({"moe_intermediate_size": config.moe_intermediate_size} if keys.size else {}),
        **({"mlp_only_layers": list(config.mlp_only_layers), "decoder_sparse_step": 1} if keys.dense_layers else {}),
        **({} if keys.normed is None else {"norm_topk_prob": config.norm_topk_prob}),
    }
