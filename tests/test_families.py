"""families against the transformers package, which decides what a config.json means."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data, tiny_hf_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from litlora.config import Config, Rope, expanded_config
from litlora.errors import UserError
from litlora.families import SUPPORTED, changed_keys, config_from_hf, config_to_hf, expected_tensors, is_derived, linear_shapes, tensor_name
from litlora.model import GPT, Linear

WHERE = "config.json"
CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES = {  # unfriendly: H * D is not C in the families that allow it, K < H, nothing a power of two
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3-without-original": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": YARN,
    "yarn-without-original": {"rope_type": "yarn", "factor": 4.0},
    "yarn-everything": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama-rope-{name}": ("llama", {"rope_parameters": {"rope_theta": 7000.0, **rope}}) for name, rope in ROPES.items()},
    "llama-heads": ("llama", {"num_key_value_heads": None}),
    "llama-head-dim": ("llama", {"head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "initializer_range": 0.1}),
    "llama-tokens": ("llama", {"eos_token_id": [5, 3, 9], "bos_token_id": None, "pad_token_id": 0, "dtype": "bfloat16"}),
    "llama-no-tokens": ("llama", {"eos_token_id": None, "bos_token_id": None}),
    "mistral-slides-by-itself": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 10}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-unused": ("qwen2", {"sliding_window": 9, "max_window_layers": 1}),
    "qwen2-upper-layers-slide": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2-window-above-all": ("qwen2", {"use_sliding_window": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {"rope_theta": 1e6, **YARN}, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-head-dim-and-bias": ("qwen3", {"head_dim": 10, "attention_bias": True}),
    "qwen3-layer-types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}

NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}  # what even transformers' default leaves open


def meaning(hf: PreTrainedConfig) -> Config:
    """What transformers made of a config.json, read off the attributes that its models use."""
    parameters = {key: value for key, value in hf.rope_parameters.items() if value is not None and key != "type"}
    if parameters["rope_type"] == "default":
        parameters = {"rope_theta": parameters["rope_theta"]}
    types = tuple(getattr(hf, "layer_types", None) or ())
    if hf.model_type == "mistral" and hf.sliding_window is not None:
        types = ("sliding_attention",) * hf.num_hidden_layers
    slides = "sliding_attention" in types
    eos = hf.eos_token_id
    return Config(
        **{name: getattr(hf, name) for name in ("model_type", *SIZES, "rms_norm_eps", "tie_word_embeddings", "initializer_range")},
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rope=Rope(**parameters),
        attention_bias=hf.model_type == "qwen2" or getattr(hf, "attention_bias", False),
        attention_out_bias=getattr(hf, "attention_bias", False),
        mlp_bias=getattr(hf, "mlp_bias", False),
        qk_norm="head" if hf.model_type == "qwen3" else None,
        sliding_window=hf.sliding_window if slides else None,
        layer_types=types if slides else (),
        bos_token_id=hf.bos_token_id,
        pad_token_id=hf.pad_token_id,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        torch_dtype=str(hf.dtype or "float32").removeprefix("torch."),
    )


def saved(directory: Path, model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 5 writes it."""
    CLASSES[model_type](**{**SIZES, **changes}).save_pretrained(directory)
    written: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return written


def old_spelling(config: dict[str, Any], kind_key: str) -> dict[str, Any]:
    """The same config with the keys of transformers 4."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {kind_key: kind, **rope}
    return old | ({"torch_dtype": config["dtype"]} if config.get("dtype") else {})


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder",
    [
        "tokenizers/smollm",
        "tokenizers/llama-3",
        "tokenizers/llama-3.2-3b-config",
        "tokenizers/mistral-v0.3",
        "tokenizers/qwen3",
        "models/stories3m-llama",
    ],
)
def test_a_published_config_means_what_transformers_says(folder: str) -> None:
    """Must catch: eos read as one id, the rope's factor dropped, head_dim always derived."""
    directory = shared_data(folder)
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)  # llama-3 was published quantised; that is another test
    assert config_from_hf(config, directory) == meaning(AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("folder", ["gemma-config", "phi-3", "pythia"])
def test_a_published_config_means_the_same_with_every_default_written_out(folder: str) -> None:
    """Must catch: gelu of the first Gemmas taken as it is written; a window of Phi 3, or the share of Pythia's heads that turns, lost."""
    directory = shared_data(f"tokenizers/{folder}")
    ours = config_from_hf(json.loads((directory / "config.json").read_text()), directory)
    assert ours == config_from_hf(AutoConfig.from_pretrained(directory).to_dict(), directory)
    seen = (ours.hidden_act, ours.sliding_window, ours.rope.partial_rotary_factor, ours.qkv, ours.norm_offset)
    assert (
        seen
        == {
            "gemma-config": ("gelu_pytorch_tanh", None, 1.0, "apart", 1.0),
            "phi-3": ("silu", 2047, 1.0, "stacked", 0.0),
            "pythia": ("gelu", None, 0.25, "grouped", 0.0),
        }[folder]
    )


GEMMA_3 = {  # of the shapes of the model of 270 million, which a published adapter of it proves below; no copy of its file
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}


def test_a_real_adapter_of_a_gemma_fits_its_modules() -> None:
    """N02: made by others for the Gemma 3 of 270 million. Its tensors are exactly those that its config means on that model."""
    from safetensors import safe_open

    from litlora.methods import from_peft
    from litlora.peft import adapter_config_from_peft

    directory = shared_data("adapters/gemma3-270m-lora")
    config = config_from_hf(GEMMA_3, WHERE)
    assert config.local_rope == Rope(rope_theta=10000.0)
    assert config.rope == Rope(rope_theta=1000000.0)
    described = adapter_config_from_peft(json.loads((directory / "adapter_config.json").read_text()), directory)
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert from_peft(described, config).file_shapes(config) == found


@pytest.mark.parametrize("case", CASES)
def test_a_config_saved_by_transformers_means_the_same_to_both(case: str, tmp_path: Path) -> None:
    """Must catch: `i > max_window_layers`, a window used although use_sliding_window is false, K defaulting to H everywhere."""
    config = saved(tmp_path, *CASES[case])
    assert config_from_hf(config, WHERE) == meaning(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
@pytest.mark.parametrize("case", CASES)
def test_the_old_spelling_means_the_same_as_the_new(case: str, kind_key: str, tmp_path: Path) -> None:
    """Must catch: only one of rope_scaling and rope_parameters read."""
    new = saved(tmp_path, *CASES[case])
    old = old_spelling(new, kind_key)
    assert config_from_hf(old, WHERE) == config_from_hf(new, WHERE)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config_from_hf(old, WHERE) == meaning(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_what_a_config_leaves_out_takes_transformers_default(model_type: str, tmp_path: Path) -> None:
    """Must catch: K of a mistral without the key equal to H, rope_theta or a context of another family."""
    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 256}  # 32 heads: the default K of qwen must divide them
    bare = {"model_type": model_type, **NEEDED.get(model_type, {})} | {
        key: sizes[key] for key in SIZES if key not in ("num_key_value_heads", "max_position_embeddings")
    }
    (tmp_path / "config.json").write_text(json.dumps(bare))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert config_from_hf(bare, WHERE) == config_from_hf(theirs.to_dict(), WHERE)  # where every default is written out
    if model_type in CLASSES:
        assert config_from_hf(bare, WHERE) == meaning(theirs)


@pytest.mark.parametrize(
    ("own", "kv_heads", "norms"),
    [
        ({}, 1, ("input_layernorm",)),  # 7B
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, 3, ("ln_attn", "ln_mlp")),  # 40B, 180B
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, 2, ("input_layernorm",)),  # Falcon 2
        ({"multi_query": False, "bias": True}, 6, ("input_layernorm",)),
        ({"multi_query": False, "parallel_attn": False}, 6, ("input_layernorm", "post_attention_layernorm")),
    ],
)
def test_the_layouts_of_a_falcon_are_told_apart(own: dict[str, Any], kv_heads: int, norms: tuple[str, ...], tmp_path: Path) -> None:
    """As transformers lays them out, read and written. (Mutations seen to fail in test_parity.py: ln_attn and ln_mlp swapped, q k v of all
    heads one after the other.)"""
    config = {"model_type": "falcon", **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}, **own}
    ours = config_from_hf(config, WHERE)
    assert (ours.num_key_value_heads, ours.norms.names, ours.intermediate_size) == (kv_heads, norms, 4 * 36)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(ours))), WHERE) == ours
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {tensor_name(name, ours): tuple(tensor.shape) for name, tensor in theirs.named_parameters()} == expected_tensors(ours)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_without_layer_types_the_layers_from_max_window_layers_up_slide(model_type: str, first: int, tmp_path: Path) -> None:
    """As models were published before layer_types existed. Must catch: `i > max_window_layers`."""
    config = {"model_type": model_type, **SIZES, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": first}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_from_hf(config, WHERE) == meaning(AutoConfig.from_pretrained(tmp_path))
    assert config_from_hf(config, WHERE).layer_types.count("sliding_attention") == 3 - first


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", ["llama3-without-original", "yarn-without-original"])
def test_a_rope_without_its_first_context_takes_the_context(case: str, key: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES, key: ROPES[case]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_from_hf(config, WHERE) == meaning(AutoConfig.from_pretrained(tmp_path))
    assert config_from_hf(config, WHERE).rope.original_max_position_embeddings == SIZES["max_position_embeddings"]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_null_for_the_key_value_heads_is_as_many_as_query_heads(model_type: str) -> None:
    own = {"new_decoder_architecture": True, "num_kv_heads": None} if model_type == "falcon" else {"num_key_value_heads": None}
    config = {"model_type": model_type, **SIZES, "hidden_size": 48, **own, **NEEDED.get(model_type, {})}
    assert config_from_hf(config, WHERE).num_key_value_heads == SIZES["num_attention_heads"]


def test_a_null_is_as_good_as_an_absent_key() -> None:
    nulls = ["head_dim", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "torch_dtype"]
    config = {"model_type": "llama", **SIZES}
    assert config_from_hf(config | dict.fromkeys(nulls), WHERE) == config_from_hf(config, WHERE)


def test_a_first_context_beside_the_rope_wins_over_the_one_within(tmp_path: Path) -> None:
    config = saved(tmp_path, "llama", {"rope_parameters": {"rope_theta": 1e4, **YARN}, "original_max_position_embeddings": 48})
    config["original_max_position_embeddings"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = AutoConfig.from_pretrained(tmp_path)
    reference.standardize_rope_params()  # as the model does when it is built
    assert config_from_hf(config, WHERE) == meaning(reference)
    assert config_from_hf(config, WHERE).rope.original_max_position_embeddings == 48


MIXTRAL = {  # as published for the model of 8 x 7 billion
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN3_MOE = {  # as published for the model of 30 billion, 3 of them active
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


GPT_OSS = {  # as published for the model of 20 billion, less its quantization_config
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


DEEPSEEK: dict[str, Any] = {  # what both have as published
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
}
DEEPSEEK_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK_V2_LITE = {  # as published for the model of 16 billion
    **DEEPSEEK,
    "model_type": "deepseek_v2",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V3 = {  # as published, less its quantization_config
    **DEEPSEEK,
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("published", "billions", "seen"),
    [
        (MIXTRAL, 46.7, (8, 2, 14336, (), True)),
        (QWEN3_MOE, 30.5, (128, 8, 768, (), True)),
        (GPT_OSS, 20.9, (32, 4, 2880, (), True)),
        (DEEPSEEK_V2_LITE, 15.7, (64, 6, 1408, (0,), False)),
        (DEEPSEEK_V3, 671.0, (256, 8, 2048, (0, 1, 2), True)),
    ],
    ids=["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2_lite", "deepseek_v3"],
)
def test_a_published_config_with_experts_is_the_model_that_it_is_said_to_be(
    published: dict[str, Any], billions: float, seen: tuple[Any, ...], tmp_path: Path
) -> None:
    """M01: its parameters counted, and the config read, written by transformers, and read again."""
    config = config_from_hf(published, WHERE)
    assert sum(math.prod(shape) for shape in expected_tensors(config).values()) / 1e9 == pytest.approx(billions, abs=0.05)
    assert (
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.mlp_only_layers,
        config.norm_topk_prob,
    ) == seen
    (tmp_path / "config.json").write_text(json.dumps(published))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert config_from_hf(theirs.to_dict(), WHERE) == config
    assert config_from_hf(config_to_hf(config), WHERE) == config


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, ()),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"mlp_only_layers": [1]}, (1,)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2)),
    ],
)
def test_the_layers_without_experts_are_transformers(keys: dict[str, Any], dense: tuple[int, ...]) -> None:
    """Must catch: decoder_sparse_step counted from 0; a deeper model whose new list meets the old step."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    values = {"model_type": "qwen3_moe", **SIZES, **keys, "num_experts": 4, "num_experts_per_tok": 2}
    config = config_from_hf(values, WHERE)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert tuple(i for i, block in enumerate(theirs.model.layers) if not isinstance(block.mlp, Qwen3MoeSparseMoeBlock)) == dense
    assert config.mlp_only_layers == dense
    deeper = expanded_config(config, [0, 2])
    assert config_from_hf({**values, **changed_keys(config, deeper)}, WHERE) == deeper
    assert [deeper.has_experts(layer) for layer in range(5)] == [config.has_experts(layer) for layer in (0, 0, 1, 2, 2)]


# ---- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["gpt2"])
def test_another_family_is_refused_with_the_list_of_ours(folder: str) -> None:
    path = shared_data(f"tokenizers/{folder}") / "config.json"
    config = json.loads(path.read_text())
    with pytest.raises(UserError, match=config["model_type"]) as refused:
        config_from_hf(config, path)
    assert "stored transposed" in refused.value.what
    assert all(name in refused.value.hint for name in SUPPORTED)
    assert "model_type" in refused.value.where


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("llama", "pretraining_tp", 2),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "logits_scaling", 8.0),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "num_local_experts", 8),
        ("llama", "is_causal", False),
        ("llama", "layer_types", ["sliding_attention"] * 3),
        ("mistral", "layer_types", ["sliding_attention"] * 3),
        ("mistral", "attention_bias", True),
        ("mistral", "mlp_bias", True),
        ("mixtral", "router_jitter_noise", 0.1),
        ("mixtral", "num_experts_per_tok", 9),
        ("mixtral", "attention_bias", True),
        ("mixtral", "num_local_experts", "eight"),
        ("mixtral", "quantization_config", {"quant_method": "awq"}),
        ("qwen3_moe", "use_sliding_window", True),
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "moe_layer_freq", 2),
        ("deepseek_v2", "num_experts_per_tok", None),
        ("deepseek_v3", "num_experts_per_tok", 257),
        ("deepseek_v3", "topk_group", 9),
        ("deepseek_v3", "n_group", 3),
        ("deepseek_v3", "n_group", 256),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "qk_rope_head_dim", 7),
        ("deepseek_v3", "head_dim", 24),
        ("deepseek_v3", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("deepseek_v3", "mlp_bias", True),
        ("deepseek_v3", "first_k_dense_replace", 0.5),
        ("deepseek_v3", "kv_lora_rank", 0),
        ("deepseek_v3", "quantization_config", {"quant_method": "fp8"}),
        ("gpt_oss", "swiglu_limit", "none"),
        ("gpt_oss", "sliding_window", 0),
        ("gpt_oss", "mlp_bias", True),
        ("gpt_oss", "layer_types", ["chunked_attention"] * 3),
        ("gpt_oss", "num_experts_per_tok", 129),
        ("qwen3_moe", "mlp_only_layers", "all"),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "norm_topk_prob", 1),
        ("qwen3", "num_experts", 8),
        ("mistral", "kv_lora_rank", 8),
        ("qwen2", "mlp_bias", True),
        ("qwen3", "layer_types", ["full_attention"] * 2),
        ("qwen3", "layer_types", ["chunked_attention"] * 3),
        ("llama", "rope_scaling", {"type": "proportional", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("qwen2", "rope_scaling", {"type": "mrope", "mrope_section": [1, 1, 1]}),
        ("llama", "rope_scaling", {"rope_type": "linear"}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("qwen3", "rope_parameters", {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}),
        ("llama", "rope_theta", "10000"),
        ("llama", "hidden_size", "36"),
        ("llama", "hidden_size", 36.5),
        ("llama", "hidden_size", True),
        ("llama", "vocab_size", 0),
        ("llama", "vocab_size", float("inf")),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "head_dim", 7),
        ("llama", "num_key_value_heads", 4),
        ("llama", "tie_word_embeddings", "no"),
        ("llama", "eos_token_id", "</s>"),
        ("llama", "torch_dtype", 16),
    ],
)
def test_what_litlora_cannot_compute_is_refused_by_its_key(model_type: str, key: str, value: Any) -> None:
    """Must catch: a key dropped from NEUTRAL, a rope type that falls through to default."""
    with pytest.raises(UserError) as refused:
        config_from_hf({"model_type": model_type, **SIZES, key: value}, WHERE)
    assert refused.value.where.startswith(f"{WHERE}: {key}")


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma2", "hidden_act", "relu"),
        ("phi3", "partial_rotary_factor", 0.01),
        ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("granite", "embedding_multiplier", "12"),
        ("olmo", "clip_qkv", 8.0),
        ("smollm3", "no_rope_layers", [1, 0]),
        ("smollm3", "use_sliding_window", True),
        ("stablelm", "head_dim", 8),
        ("cohere2", "use_qk_norm", True),
        ("phi3", "qk_layernorm", True),
        ("glm4", "n_routed_experts", 8),
        ("falcon", "alibi", True),
        ("falcon", "num_ln_in_parallel_attn", 2),
        ("falcon", "activation", "swiglu"),
    ],
)
def test_what_a_family_cannot_be_is_refused_by_its_key(model_type: str, key: str, value: Any) -> None:
    config = {"model_type": model_type, **SIZES, "hidden_size": 72, key: value}
    with pytest.raises(UserError) as refused:
        config_from_hf(config, WHERE)
    assert refused.value.where.startswith(f"{WHERE}: {key}")


STRETCHES: dict[str, dict[str, Any]] = {  # whole ones, which a llama may have
    "linear": {},
    "dynamic": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3, "original_max_position_embeddings": 32},
    "default": {},
    "yarn": {"original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", STRETCHES)
@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_has_the_plain_rope_and_yarn(model_type: str, kind: str, key: str) -> None:
    """Others are refused by name. Caught: the check left out; `type` not looked at; rope_parameters not looked at."""
    for word in ("rope_type", "type"):
        values = {**tiny_hf_config(model_type), key: {word: kind, "factor": 2.0, **STRETCHES[kind]}}
        if key == "rope_parameters":
            values.pop("rope_scaling", None)
            values[key]["rope_theta"] = 200.0
        if kind in ("default", "yarn"):
            assert config_from_hf(values, WHERE).rope.rope_type == kind
            continue
        with pytest.raises(UserError, match=f"'{kind}' is not supported with latent attention"):
            config_from_hf(values, WHERE)


def test_a_model_of_text_and_images_is_refused_for_what_it_is() -> None:
    with pytest.raises(UserError, match="text and more") as refused:
        config_from_hf({"model_type": "llava", "text_config": GEMMA_3, "vision_config": {}}, WHERE)
    assert "gemma3_text" in refused.value.hint


def test_a_sliding_layer_without_a_window_is_refused() -> None:
    config = {"model_type": "qwen3", **SIZES, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3}
    with pytest.raises(UserError, match="use_sliding_window"):
        config_from_hf(config, WHERE)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type"]
)
def test_a_size_that_is_missing_is_named(key: str) -> None:
    config = {name: value for name, value in {"model_type": "llama", **SIZES}.items() if name != key}
    with pytest.raises(UserError, match=f"{key}: missing"):
        config_from_hf(config, WHERE)


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    config = {"model_type": "qwen2", **SIZES, "hidden_size": 38}
    with pytest.raises(UserError, match="no multiple"):
        config_from_hf(config, WHERE)
    assert config_from_hf(config | {"head_dim": 8}, WHERE).head_dim == 8


def test_a_published_quantised_llama_is_refused_with_what_to_do() -> None:
    path = shared_data("tokenizers/llama-3") / "config.json"
    with pytest.raises(UserError, match="quantization_config") as refused:
        config_from_hf(json.loads(path.read_text()), path)
    assert "before it was quantised" in refused.value.hint


# ---- the weights -----------------------------------------------------------------------------------------------------


def randomised(config: Config, seed: int = 0) -> GPT:
    """A GPT in which every tensor is random, gains and biases too: defaults of 1 and 0 would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_expected_tensors_are_transformers_tensors(case: str, tmp_path: Path) -> None:
    """Must catch: an o_proj bias in qwen2, a q_norm of the hidden size, lm_head.weight listed for a tied model."""
    config = config_from_hf(saved(tmp_path, *CASES[case]), WHERE)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}  # a tied head appears once
    assert expected_tensors(config) == shapes
    without_head = {tensor_name(name): tuple(tensor.shape) for name, tensor in reference.model.named_parameters()}
    assert without_head == {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    with torch.device("meta"):
        ours = GPT(config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.named_parameters()} == shapes
    hosts = {name: tuple(module.weight.shape) for name, module in ours.named_modules() if isinstance(module, Linear)}
    assert list(linear_shapes(config).items()) == list(hosts.items())


def test_an_old_llamas_rotary_frequencies_are_known_as_derived() -> None:
    assert is_derived("model.layers.3.self_attn.rotary_emb.inv_freq")
    assert not is_derived("model.layers.3.self_attn.q_proj.weight")


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_from_the_config_that_we_write(case: str, tmp_path: Path) -> None:
    """Must catch: rope_scaling without its factor, a bias left out, attention_factor forgotten, the window off by one layer."""
    config = config_from_hf(saved(tmp_path, *CASES[case]), WHERE)
    config = replace(config, torch_dtype="float32", sliding_window=config.sliding_window and min(config.sliding_window, 9))
    ours = randomised(config)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = theirs(tokens).logits, ours(tokens)
    assert (got - want).norm() / want.norm() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_that_we_write_can_be_read_alone(case: str, tmp_path: Path) -> None:
    config = config_from_hf(saved(tmp_path, *CASES[case]), WHERE)
    written = config_to_hf(config)
    new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    assert config_from_hf(new, WHERE) == config_from_hf(old, WHERE) == config


@st.composite
def llamas(draw: st.DrawFn) -> Config:
    heads, D = draw(st.integers(1, 6)), 2 * draw(st.integers(1, 6))
    kinds = st.sampled_from(["default", "linear", "llama3", "yarn"])
    kind, factor = draw(kinds), draw(st.floats(1.0, 40.0))
    stretched = {"rope_type": kind, "factor": factor} if kind != "default" else {}
    original = {"original_max_position_embeddings": draw(st.integers(1, 4096))} if kind in ("llama3", "yarn") else {}
    bias = draw(st.booleans())
    return Config(
        model_type="llama",
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=heads * D,
        intermediate_size=draw(st.integers(1, 999)),
        num_hidden_layers=draw(st.integers(1, 90)),
        num_attention_heads=heads,
        num_key_value_heads=1,
        head_dim=D,
        max_position_embeddings=draw(st.integers(1, 10**6)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        rope=Rope(rope_theta=draw(st.floats(1.0, 1e9)), **stretched, **original),
        attention_bias=bias,
        attention_out_bias=bias,
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.none() | st.integers(0, 99)),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
        pad_token_id=draw(st.none() | st.integers(0, 99)),
        torch_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@given(llamas())
@settings(max_examples=60, deadline=None)
def test_a_llama_survives_being_written_and_read(config: Config) -> None:
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config))), WHERE) == config
