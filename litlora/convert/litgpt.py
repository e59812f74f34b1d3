"""LitGPT's layout: model_config.yaml, lit_model.pth, and what `litgpt finetune lora` leaves.

The fused weight is `attn.qkv`, rows in the order q, k, v; in older LitGPT it was `attn.attn`, in groups: the query heads that share a
key head, that key head, its value head, and so on. The name tells which. A LoRA on the fused weight has one A and one B for the parts
that are trained: A's rows are R for each of them, one under the other, B's the rows of each (litgpt/lora.py, 0.5.13).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.reading import file_in, read_bytes, read_json
from litlora.config import Config
from litlora.convert.parts import Part
from litlora.errors import UserError
from litlora.families import Reader, config_from_hf
from litlora.methods.tuning import HEAD
from litlora.peft import PREFIX

LAYER = r"transformer\.h\.(\d+)\."
RENAMED = {  # in a block: Hugging Face's name
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
FUSED, OLD_FUSED = "attn.qkv", "attn.attn"
QKV = ("q_proj", "k_proj", "v_proj")
EMBEDDING = "transformer.wte.weight"
Order = np.ndarray[Any, np.dtype[np.intp]]

# Keys of model_config.yaml and what they must be for the model to be one of those that litlora computes.
NEEDED: dict[str, tuple[Any, ...]] = {
    "norm_class_name": ("RMSNorm",),
    "mlp_class_name": ("LLaMAMLP",),
    "parallel_residual": (False,),
    "shared_attention_norm": (None, False),
    "rotary_percentage": (1, 1.0),
    "rope_interleave": (None, False),
    "post_attention_norm": (None, False),
    "post_mlp_norm": (None, False),
    "norm_qk_type": (None, "default"),
    "norm_1": (None, True),
    "norm_2": (None, True),
    "n_expert": (None, 0),
    "scale_embeddings": (None, False),
    "lm_head_bias": (None, False),
    "attention_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "latent_attention": (None,),
    "rope_local_base_freq": (None,),
    "rope_indices": (None,),
}
DEFAULTS = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "parallel_residual": True, "rotary_percentage": 0.25}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What is needed to take the fused weight apart: query heads, key/value heads, head size."""

    query: int
    shared: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        return self.query * self.size, self.shared * self.size, self.shared * self.size


def read_yaml(directory: Path, name: str) -> dict[str, Any]:
    """The mapping in a YAML file, which may hold nothing but plain values. UserError."""
    import yaml

    path = file_in(directory, name)
    try:
        values = yaml.safe_load(read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"is no plain YAML: {' '.join(str(error).split())[:160]}", where=path) from error
    if not isinstance(values, dict):
        raise UserError("holds no mapping", where=path)
    return values


# ---- model_config.yaml -----------------------------------------------------------------------------------------------


def heads_of(values: Mapping[str, Any], where: Path) -> Heads:
    reader = Reader(values, where)
    query, width = reader.integer("n_head"), reader.integer("n_embd")
    return Heads(query=query, shared=reader.integer("n_query_groups", query), size=reader.integer("head_size", max(1, width // query)))


def litgpt_config(
    values: Mapping[str, Any], where: Path, directory: Path, tensors: Mapping[str, Part], weights: Path
) -> tuple[Config, Heads]:
    """The Config that a model_config.yaml means. UserError naming the key that asks for another arithmetic."""
    reader, heads = Reader(values, where), heads_of(values, where)
    for key, wanted in NEEDED.items():
        value = values.get(key, DEFAULTS.get(key))
        if value not in wanted:
            hint = "of LitGPT's models those that are Llama, Mistral, Qwen 2, 2.5 or 3 can be converted"
            raise reader.refusal(key, f"{value!r} is not supported", hint)
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise UserError(f"lacks {EMBEDDING}", where=weights)
    scalar = values.get("attention_scores_scalar")
    if scalar not in (None, heads.size):
        raise reader.refusal("attention_scores_scalar", f"{scalar!r} is not supported, only the head's size {heads.size}")
    head, embedding = tensors.get(HEAD), tensors[EMBEDDING]
    tied = head is None or (head.dtype == embedding.dtype and np.array_equal(head.bytes(), embedding.bytes()))
    biased, attention = reader.flag("bias", True), reader.flag("attn_bias")
    config: dict[str, Any] = {
        "model_type": model_type(values, reader, attention and not biased),
        "vocab_size": embedding.shape[0],
        "hidden_size": reader.integer("n_embd"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("n_layer"),
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.shared,
        "head_dim": heads.size,
        "max_position_embeddings": reader.integer("block_size", 4096),
        "rms_norm_eps": reader.number("norm_eps", 1e-5),
        "rope_theta": float(reader.number("rope_base", 10_000)),
        "rope_scaling": rope_scaling(values, reader),
        "tie_word_embeddings": tied,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16"}.get(embedding.dtype, "float32"),
        "sliding_window": values.get("sliding_window_size"),
        **({"attention_bias": True, "mlp_bias": True} if biased else {}),
        **named_tokens(directory),
    }
    return config_from_hf(config, where), heads


def model_type(values: Mapping[str, Any], reader: Reader, attention_only: bool) -> str:
    """Told from the arithmetic; Mistral without a window computes what Llama does, and is known by its name."""
    window = values.get("sliding_window_size")
    slides = values.get("sliding_window_indices")
    if window is not None and slides is not None and not isinstance(slides, list):
        raise reader.refusal("sliding_window_indices", f"{slides!r} is no list with an entry for each layer")
    if window is not None and slides is not None and not all(slides[: reader.integer("n_layer")]):
        raise reader.refusal("sliding_window_indices", "layers of several types are not supported")
    if reader.flag("norm_qk"):
        if attention_only:
            raise reader.refusal("attn_bias", "a bias on q, k and v alone is not supported beside norms of q and k")
        return "qwen3"
    if attention_only:
        return "qwen2"
    return "mistral" if window is not None or "mistral" in str(values.get("name", "")).lower() else "llama"


def rope_scaling(values: Mapping[str, Any], reader: Reader) -> dict[str, Any] | None:
    condensed, adjusted = reader.number("rope_condense_ratio", 1), values.get("rope_adjustments")
    if adjusted is None:
        return {"rope_type": "linear", "factor": condensed} if condensed != 1 else None
    known = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if not isinstance(adjusted, Mapping) or adjusted.keys() != known or condensed != 1:
        raise reader.refusal("rope_adjustments", f"{adjusted!r} is not supported", "supported: those of Llama 3.1 and later")
    scaling = {key: float(adjusted[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": int(adjusted["original_max_seq_len"])}


def named_tokens(directory: Path) -> dict[str, Any]:
    """The ids that begin and end a text, which LitGPT keeps in generation_config.json alone."""
    found = read_json(directory, names.GENERATION_CONFIG) if (directory / names.GENERATION_CONFIG).exists() else {}
    return {key: found.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


# ---- lit_model.pth ---------------------------------------------------------------------------------------------------


def model_in_hf(tensors: Mapping[str, Part], heads: Heads, where: Path) -> tuple[dict[str, Part], dict[str, str]]:
    """The tensors under Hugging Face's names, q, k and v apart; and what each was called. UserError of a name that is no model's."""
    found: dict[str, Part] = {}
    origins: dict[str, str] = {}
    for name, part in tensors.items():
        place = placed(name)
        if place.inside in (FUSED, OLD_FUSED):
            order = ungrouped(heads) if place.inside == OLD_FUSED else None
            homes = {f"{place.block}.self_attn.{target}": piece for target, piece in apart(part, heads.rows, name, where, order).items()}
        elif place.module is None:
            hint = "litlora convert --to peft takes a LitGPT LoRA" if "lora_" in name else "LitGPT's adapters cannot be converted"
            raise UserError(f"{name} is no tensor of a plain model", where=where, hint=hint)
        else:
            homes = {place.module: part}
        for module, piece in homes.items():
            found[f"{module}.{place.kind}"], origins[f"{module}.{place.kind}"] = piece, name
    return found, origins


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one of LitGPT's names belongs."""

    block: str  # under Hugging Face's name; empty outside of the blocks
    inside: str  # what LitGPT calls the module in its block
    module: str | None  # Hugging Face's name of it; None: it has none, or several
    kind: str  # weight, bias, lora_A ...


def placed(name: str) -> Place:
    module, _, kind = name.rpartition(".")
    found = re.match(LAYER, name)
    if found is None:
        return Place(block="", inside="", module=OUTSIDE.get(module), kind=kind)
    block, inside = f"model.layers.{found[1]}", module[found.end() :]
    return Place(block=block, inside=inside, module=f"{block}.{RENAMED[inside]}" if inside in RENAMED else None, kind=kind)


def apart(whole: Part, rows: tuple[int, ...], name: str, where: Path, order: Order | None = None) -> dict[str, Part]:
    """q, k and v out of the rows of one tensor, which are put in `order` first; 0 rows: that one is not among them."""
    if not whole.shape or whole.shape[0] != sum(rows):
        raise UserError(f"{name} has the shape {whole.shape}, and {sum(rows)} rows are needed", where=where)
    whole = whole if order is None else whole.in_order(order)
    starts = np.cumsum((0, *rows))
    return {target: whole.rows(int(starts[i]), int(starts[i + 1])) for i, target in enumerate(QKV) if rows[i]}


def ungrouped(heads: Heads) -> Order:
    """Rows of the older fused weight (for each key head: its query heads, itself, its value head) in the order q, k, v."""
    together = heads.query // heads.shared
    places = np.arange((heads.query + 2 * heads.shared) * heads.size).reshape(heads.shared, together + 2, heads.size)
    return np.concatenate([places[:, :together].ravel(), places[:, together].ravel(), places[:, together + 1].ravel()])


# ---- lit_model.pth.lora ----------------------------------------------------------------------------------------------


def lora_in_peft(
    tensors: Mapping[str, Part], options: Mapping[str, Any], config: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Any], dict[str, Part], dict[str, str]]:
    """(adapter_config.json, tensors by PEFT's names, what each was called) of what `litgpt finetune lora` trained.

    `options` is hyperparameters.yaml, `config` model_config.yaml. UserError where the tensors are not those that both mean.
    """
    where, reader = directory / names.LITGPT_LORA, Reader(options, directory / names.LITGPT_HYPERPARAMETERS)
    r, heads = reader.integer("lora_r"), heads_of(config, directory / names.LITGPT_CONFIG)
    asked = [reader.flag(f"lora_{word}") for word in ("query", "key", "value")]
    rows = tuple(count if on else 0 for count, on in zip(heads.rows, asked, strict=True))
    found: dict[str, Part] = {}
    origins: dict[str, str] = {}
    for name, part in tensors.items():
        place = placed(name)
        if place.inside == OLD_FUSED:
            hint = "merge it with the LitGPT that trained it (litgpt merge_lora), and convert the model"
            raise UserError(f"{name} is of an older LitGPT, whose fused rows mix q, k and v", where=where, hint=hint)
        if place.kind in ("lora_A", "lora_B") and place.inside == FUSED:
            pieces = apart(part, tuple(r if count else 0 for count in rows) if place.kind == "lora_A" else rows, name, where)
            homes = {f"{place.block}.self_attn.{target}": piece for target, piece in pieces.items()}
        elif place.kind in ("lora_A", "lora_B") and place.module is not None:
            homes = {place.module: part}
        else:
            raise UserError(f"{name} is no tensor of a LoRA", where=where)
        for module, piece in homes.items():
            stored = f"{PREFIX}{module}.{place.kind}.weight"
            found[stored], origins[stored] = piece, name
    if not found:
        raise UserError("holds no LoRA", where=where)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(options, config),
        "r": r,
        "lora_alpha": options.get("lora_alpha"),
        "lora_dropout": options.get("lora_dropout") or 0.0,
        "target_modules": list(dict.fromkeys(name.removesuffix(".weight").split(".")[-2] for name in found)),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    return values, found, origins


def base_name(options: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The base as Hugging Face names it, where LitGPT knew that, else the directory that LitGPT trained from."""
    known = config.get("hf_config")
    if isinstance(known, Mapping) and known.get("org") and known.get("name"):
        return f"{known['org']}/{known['name']}"
    return str(options.get("checkpoint_dir") or "")
