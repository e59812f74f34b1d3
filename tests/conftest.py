"""What several test files build on: tiny models with unfriendly shapes, the same in transformers, and the shared data.

Import it by name: `from conftest import tiny_gpt`.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litlora import cpu, kernels
from litlora.config import Config
from litlora.families import SUPPORTED, config_from_hf, stored_name, tensor_name
from litlora.model import GPT, Experts

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("LITLORA_SHARED_DATA", ROOT.parent / "shared" / "data"))

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run as Python then
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny models: threads would only wait for each other


def shared_data(relative: str) -> Path:
    """A real file or directory that the repository does not carry; the test is skipped where it is absent."""
    path = SHARED_DATA / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; LITLORA_SHARED_DATA names the directory that holds {relative}")
    return path


# Unfriendly on purpose: K < H, H * D is not C, nothing is a power of two.
COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def stretched(kind: str, factor: float, original: int, **more: Any) -> dict[str, Any]:
    scaling = {"rope_type": kind, "factor": factor, **more}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling, "max_position_embeddings": int(original * factor), "rope_theta": 200.0}


SQUARE = {"hidden_size": 48, "head_dim": 12}  # where H * D can be nothing but C
FALCON = {**SQUARE, "head_dim": ..., "model_type": "falcon", "hidden_act": "gelu", "tie_word_embeddings": True}  # ...: without this key

# name -> the keys of its config.json that are not COMMON's. On these every promise is tried.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", **stretched("llama3", 4.0, 32, low_freq_factor=1.0, high_freq_factor=4.0)},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "linear": {"model_type": "llama", **stretched("linear", 3.0, 20)},
    "yarn": {"model_type": "llama", **stretched("yarn", 4.0, 32, beta_fast=4.0, beta_slow=0.5)},
    "yarn_mscale": {"model_type": "llama", **stretched("yarn", 4.0, 32, truncate=False, mscale=1.2, mscale_all_dim=0.7)},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "attention_bias": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "attention_bias": True,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 28,
        "mlp_only_layers": [1],
    },
    "smollm": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 7, "partial_rotary_factor": 2 / 3, "original_max_position_embeddings": 48},
    "stablelm": {"model_type": "stablelm", **SQUARE, "partial_rotary_factor": 1 / 3, "use_qkv_bias": True, "use_parallel_residual": True},
}

# The other families that are supported: logits, gradients, cache, LLaMA-Pro, export; not every method on each.
MORE: dict[str, dict[str, Any]] = {
    "gemma": {"model_type": "gemma", "hidden_act": "gelu", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 7},
    "qwen3_moe_sparse": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 44,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "swiglu_limit": 0.8,
        "attention_bias": True,
        **stretched("yarn", 4.0, 32, truncate=False),
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "head_dim": ...,
        "q_lora_rank": None,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 28,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.3,
        **stretched("yarn", 4.0, 32, mscale=1.2, mscale_all_dim=0.7),
    },
    "deepseek_v2_groups": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "head_dim": ...,
        "q_lora_rank": 11,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 10,
        "v_head_dim": 20,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 28,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "head_dim": ...,
        "q_lora_rank": 11,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 28,
        "first_k_dense_replace": 1,
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "attention_bias": True,
        **stretched("yarn", 4.0, 32, mscale=1.2, mscale_all_dim=0.7),
    },
    "longrope": {
        "model_type": "phi3",
        **SQUARE,
        "partial_rotary_factor": 2 / 3,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6],
            "long_factor": [1.2, 2.0, 3.5, 6.0],
        },
    },
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 200.0},
    "granite": {
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.17,
        "logits_scaling": 2.5,
    },
    "olmo": {"model_type": "olmo"},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 7, **stretched("yarn", 4.0, 32)},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "stablelm_2": {"model_type": "stablelm", **SQUARE, "partial_rotary_factor": 1 / 3},
    "stablelm_12b": {
        "model_type": "stablelm",
        **SQUARE,
        "partial_rotary_factor": 1 / 3,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "cohere": {"model_type": "cohere", "logit_scale": 0.3, "tie_word_embeddings": True},
    "cohere2": {
        "model_type": "cohere2",
        **SQUARE,
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "cohere_plus": {"model_type": "cohere", "logit_scale": 0.3, "tie_word_embeddings": True, "use_qk_norm": True},
    "phi": {"model_type": "phi", **SQUARE, "partial_rotary_factor": 1 / 3},
    "phi_normed": {"model_type": "phi", **SQUARE, "partial_rotary_factor": 1 / 3, "qk_layernorm": True},
    "pythia": {"model_type": "gpt_neox", **SQUARE, "hidden_act": "gelu", "rotary_pct": 1 / 3, "num_key_value_heads": 4},
    "pythia_serial": {
        "model_type": "gpt_neox",
        **SQUARE,
        "hidden_act": "gelu_fast",
        "rotary_pct": 1 / 3,
        "num_key_value_heads": 4,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "falcon": {**FALCON, "multi_query": True},
    "falcon_40b": {**FALCON, "new_decoder_architecture": True},
    "falcon_2": {**FALCON, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "falcon_serial": {**FALCON, "num_key_value_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True},
    "glm": {"model_type": "glm", "partial_rotary_factor": 1 / 3, "attention_bias": True},
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 1 / 3, "attention_bias": True},
}
EVERY = FAMILIES | MORE
EXPERTS = [family for family, keys in EVERY.items() if "num_experts_per_tok" in keys]


def tiny_hf_config(family: str = "llama3", **changes: Any) -> dict[str, Any]:
    """A config.json for a tiny model of the family."""
    values = {**COMMON, **EVERY[family], **changes}
    own = SUPPORTED[values["model_type"]]
    return {own.keys.get(key, key): value for key, value in values.items() if value is not ...}


def tiny_config(family: str = "llama3", **changes: Any) -> Config:
    """The same as a Config; `changes` are keys of config.json."""
    return config_from_hf(tiny_hf_config(family, **changes), "config.json")


def tiny_gpt(family: str = "llama3", seed: int = 0, **changes: Any) -> GPT:
    """A tiny GPT in eval mode, every tensor random: gains of 1 and biases of 0 would hide mistakes."""
    return randomise(GPT(tiny_config(family, **changes)), seed).eval()


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that blocks have autograd keep inside, each storage once; of a cheap one what it is made of."""
    held: dict[int, Tensor] = {}
    found: list[Tensor] = []
    honest = kernels.packed

    def pack(tensor: Tensor) -> Any:
        kept = honest(tensor)
        for one in kernels.really_kept(kept):
            if one.untyped_storage().data_ptr() not in held:
                found.append(held.setdefault(one.untyped_storage().data_ptr(), one))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "packed", pack)
        yield found


@torch.no_grad()
def randomise(model: GPT, seed: int = 0) -> GPT:
    """Fill every parameter, adapters included, so that each one moves the logits. In place; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight") or (name.endswith("weight") and parameter.dim() == 1):
            noise = 1 - model.config.norm_offset + 0.3 * noise
        elif name.endswith("magnitude"):
            noise = parameter.float().cpu() * (1 + 0.2 * noise)
        elif parameter.dim() == 1:
            noise = (0.3 if parameter.requires_grad else 0.05) * noise  # a router's correction: more would be all that counts
        elif name.endswith("embed_tokens.weight"):
            noise = (0.12 if model.config.tie_word_embeddings else 0.4) * noise  # a tied head reads it too
        else:
            noise = 0.8 * noise / math.sqrt(parameter.size(1))
        parameter.copy_(noise)
    return model


def transformers_model(family: str, weights_of: GPT | None = None, **changes: Any) -> Any:
    """The same model in transformers, in eval mode, with plain attention and `weights_of`'s weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**tiny_hf_config(family, **changes), attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    if weights_of is not None:
        model.load_state_dict(state_of(weights_of), strict=True)
    return model


def state_of(model: GPT) -> dict[str, torch.Tensor]:
    """Its parameters under the names that transformers has for them in memory, where gpt_neox has a new one for its head, and the
    experts of a layer are one tensor."""
    apart = ".experts." if model.config.mlp != "stacked" else None  # gpt-oss has them as transformers does
    state = {stored_name(name, model.config): tensor for name, tensor in model.state_dict().items() if not apart or apart not in name}
    state = {name.replace("embed_out", "lm_head").replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}
    return state | (fused_experts(model) if apart else {})


def fused_experts(model: GPT) -> dict[str, torch.Tensor]:
    """gate_up_proj (E, 2 inner, C) and down_proj (E, C, inner) of every layer with experts."""
    fused = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Experts):
            units = [{part: linear.weight.detach() for part, linear in expert.named_children()} for expert in layer.experts]
            fused[f"{name}.experts.gate_up_proj"] = torch.stack([torch.cat((one["gate_proj"], one["up_proj"])) for one in units])
            fused[f"{name}.experts.down_proj"] = torch.stack([one["down_proj"] for one in units])
    return fused


def by_our_names(theirs: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """The inverse of `state_of`, for parameters of transformers in memory or their gradients."""
    found = {}
    for name, tensor in theirs.items():
        name = tensor_name(name, config) if "experts" not in name else name
        if config.mlp == "stacked":
            found[name] = tensor
        elif name.endswith("experts.gate_up_proj"):
            for number, (gate, up) in enumerate(one.chunk(2) for one in tensor):
                found[name.replace("gate_up_proj", f"{number}.gate_proj.weight")] = gate
                found[name.replace("gate_up_proj", f"{number}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{number}.down_proj.weight"): one for number, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def random_tokens(rows: int, length: int, seed: int = 0, vocab_size: int = COMMON["vocab_size"]) -> torch.Tensor:  # (B, T)
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, by its name."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||; 0 where both are zero, and no number where one of them is none."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = torch.linalg.vector_norm(ours - theirs)
    return 0.0 if difference == 0 else float(difference / torch.linalg.vector_norm(theirs))


@pytest.fixture
def without_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where litlora was installed without a C compiler: torch computes an answer's tokens too."""
    monkeypatch.setattr(cpu, "working", lambda: None)
