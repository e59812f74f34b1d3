"""Families in which keys of their own decide how a block is laid out: from config.json to fields of Config, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from litlora.config import Config, Norms
from litlora.families.reading import Reader

TWO_NORMS = Norms(before_attention="ln_attn", before_mlp="ln_mlp")


def falcon(reader: Reader) -> dict[str, Any]:
    """7B: one key and value head, one norm for attention and MLP beside each other. 40B and on (new_decoder_architecture): as many heads
    as it says, a norm for each or (Falcon 2) one. Before that neither: a key and value for each query, one after the other."""
    new, parallel = reader.flag("new_decoder_architecture"), reader.flag("parallel_attn", True)
    if new and not parallel:
        raise reader.refusal("parallel_attn", "false is not supported with new_decoder_architecture")
    norms = reader.integer("num_ln_in_parallel_attn", 2 if new else 1)
    if norms > (2 if new else 1):
        raise reader.refusal("num_ln_in_parallel_attn", f"{norms} is not supported", f"supported: 1{', 2' if new else ''}")
    heads = reader.integer("num_attention_heads")
    if new:
        heads = reader.integer("num_key_value_heads", heads)
    elif reader.flag("multi_query", True):
        heads = 1
    return {
        "num_key_value_heads": heads,
        "parallel_residual": parallel,
        "norms": TWO_NORMS if norms == 2 else Norms(before_mlp=None) if parallel else Norms(),
    }


def falcon_to_hf(config: Config) -> dict[str, Any]:
    heads = config.num_key_value_heads
    new = config.norms == TWO_NORMS or heads not in (1, config.num_attention_heads)
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if config.norms == TWO_NORMS else 1,
        "multi_query": heads == 1,
        "parallel_attn": config.parallel_residual,
        "alibi": False,
    }


READ: Mapping[str, Callable[[Reader], dict[str, Any]]] = {"falcon": falcon}
WRITE: Mapping[str, Callable[[Config], dict[str, Any]]] = {"falcon": falcon_to_hf}
