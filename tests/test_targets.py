"""peft/targets.py: which modules and layers a word means, against PEFT's own matching, and what is said of a word that means none."""

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from test_peft import BLOCK, MINIMAL, NAMES, WHERE, llama

from litlora.errors import UserError
from litlora.families import config_from_hf, expected_tensors
from litlora.options import LoRAOptions
from litlora.peft import AdapterConfig, adapter_config, adapter_config_from_peft, rank_and_alpha, targets
from litlora.peft.targets import (
    ending_words,
    layer_number,
    layers_meant,
    match_targets,
    modules_ending,
    modules_named,
    modules_of,
    named_or_matched,
    shortened,
)

# ---- which modules ---------------------------------------------------------------------------------------------------

TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": ["lm_head", "layers.1.self_attn.k_proj"]},
    {"target_modules": r".*\.layers\.[13]\..*\.(q|v)_proj"},
    {"target_modules": "model.layers.1.self_attn.q_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "model.layers.5.mlp.up_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["o_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("case", TARGETS, ids=str)
def test_the_targets_are_pefts_targets(case: dict[str, Any]) -> None:
    """Must catch: a target matched in the middle of a name, `layers.1` taking layer 11, a pattern searched rather than matched."""
    theirs = LoraConfig(**case)
    want = []
    for name in NAMES:
        found = check_target_module_exists(theirs, name)
        if found and not isinstance(found, _ExcludedModule):
            want.append(name)
    assert want
    assert targets(adapter_config_from_peft({**MINIMAL, **case}, WHERE), NAMES) == want


def test_targets_with_commas_between_them_are_told_how_they_are_written() -> None:
    """Issue: what is refused says what to type. Names that a comma parts in other tools are parted by spaces here."""
    with pytest.raises(UserError, match="a target named q_proj,v_proj") as refused:
        match_targets(["q_proj,v_proj"], NAMES)
    assert refused.value.hint == "with spaces between them: q_proj v_proj"


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear", ["all-linear"]])
def test_all_linear_is_every_projection_of_the_blocks(spelling: str | list[str]) -> None:
    base = llama()
    linears = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    wrapped = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    want = wrapped.base_model.targeted_module_names
    assert match_targets(spelling, linears) == want == linears[:-1]


def test_all_linear_and_the_head_can_be_asked_for_together() -> None:
    assert match_targets(["all-linear", "lm_head"], NAMES) == NAMES


@pytest.mark.parametrize(
    ("wanted", "named"),
    [(["q_proj", "q_prj"], "q_prj"), (["proj"], "proj"), ([], "no target"), ("q_proj", "q_proj"), (["layers.99.self_attn.q_proj"], "99")],
)
def test_a_target_that_matches_nothing_is_refused_with_the_names_that_exist(wanted: list[str] | str, named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        match_targets(wanted, NAMES)
    assert all(name in refused.value.hint for name in ("q_proj", "down_proj", "lm_head", "all-linear"))


def test_a_misspelt_target_gets_a_guess() -> None:
    with pytest.raises(UserError, match=r"did you mean gate_proj\?"):
        match_targets(["gat_proj"], NAMES)


def test_a_config_that_excludes_all_its_targets_is_refused() -> None:
    config = AdapterConfig(r=1, alpha=1, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(UserError, match="no module"):
        targets(config, NAMES)


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_shortened_names_mean_exactly_the_same_modules(chosen: set[str]) -> None:
    modules = [name for name in NAMES if name in chosen]
    assert match_targets(shortened(modules, NAMES), NAMES) == modules


# ---- what the options' words mean ------------------------------------------------------------------------------------

DEPTH = 12
SMALL = config_from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": DEPTH,
    },
    "config.json",
)
MODULES = modules_of([*expected_tensors(SMALL), "lm_head.weight"])
spans = st.tuples(st.integers(0, DEPTH - 1), st.integers(0, DEPTH - 1)).map(sorted)
layer_words = st.one_of(
    st.integers(0, DEPTH - 1).map(lambda n: (str(n), {n})),
    spans.map(lambda ends: (f"{ends[0]}-{ends[1]}", set(range(ends[0], ends[1] + 1)))),
    st.integers(1, DEPTH).map(lambda n: (f"last:{n}", set(range(DEPTH - n, DEPTH)))),
    st.integers(1, DEPTH).map(lambda n: (f"first:{n}", set(range(n)))),
)


@given(st.lists(layer_words, max_size=4))
def test_layers_are_the_union_of_what_the_words_say(pairs: list[tuple[str, set[int]]]) -> None:
    """Numbers from 0, ranges with both ends, so many from an end; ascending, each once."""
    meant = set[int]().union(*(layers for _, layers in pairs))
    assert layers_meant([word for word, _ in pairs], DEPTH, "layers") == sorted(meant)


@pytest.mark.parametrize("word", ["12", "3-12", "last:13", "first:13", "5-3", "last:0", "first:0", "99-100"])
def test_a_layer_that_is_not_there_is_refused_by_its_word(word: str) -> None:
    with pytest.raises(UserError, match="layers 0 to 11") as refused:
        layers_meant(["3", word], DEPTH, "positions")
    assert word in str(refused.value)
    assert refused.value.where == "positions"


@pytest.mark.parametrize("word", ["", "-1", "last", "last:", "last:-1", "1-", "1:2", " 1", "1.0", "all", "1,2", "upper:3", "1-2-3", "1\n"])
def test_a_word_that_names_no_layer_is_refused_with_the_forms_there_are(word: str) -> None:
    with pytest.raises(UserError, match="names no layer") as refused:
        layers_meant([word], DEPTH, "layers")
    assert all(form in refused.value.hint for form in ("4-7", "last:2", "first:2"))


@given(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4), st.data())
def test_a_module_is_named_by_its_whole_name_or_by_whole_words_at_its_end(modules: list[str], data: st.DataObject) -> None:
    """Must catch: a word found inside another."""
    words = []
    for module in modules:
        parts = module.split(".")
        words.append(".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :]))
    named = modules_named(words, MODULES, "modules_to_save")
    assert set(modules) <= set(named)
    assert named == [name for name in MODULES if any(f".{name}".endswith(f".{word}") for word in words)]


def test_norm_is_the_last_norm_alone() -> None:
    assert modules_named(["norm"], MODULES, "modules_to_save") == ["model.norm"]
    assert len(modules_named(["input_layernorm"], MODULES, "modules_to_save")) == DEPTH
    assert modules_named(["layers.1"], MODULES, "modules_to_save") == ["model.layers.1"]
    assert modules_named(["self_attn.k_norm", "lm_head"], MODULES, "modules")[-2:] == ["model.layers.11.self_attn.k_norm", "lm_head"]
    assert modules_named([], MODULES, "modules") == []


@pytest.mark.parametrize("word", ["layernorm", "nrm", "proj", "layers.12", "norm.weight", "", "odel.norm", ".*norm", "Norm"])
def test_a_word_that_is_no_modules_is_refused_with_the_names_that_exist(word: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"named {word}")) as refused:
        modules_named(["q_proj", word], MODULES, "extra_modules")
    assert refused.value.where == "extra_modules"
    assert all(name in refused.value.hint for name in ("embed_tokens", "input_layernorm", "q_norm", "self_attn", "down_proj", "lm_head"))
    assert not re.search(r"\b\d+\b", refused.value.hint)  # a layer's number is no name


@given(st.sets(st.sampled_from(MODULES), min_size=1))
def test_words_for_modules_to_save_mean_to_peft_what_is_meant(chosen: set[str]) -> None:
    """PEFT saves every module whose name ends in a word, also in the middle of a part: `norm` is every norm to it."""
    modules = [name for name in MODULES if name in chosen]
    words = ending_words(modules, MODULES)
    assert modules_ending(words, MODULES) == modules
    assert [name for name in MODULES if any(name.endswith(word) for word in words)] == modules


def test_words_for_modules_to_save_are_short_where_that_is_safe() -> None:
    assert ending_words(["model.embed_tokens", "lm_head"], MODULES) == ["embed_tokens", "lm_head"]
    assert ending_words(["model.norm"], MODULES) == ["model.norm"]
    assert ending_words(modules_named(["input_layernorm"], MODULES, ""), MODULES) == ["input_layernorm"]
    assert ending_words(modules_named(["layers.1"], MODULES, ""), MODULES) == ["model.layers.1"]  # a 1 also ends layer 11
    assert ending_words([], MODULES) == []


@pytest.mark.parametrize("words", [["norm"], ["model.norm"], ["embed_tokens", "lm_head"], ["mlp"], ["layernorm"], ["layers.1"]], ids=str)
def test_modules_to_save_are_those_that_peft_saves(words: list[str]) -> None:
    base = llama()
    names = modules_of(name for name, _ in base.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=words))
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    }
    assert set(modules_ending(words, names)) == theirs


def test_every_module_down_to_its_parameters_has_a_name() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight"]
    between = ["model.layers", "model.layers.0", "model.layers.0.mlp", "model.layers.0.mlp.up_proj"]
    assert modules_of(names) == ["model", "model.embed_tokens", *between, "lm_head"]


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sets(st.sampled_from(NAMES)))
def test_a_target_may_be_a_regular_expression_of_full_names_beside_plain_ones(matched: set[str], named: set[str]) -> None:
    """Must catch: a pattern searched rather than matched; the second word taking the place of the first."""
    words = ["|".join(re.escape(name) for name in sorted(matched)), *sorted(named)]
    if words[0] == "lm_head":
        words[0] = "(lm_head)"
    assert named_or_matched(words, NAMES) == [name for name in NAMES if name in matched | named]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["all-linear"], NAMES[:-1]),
        (["ALL-LINEAR", "lm_head"], NAMES),
        (["q_proj"], [name for name in NAMES if name.endswith(".q_proj")]),
        ([r".*\.1\..*q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["layers.1.mlp.up_proj", r"lm_h.+"], ["model.layers.1.mlp.up_proj", "lm_head"]),
        ([r"model\.layers\.(0|11)\.mlp\.up_proj"], ["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj"]),
    ],
    ids=str,
)
def test_targets_are_names_ends_of_names_or_patterns(words: list[str], meant: list[str]) -> None:
    assert named_or_matched(words, NAMES) == meant


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no target"),
        (["q_proj", "proj"], "proj"),
        (["layers.1"], "layers.1"),
        (["q_proj", ".*q_pro"], "q_pro"),
        ([r"q_proj$"], "q_proj"),
        (["(q_proj"], "no regular expression"),
        (["gat_proj"], "did you mean gate_proj"),
        (["norm"], "norm"),
    ],
    ids=str,
)
def test_a_word_that_targets_nothing_is_refused_with_the_names_that_exist(words: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        named_or_matched(words, NAMES)
    if why != "no regular expression":
        assert all(name in refused.value.hint for name in ("q_proj", "down_proj", "lm_head", "all-linear"))


# ---- what becomes of them in adapter_config.json -----------------------------------------------------------------------


def test_what_the_options_mean_is_written_in_short_names() -> None:
    config = adapter_config(LoRAOptions(r=3, alpha=6.0, dropout=0.1, use_dora=True, use_rslora=True), NAMES, "base")
    assert config.target_modules == [name.rpartition(".")[2] for name in BLOCK]
    assert (config.r, config.alpha, config.dropout, config.base_model_name_or_path) == (3, 6.0, 0.1, "base")
    assert config.use_dora
    assert config.use_rslora


def test_patterns_and_layers_of_the_options_are_written_as_peft_reads_them() -> None:
    options = LoRAOptions(
        r=4, layers=["first:1", "5-6"], rank_pattern=["up_proj=2", "a=b=3"], alpha_pattern=["up_proj=2.5"], modules_to_save=["norm"]
    )
    config = adapter_config(options, NAMES, module_names=MODULES)
    assert config.layers_to_transform == [0, 5, 6]
    assert config.rank_pattern == {"up_proj": 2, "a=b": 3}
    assert config.alpha_pattern == {"up_proj": 2.5}
    assert config.modules_to_save == ["model.norm"]
    chosen = targets(config, NAMES)
    assert {layer_number(name, ()) for name in chosen} == {0, 5, 6}
    assert rank_and_alpha(config, "model.layers.5.mlp.up_proj") == (2, 2.5)


@pytest.mark.parametrize(
    ("words", "layers", "meant"),
    [
        ([r".*\.[02]\..*q_proj"], ["2"], ["model.layers.2.self_attn.q_proj"]),
        (["layers.0.mlp.up_proj", "k_proj"], ["0-1"], [NAMES[1], NAMES[5], NAMES[8]]),
        (["v_proj", "lm_head"], ["5"], ["model.layers.5.self_attn.v_proj", "lm_head"]),
    ],
    ids=str,
)
def test_layers_hold_for_targets_in_any_words(words: list[str], layers: list[str], meant: list[str]) -> None:
    """PEFT's layers_to_transform does not hold for full names, so they must not be written for what lies in other layers."""
    assert targets(adapter_config(LoRAOptions(target_modules=words, layers=layers), NAMES), NAMES) == meant


@given(st.lists(st.sampled_from([*NAMES, *BLOCK, "v_proj", "all-linear"]), min_size=1, max_size=4), st.lists(layer_words, max_size=2))
def test_what_is_written_means_to_peft_the_targets_in_those_layers(words: list[str], pairs: list[tuple[str, set[int]]]) -> None:
    layers = set[int]().union(*(meant for _, meant in pairs))
    wanted = [name for name in named_or_matched(words, NAMES) if not pairs or layer_number(name, ()) in (None, *layers)]
    options = LoRAOptions(target_modules=words, layers=[word for word, _ in pairs])
    if not wanted:
        with pytest.raises(UserError, match="no target lies in these layers"):
            adapter_config(options, NAMES)
        return
    config = adapter_config(options, NAMES)
    theirs = LoraConfig(target_modules=config.target_modules, layers_to_transform=config.layers_to_transform)
    assert targets(config, NAMES) == [name for name in NAMES if check_target_module_exists(theirs, name)] == wanted


SHARED = ("model.embed_tokens", "lm_head")


def test_a_shared_matrix_saved_is_named_as_both_of_what_it_is() -> None:
    """To PEFT embedding and head are two modules: it must load the matrix into each."""
    assert set(SHARED) < set(MODULES)
    for word in ("embed_tokens", "lm_head"):
        config = adapter_config(LoRAOptions(modules_to_save=[word]), NAMES, module_names=MODULES, shared=SHARED)
        assert config.modules_to_save == ["embed_tokens", "lm_head"]
        assert adapter_config(LoRAOptions(modules_to_save=[word]), NAMES, module_names=MODULES).modules_to_save == [word]
