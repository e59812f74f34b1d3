"""What several test files build on: tiny models with unfriendly shapes, the same in transformers, and the shared data.

Import it by name: `from conftest import tiny_gpt`.
"""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from litlora.config import Config
from litlora.families import config_from_hf
from litlora.model import GPT

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("LITLORA_SHARED_DATA", ROOT.parent / "shared" / "data"))

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


# name -> the keys of its config.json that are not COMMON's
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
    "smollm": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def tiny_hf_config(family: str = "llama3", **changes: Any) -> dict[str, Any]:
    """A config.json for a tiny model of the family."""
    return {**COMMON, **FAMILIES[family], **changes}


def tiny_config(family: str = "llama3", **changes: Any) -> Config:
    """The same as a Config; `changes` are keys of config.json."""
    return config_from_hf(tiny_hf_config(family, **changes), "config.json")


def tiny_gpt(family: str = "llama3", seed: int = 0, **changes: Any) -> GPT:
    """A tiny GPT in eval mode, every tensor random: gains of 1 and biases of 0 would hide mistakes."""
    return randomise(GPT(tiny_config(family, **changes)), seed).eval()


@torch.no_grad()
def randomise(model: GPT, seed: int = 0) -> GPT:
    """Fill every parameter, adapters included, so that each one moves the logits. In place; the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.3 * noise
        elif name.endswith("magnitude"):
            noise = parameter.float().cpu() * (1 + 0.2 * noise)
        elif parameter.dim() == 1:
            noise = 0.3 * noise
        elif name.endswith("embed_tokens.weight"):
            noise = (0.12 if model.config.tie_word_embeddings else 0.4) * noise  # a tied head reads it too
        else:
            noise = 0.8 * noise / math.sqrt(parameter.size(1))
        parameter.copy_(noise)
    return model


def transformers_model(family: str, weights_of: GPT | None = None, **changes: Any) -> Any:
    """The same model in transformers, in eval mode, with plain attention and `weights_of`'s weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**tiny_hf_config(family, **changes), attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    if weights_of is not None:
        model.load_state_dict(weights_of.state_dict(), strict=True)
    return model


def random_tokens(rows: int, length: int, seed: int = 0, vocab_size: int = COMMON["vocab_size"]) -> torch.Tensor:  # (B, T)
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """||ours - theirs|| / ||theirs||; 0 where both are zero."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = torch.linalg.vector_norm(ours - theirs)
    return float(difference / torch.linalg.vector_norm(theirs)) if difference > 0 else 0.0
