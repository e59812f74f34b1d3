"""Families in which keys of their own decide how a block is laid out: from config.json to fields of Config, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from litlora.config import Config, Norms
from litlora.families.reading import EXPERT_COUNTS, Reader

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


def latent(reader: Reader) -> dict[str, Any]:
    """Latent attention, shared experts, and experts in groups: DeepSeek's keys, with the defaults of its second or third version."""
    third = reader.values["model_type"] == "deepseek_v3"
    ranks = {"kv_lora_rank": reader.integer("kv_lora_rank", 512), "q_lora_rank": None}
    if reader.values.get("q_lora_rank", 1536) is not None:
        ranks["q_lora_rank"] = reader.integer("q_lora_rank", 1536)
    still, turns = reader.integer("qk_nope_head_dim", 128), reader.integer("qk_rope_head_dim", 64)
    if turns % 2:
        raise reader.refusal("qk_rope_head_dim", f"{turns} dimensions cannot be turned in pairs")
    if reader.integer("head_dim", turns) != turns:
        raise reader.refusal("head_dim", f"it is what turns of a head here, which qk_rope_head_dim says are {turns}", "leave it out")
    stretch = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    kind = (stretch.get("rope_type") or stretch.get("type") or "default") if isinstance(stretch, Mapping) else "default"
    if kind not in ("default", "yarn"):
        raise reader.refusal("rope_scaling", f"{kind!r} is not supported with latent attention", "supported: default, yarn")
    return {
        **ranks,
        "num_key_value_heads": reader.integer("num_attention_heads"),  # whatever it says: each head makes its own of the latent
        "head_dim": still + turns,
        "qk_rope_head_dim": turns,
        "v_head_dim": reader.integer("v_head_dim", 128),
        "n_shared_experts": reader.integer("n_shared_experts", 1 if third else 2),
        "routed_scaling_factor": reader.number("routed_scaling_factor", 2.5 if third else 1.0),
        "mlp_only_layers": first_layers(reader, 3 if third else 0),
        **groups(reader, third),
    }


def first_layers(reader: Reader, default: int) -> tuple[int, ...]:
    """Those without experts."""
    count = reader.number("first_k_dense_replace", default, zero=True)
    if not count.is_integer():
        raise reader.refusal("first_k_dense_replace", f"a whole number is needed, found {count!r}")
    return tuple(range(min(int(count), reader.integer("num_hidden_layers"))))


def groups(reader: Reader, third: bool) -> dict[str, Any]:
    """In how many groups experts stand, and how many of these a token's are of. The second version has them by a topk_method only."""
    method = "noaux_tc" if third else reader.text("topk_method", "greedy")
    if method == "greedy":
        return {}
    if not third and method != "group_limited_greedy":
        raise reader.refusal("topk_method", f"{method!r} is not supported", "supported: greedy, group_limited_greedy")
    count, best = reader.integer("n_group", 8 if third else None), reader.integer("topk_group", 4 if third else None)
    key = next((key for key in EXPERT_COUNTS if reader.values.get(key) is not None), "n_routed_experts")
    experts, per_token = reader.integer(key, 256 if third else 64), reader.integer("num_experts_per_tok", 8 if third else None)
    if experts % count or experts // count < (2 if third else 1):
        raise reader.refusal("n_group", f"{experts} experts do not make {count} groups" + (" of two or more" if third else ""))
    if per_token > experts:
        raise reader.refusal("num_experts_per_tok", f"a token cannot go through {per_token} of {experts} experts")
    if best > count or per_token > best * (experts // count):
        what = f"{per_token} experts of a token cannot be of {best} groups out of {count}, of {experts // count} experts each"
        raise reader.refusal("topk_group", what)
    return {"n_group": count, "topk_group": best}


def latent_to_hf(config: Config) -> dict[str, Any]:
    third = config.routing == "corrected"
    assert config.mlp_only_layers == tuple(range(len(config.mlp_only_layers))), "layers without experts are the first ones"
    return {
        "head_dim": config.qk_rope_head_dim,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.head_dim - config.qk_rope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "n_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "first_k_dense_replace": len(config.mlp_only_layers),
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "topk_method": "noaux_tc" if third else "greedy" if config.n_group == 1 else "group_limited_greedy",
        "scoring_func": "sigmoid" if third else "softmax",
        **({"num_nextn_predict_layers": 0} if third else {}),  # layers that predict further tokens are left out
    }


READ: Mapping[str, Callable[[Reader], dict[str, Any]]] = {"falcon": falcon, "deepseek_v2": latent, "deepseek_v3": latent}
WRITE: Mapping[str, Callable[[Config], dict[str, Any]]] = {
    "falcon": falcon_to_hf,
    "deepseek_v2": latent_to_hf,
    "deepseek_v3": latent_to_hf,
}
