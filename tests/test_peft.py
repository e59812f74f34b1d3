"""peft: adapter_config.json, ranks and scales, and the names in the file, against PEFT itself. (Which modules: test_targets.py.)"""

import json
import math
import re
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from litlora.errors import UserError
from litlora.families import config_from_hf
from litlora.methods import from_peft
from litlora.methods.tuning import LoRASlot
from litlora.options import AdapterOptions
from litlora.peft import (
    AdapterConfig,
    adapter_config_from_peft,
    adapter_config_to_peft,
    check_tensors,
    copied_base_tensor,
    is_prompt,
    prompt_from_peft,
    prompt_to_peft,
    rank_and_alpha,
    scale,
    to_peft_name,
)

WHERE = "adapter_config.json"
BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{i}.{name}" for i in range(12) for name in BLOCK] + ["lm_head"]  # 12: layer 1 must not match layer 11
MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
KEYS_WRITTEN = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def test_a_config_that_peft_writes_is_read_whole(tmp_path: Path) -> None:
    """N02. PEFT writes some forty keys. Must catch: use_rslora or a pattern ignored."""
    LoraConfig(
        r=5,
        lora_alpha=11,
        lora_dropout=0.25,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        use_dora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 2},
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        exclude_modules=["layers.2.self_attn.q_proj"],
        base_model_name_or_path="some/base",
        task_type="CAUSAL_LM",
        init_lora_weights="gaussian",
    ).save_pretrained(tmp_path)
    written = json.loads((tmp_path / WHERE).read_text())
    assert len(written) > 30
    config = adapter_config_from_peft(written, WHERE)
    assert config.target_modules == written["target_modules"]
    assert config == AdapterConfig(
        r=5,
        alpha=11.0,
        dropout=0.25,
        target_modules=config.target_modules,
        use_rslora=True,
        use_dora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 3},
        alpha_pattern={"down_proj": 2.0},
        layers_to_transform=[0, 2],
        layers_pattern=["layers"],
        exclude_modules=["layers.2.self_attn.q_proj"],
        base_model_name_or_path="some/base",
    )


def test_a_config_of_the_first_pefts_is_read() -> None:
    old = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    config = adapter_config_from_peft(old, WHERE)
    assert (config.r, config.alpha, config.dropout, config.target_modules) == (8, 16.0, 0.05, ["q_proj", "v_proj"])


def test_a_published_adapter_is_read_and_its_names_are_understood() -> None:
    folder = shared_data("adapters/gemma3-270m-lora")
    config = adapter_config_from_peft(json.loads((folder / WHERE).read_text()), folder / WHERE)
    assert (config.r, config.alpha, sorted(config.target_modules)) == (4, 16.0, ["k_proj", "o_proj", "q_proj", "v_proj"])
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
    ends = {".lora_A.weight", ".lora_B.weight"}
    hosts = {name.removeprefix("base_model.model.").removesuffix(end) for name in shapes for end in ends if name.endswith(end)}
    expected: dict[str, tuple[int, ...]] = {}
    for module in sorted(hosts):
        r, alpha = rank_and_alpha(config, module)
        wide, into = (shapes[f"base_model.model.{module}.lora_{side}.weight"][axis] for side, axis in (("B", 0), ("A", 1)))
        parts = LoRASlot(r=r, alpha=alpha).shapes(wide, into)
        expected |= {to_peft_name(f"{module}.adapter.{part}"): shape for part, shape in parts.items()}
    check_tensors(shapes, expected, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [""]),
        ("modules_to_save", [3]),
        ("ensure_weight_tying", "yes"),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"rank": 2}),
        ("megatron_config", {"tp": 2}),
        ("some_key_of_a_later_peft", {"gamma": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("r", "4"),
        ("r", 4.5),
        ("r", 0),
        ("r", True),
        ("r", None),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("use_dora", "yes"),
        ("use_rslora", 1),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", "(q_proj"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(": 8}),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_to_transform", "0"),
        ("base_model_name_or_path", 3),
    ],
)
def test_what_litlora_does_not_compute_is_refused_by_its_key(key: str, value: Any) -> None:
    """A01 (wrong alpha type). Must catch: a key moved to SILENT, r taken as text."""
    with pytest.raises(UserError) as refused:
        adapter_config_from_peft({**MINIMAL, key: value}, WHERE)
    assert refused.value.where.startswith(f"{WHERE}: {key}")


def test_a_pattern_and_layers_together_are_refused_as_in_peft() -> None:
    with pytest.raises(UserError, match="layers_to_transform"):
        adapter_config_from_peft({**MINIMAL, "target_modules": ".*q_proj", "layers_to_transform": [0]}, WHERE)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_is_refused_exactly_where_peft_changes_the_base(init: Any) -> None:
    """PEFT repeats the change whenever it loads such an adapter, so plain weights would not compute the same."""
    base = llama()
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    after = wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    config = {**MINIMAL, "init_lora_weights": init}
    if torch.equal(before, after):
        adapter_config_from_peft(config, WHERE)
    else:
        with pytest.raises(UserError, match="init_lora_weights"):
            adapter_config_from_peft(config, WHERE)


def test_what_we_write_has_few_keys_and_peft_loads_it_in_silence(tmp_path: Path) -> None:
    """Each key that PEFT added later broke the readers before it, so none is written that is not used."""
    written = adapter_config_to_peft(AdapterConfig(r=4, alpha=8.0, target_modules=["q_proj"], base_model_name_or_path="base"))
    assert set(written) == KEYS_WRITTEN
    assert type(written["lora_alpha"]) is int  # vLLM and PEFT declare a whole number
    (tmp_path / WHERE).write_text(json.dumps(written))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert (loaded.r, loaded.lora_alpha, loaded.target_modules, loaded.inference_mode) == (4, 8, {"q_proj"}, True)
    assert set(adapter_config_to_peft(AdapterConfig(r=4, alpha=8.5, target_modules=["q_proj"], use_dora=True))) == KEYS_WRITTEN | {
        "use_dora"
    }


names = st.sampled_from(["q_proj", "self_attn.k_proj", "mlp.down_proj", r"layers\.[01]\..*_proj", "model.layers.1.mlp.up_proj"])


@given(
    st.builds(
        AdapterConfig,
        r=st.integers(1, 256),
        alpha=st.floats(0.01, 512),
        target_modules=st.lists(names, min_size=1, max_size=3, unique=True),
        dropout=st.floats(0, 0.9),
        use_dora=st.booleans(),
        use_rslora=st.booleans(),
        rank_pattern=st.dictionaries(names, st.integers(1, 64), max_size=3),
        alpha_pattern=st.dictionaries(names, st.floats(0.01, 64), max_size=3),
        exclude_modules=st.lists(names, max_size=2) | names,
        layers_to_transform=st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=3),
        layers_pattern=st.lists(st.just("layers"), max_size=1),
        modules_to_save=st.lists(st.sampled_from(["embed_tokens", "lm_head", "model.norm"]), max_size=2, unique=True),
        ensure_weight_tying=st.booleans(),
        base_model_name_or_path=st.none() | st.text(),
    )
)
@settings(max_examples=100, deadline=None)
def test_a_config_survives_being_written_and_read(config: AdapterConfig) -> None:
    assert adapter_config_from_peft(json.loads(json.dumps(adapter_config_to_peft(config))), WHERE) == config


# ---- how strong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 3},
        {"layers.1.self_attn.q_proj": 3, "q_proj": 5},
        {"q_proj": 5, "layers.1.self_attn.q_proj": 3},
        {r"^model\.layers\.1\..*": 7},
        {r"model\.layers\.\d+\.mlp\..*": 7, ".*_proj": 9},
        {"proj": 2},
        {"layers.1": 2},
        {"lm_head": 6},
    ],
    ids=str,
)
def test_ranks_and_alphas_follow_the_patterns_as_in_peft(patterns: dict[str, int]) -> None:
    """Must catch: the last pattern that matches taken, a pattern matched anywhere in the name, alpha by rank's table."""
    values = {**MINIMAL, "rank_pattern": patterns, "alpha_pattern": dict(reversed(patterns.items()))}
    config = adapter_config_from_peft(values, WHERE)
    for name in NAMES:
        r = patterns.get(get_pattern_key(patterns.keys(), name), MINIMAL["r"])
        alpha = patterns.get(get_pattern_key(values["alpha_pattern"].keys(), name), MINIMAL["lora_alpha"])
        assert rank_and_alpha(config, name) == (r, alpha)


@given(st.floats(0.1, 100), st.integers(1, 100))
def test_the_scale_is_alpha_over_r_or_its_root(alpha: float, r: int) -> None:
    assert scale(alpha, r) == alpha / r
    assert scale(alpha, r, use_rslora=True) == alpha / math.sqrt(r)


# ---- learnt prompts --------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 80))
def test_a_prompts_config_survives_being_written_and_read(length: int, layers: int) -> None:
    options = AdapterOptions(kind="prompt", length=length, layers=[f"last:{layers}"])
    written = json.loads(json.dumps(prompt_to_peft(options, layers, "base")))
    assert is_prompt(written)
    assert AdapterOptions(**prompt_from_peft(written, WHERE)) == options


def test_peft_reads_a_prompts_config(tmp_path: Path) -> None:
    (tmp_path / WHERE).write_text(json.dumps(prompt_to_peft(AdapterOptions(kind="prompt", length=7), 3, "base")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert (loaded.peft_type, loaded.adapter_len, loaded.adapter_layers, loaded.target_modules) == ("ADAPTION_PROMPT", 7, 3, "self_attn")


@pytest.mark.parametrize(
    ("key", "value"),
    [("adapter_len", 0), ("adapter_len", None), ("adapter_layers", "3"), ("adapter_layers", None), ("target_modules", "attn")],
)
def test_a_prompts_config_that_says_something_else_is_refused_by_its_key(key: str, value: Any) -> None:
    written = prompt_to_peft(AdapterOptions(kind="prompt"), 3, "base") | {key: value}
    with pytest.raises(UserError) as refused:
        prompt_from_peft(written, WHERE)
    assert refused.value.where == f"{WHERE}: {key}"


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_expected_tensors_are_pefts_tensors(use_dora: bool, tmp_path: Path) -> None:
    config = {"r": 4, "rank_pattern": {"layers.1.mlp.up_proj": 2}, "target_modules": ["q_proj", "up_proj", "lm_head"], "use_dora": use_dora}
    get_peft_model(llama(), LoraConfig(**config, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    ours = adapter_config_from_peft(json.loads((tmp_path / WHERE).read_text()), WHERE)
    base = config_from_hf(llama().config.to_dict(), "config.json")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
    copies = {name for name in shapes if copied_base_tensor(name)}  # PEFT saves the whole head when the head has LoRA
    assert {copied_base_tensor(name) for name in copies} == {"lm_head.weight"}
    assert from_peft(ours, base).file_shapes(base) == {name: shape for name, shape in shapes.items() if name not in copies}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.layers.0.self_attn.q_proj.adapter.lora_A", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("model.layers.0.self_attn.q_proj.adapter.lora_B", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
        ("model.layers.7.mlp.up_proj.adapter.magnitude", "base_model.model.model.layers.7.mlp.up_proj.lora_magnitude_vector"),
        ("lm_head.adapter.lora_A", "base_model.model.lm_head.lora_A.weight"),
        ("model.layers.7.self_attn.prompt.adaption_gate", "base_model.model.model.layers.7.self_attn.adaption_gate"),
        ("model.layers.7.self_attn.prompt.adaption_prompt", "base_model.model.model.layers.7.self_attn.adaption_prompt"),
        ("model.embed_tokens.weight", "base_model.model.model.embed_tokens.weight"),
        ("lm_head.weight", "base_model.model.lm_head.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "base_model.model.model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_parameters_have_pefts_names_in_the_file(ours: str, theirs: str) -> None:
    assert to_peft_name(ours) == theirs


def test_every_tensor_at_fault_is_listed_in_one_error() -> None:
    """A01. Must catch: the list cut short, a wrong shape taken as fine."""
    expected = {f"layer{i}": (2, 3) for i in range(40)}
    found: dict[str, tuple[int, ...]] = dict(expected)
    del found["layer3"], found["layer30"]
    found |= {"layer7": (3, 2), "layer8": (2, 3, 1), "other": (1,), "layer33_": (2, 3)}
    with pytest.raises(UserError) as refused:
        check_tensors(found, expected, "adapter_model.safetensors")
    lines = refused.value.report().splitlines()
    for fault in (
        "missing: layer3 ",
        "missing: layer30 ",
        "unexpected: other ",
        "unexpected: layer33_ ",
        "wrong shape: layer7 ",
        "wrong shape: layer8 ",
    ):
        assert sum(fault in line for line in lines) == 1
    assert not any(re.search(r"layer1\b", line) for line in lines)
    check_tensors(expected, types.MappingProxyType(expected), "adapter_model.safetensors")
