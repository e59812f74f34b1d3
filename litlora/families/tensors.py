"""Names and shapes of the weights of a model, and of a checkpoint's tensors."""

import re

from litlora.config import Config
from litlora.families.table import SUPPORTED
from litlora.families.wrapped import is_beside, text_name, whole_name

UNLEARNT = "gate.e_score_correction_bias"  # of a router: it follows the experts' load in pretraining, and has no gradient
LATENT_BIASED = ("q_a_proj", "kv_a_proj_with_mqa")  # the projections of latent attention that can have one


def learns(parameter: str) -> bool:
    """Whether a parameter of a model can be trained. One that cannot stays as it is, in its own dtype, in whatever is written."""
    return not parameter.endswith(UNLEARNT)


def is_beyond(name: str, config: Config) -> bool:
    """Whether a tensor is of a layer after the last one: DeepSeek-V3 is published with layers that predict further tokens."""
    found = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return config.routing == "corrected" and found is not None and int(found[1]) >= config.num_hidden_layers


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Every Linear of the model by its module name, in the model's order: (out, in). The head is among them, tied or not."""
    attention, layers = attention_shapes(config), range(config.num_hidden_layers)
    shapes = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in (attention | mlp_shapes(config, i)).items()}
    return shapes | {"lm_head": (config.vocab_size, config.hidden_size)}


def attention_shapes(config: Config) -> dict[str, tuple[int, int]]:
    C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    if config.kv_lora_rank:
        shapes = latent_shapes(config)
    elif config.qkv == "apart":
        shapes = {"q_proj": (H * D, C), "k_proj": (K * D, C), "v_proj": (K * D, C)}
    else:
        shapes = {"qkv_proj": ((H + 2 * K) * D, C)}
    return {f"self_attn.{name}": shape for name, shape in (shapes | {"o_proj": (C, H * config.value_dim)}).items()}


def latent_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """What makes q, k and v in latent attention."""
    C, H, D, kv = config.hidden_size, config.num_attention_heads, config.head_dim, config.kv_lora_rank
    q = config.q_lora_rank
    shapes = {"q_proj": (H * D, C)} if q is None else {"q_a_proj": (q, C), "q_b_proj": (H * D, q)}
    into, out = kv + config.qk_rope_head_dim, H * (D - config.qk_rope_head_dim + config.value_dim)
    return shapes | {"kv_a_proj_with_mqa": (into, C), "kv_b_proj": (out, kv)}


def mlp_shapes(config: Config, layer: int) -> dict[str, tuple[int, int]]:
    """Of one MLP, or of every expert of this layer."""
    if config.mlp == "stacked":
        return {}
    if not config.has_experts(layer):
        return {f"mlp.{name}": shape for name, shape in unit_shapes(config, config.intermediate_size).items()}
    expert = unit_shapes(config, config.moe_intermediate_size)
    shapes = {f"mlp.experts.{number}.{name}": shape for number in range(config.num_experts) for name, shape in expert.items()}
    shared = config.n_shared_experts * config.moe_intermediate_size
    return shapes | {f"mlp.shared_experts.{name}": shape for name, shape in (unit_shapes(config, shared) if shared else {}).items()}


def unit_shapes(config: Config, inner: int) -> dict[str, tuple[int, int]]:
    C = config.hidden_size
    into = {
        "gated": {"gate_proj": (inner, C), "up_proj": (inner, C)},
        "fused": {"gate_up_proj": (2 * inner, C)},
        "plain": {"up_proj": (inner, C)},
    }
    return into[config.mlp] | {"down_proj": (C, inner)}


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a base of this Config holds; no lm_head.weight where the embedding is the head."""
    C = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, C)}
    for name, (rows, columns) in linear_shapes(config).items():
        if name == "lm_head":
            continue
        tensors[f"{name}.weight"] = (rows, columns)
        if is_biased(name, config):
            tensors[f"{name}.bias"] = (rows,)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        if config.has_experts(number):
            tensors |= {f"{layer}.mlp.{name}": shape for name, shape in router_shapes(config).items()}
        for name, rank in (("q_a_layernorm", config.q_lora_rank), ("kv_a_layernorm", config.kv_lora_rank)):
            if rank:
                tensors[f"{layer}.self_attn.{name}.weight"] = (rank,)
        if config.attention_sinks:
            tensors[f"{layer}.self_attn.sinks"] = (config.num_attention_heads,)
        for name in config.norms.names:
            tensors |= norm_shapes(f"{layer}.{name}", (C,), config)
        if config.qk_norm is not None:
            D = config.head_dim
            for side, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                name = f"{layer}.self_attn.{side}_norm"
                if config.qk_norm == "heads_apart":
                    tensors |= {f"{name}.norms.{head}.weight": (D,) for head in range(heads)}
                    continue
                shape = {"head": (D,), "heads": (heads, D), "width": (heads * D,)}[config.qk_norm]
                tensors |= norm_shapes(name, shape, config)
    tensors |= norm_shapes("model.norm", (C,), config)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, C)
    return tensors | ({"lm_head.bias": (config.vocab_size,)} if config.lm_head_bias else {})


def router_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """What experts have besides their Linears: the router, and, stacked, themselves."""
    E, C, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"gate.weight": (E, C)} | ({"gate.bias": (E,)} if config.router_bias else {})
    if config.routing == "corrected":
        shapes[UNLEARNT] = (E,)
    if config.mlp != "stacked":
        return shapes
    stacks: dict[str, tuple[int, ...]] = {"gate_up_proj": (E, C, 2 * inner), "gate_up_proj_bias": (E, 2 * inner)}
    stacks |= {"down_proj": (E, inner, C), "down_proj_bias": (E, C)}
    return shapes | {f"experts.{name}": shape for name, shape in stacks.items()}


def is_biased(linear: str, config: Config) -> bool:
    kind, name = linear.split(".")[3], linear.rpartition(".")[2]
    if kind == "mlp":
        return config.mlp_bias
    if name == "o_proj":
        return config.attention_out_bias
    return config.attention_bias and not (config.kv_lora_rank and name not in LATENT_BIASED)


def norm_shapes(name: str, shape: tuple[int, ...], config: Config) -> dict[str, tuple[int, ...]]:
    parts = [part for part, there in (("weight", config.norm_gain), ("bias", config.norm_bias)) if there]
    return {f"{name}.{part}": shape for part in parts}


def tensor_name(name: str, config: Config | None = None) -> str:
    """The parameter (or module) that a checkpoint's tensor belongs to: saved without its head, a model drops the `model.` in front.

    `config` for the families whose names are not Llama's (`Family.names`).
    """
    table = {} if config is None else SUPPORTED[config.model_type].names
    if config is not None and config.text_of:
        name = text_name(name)
    for ours, stored in table.items():
        name = f".{name}.".replace(f".{stored}.", f".{ours}.").strip(".")
    return f"model.{name}" if re.match(r"(layers|embed_tokens|norm)\.", name) else name


def stored_name(name: str, config: Config) -> str:
    """The inverse: what a parameter or module is called in a checkpoint of its family, and by its users."""
    for ours, stored in SUPPORTED[config.model_type].names.items():
        name = f".{name}.".replace(f".{ours}.", f".{stored}.").strip(".")
    return whole_name(name) if config.text_of else name


def is_derived(name: str, config: Config | None = None) -> bool:
    """Whether a tensor of a checkpoint is no parameter: old models carry their rotary frequencies and masks along, models of text and
    images a vision tower."""
    if config is not None and is_beside(name, config):
        return True
    return name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"))
