"""PEFT's file format: adapter_config.json, the names of the tensors, and which modules and ranks a config means.

A step directory is a PEFT adapter, so what is written here is what every reader of PEFT files sees: few keys, because
each key that PEFT added later broke the readers before it. What is read is PEFT's own, of any age; a key that changes
what the adapter computes, and that litlora does not compute, is refused by its name. Matching follows PEFT 0.21
(`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`). No torch here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from litlora.console import counted
from litlora.errors import UserError
from litlora.options import AdapterOptions, LoRAOptions
from litlora.peft.targets import (
    ALL_LINEAR,
    compiled,
    ending_words,
    is_named,
    layer_number,
    layers_meant,
    match_targets,
    modules_named,
    named_or_matched,
    shortened,
)

T = TypeVar("T")

PREFIX = "base_model.model."  # in front of every name: PEFT's wrapper and its tuner
HOST_SLOT = ".adapter."  # in our names, between a module and its adapter's parameter
PROMPT_SLOT = ".prompt."  # the same for a learnt prompt
PROMPT = "ADAPTION_PROMPT"  # PEFT's word for LLaMA-Adapter

PARAMETERS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours: PEFT's

# How the weights were initialised does not matter once they are in a file. These are the exceptions: they also changed
# the base's weights, and PEFT changes them again whenever it loads such an adapter.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Keys that say nothing about what an adapter computes on plain Linear layers.
SILENT = {
    "auto_mapping",
    "corda_config",  # this and the next three: only with an init_lora_weights of that name
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "fan_in_fan_out",  # PEFT sets it right for the kind of layer
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
READ = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "modules_to_save",
    "ensure_weight_tying",
}
WHY = {  # of what PEFT has and litlora refuses
    "bias": "trained biases of the base are not supported; only 'none' is",
    "lora_bias": "a bias on lora_B is not supported",
    "trainable_token_indices": "embedding rows trained one by one are not supported (all of them are: modules_to_save)",
    "target_parameters": "LoRA on parameters that are no Linear is not supported",
    "layer_replication": "a base with repeated layers is not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "use_qalora": "QALoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "megatron_config": "Megatron's layers are not supported",
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter as PEFT describes it: where it sits and how it is scaled. `target_modules` as a string is a pattern."""

    r: int
    alpha: float
    target_modules: list[str] | str
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression of module names: their own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude_modules: list[str] | str = field(default_factory=list)
    layers_to_transform: list[int] | None = None  # None: all layers
    layers_pattern: list[str] = field(default_factory=list)  # names of the list of layers; empty: any
    modules_to_save: list[str] = field(default_factory=list)  # trained whole: every module whose name ends so
    ensure_weight_tying: bool = False  # the head stays the embedding's own matrix, where modules_to_save has one of them
    base_model_name_or_path: str | None = None


def adapter_config(
    options: LoRAOptions,
    linear_names: Sequence[str],
    base_model_name_or_path: str | None = None,
    *,
    module_names: Sequence[str] = (),
    shared: Sequence[str] = (),
) -> AdapterConfig:
    """The AdapterConfig that `options` mean for a model with these Linears and modules; its words are short where they can be.

    `shared`: embedding and head, where they are one matrix, and stay it. Either of them saved then means both: PEFT loads the same
    matrix into each, and computes what was trained.
    """
    chosen = named_or_matched(options.target_modules, linear_names)
    if taken := sorted(set(options.modules_to_save) & {name.rpartition(".")[2] for name in chosen}):
        raise UserError(f"{taken[0]} cannot both carry LoRA and be trained whole", where="modules_to_save", hint="name it once")
    depth = 1 + max((layer for name in linear_names if (layer := layer_number(name, ())) is not None), default=-1)
    layers = layers_meant(options.layers, depth, "layers") or None
    if layers is not None:
        chosen = [name for name in chosen if layer_number(name, ()) in (None, *layers)]
    if not chosen:
        raise UserError("no target lies in these layers", where="layers", hint="leave layers out, or name other targets")
    saved = modules_named(options.modules_to_save, module_names, "modules_to_save") if options.modules_to_save else []
    if set(shared) & set(saved):
        saved = [name for name in module_names if name in {*saved, *shared}]
    words = shortened(chosen, [name for name in linear_names if layers is None or layer_number(name, ()) in (None, *layers)])
    return AdapterConfig(
        r=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=words,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        rank_pattern={name: rank(whole_number(value), "rank_pattern", name) for name, value in pairs(options.rank_pattern, "rank_pattern")},
        alpha_pattern={
            name: positive(plain_number(value), "alpha_pattern", name) for name, value in pairs(options.alpha_pattern, "alpha_pattern")
        },
        layers_to_transform=None if words == chosen else layers,  # to PEFT a full name is meant whatever its layer
        modules_to_save=ending_words(saved, module_names),
        base_model_name_or_path=base_model_name_or_path,
    )


def positive(value: Any, where: str, key: str) -> float:
    if number(value, where, key) <= 0:
        raise refusal(where, key, f"a number above 0 is needed, found {value!r}")
    return float(value)


def pairs(words: Sequence[str], where: str) -> list[tuple[str, str]]:
    """NAME=VALUE words apart."""
    for word in words:
        if not re.fullmatch(r".+=.+", word):
            raise UserError(f"{word!r} is not NAME=NUMBER", where=where, hint="down_proj=64, for example")
        compiled(word.rpartition("=")[0], where)
    return [(name, value) for name, _, value in (word.rpartition("=") for word in words)]


def whole_number(text: str) -> Any:
    return int(text) if text.isdecimal() else text


def plain_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def doubled(config: AdapterConfig) -> AdapterConfig:
    """The same scale with twice the rank: what an adapter becomes that was trained against its own start (PiSSA)."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        alpha=factor * config.alpha,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def adapter_config_to_peft(config: AdapterConfig) -> dict[str, Any]:
    """The content of adapter_config.json: the keys that every PEFT knows, and others only where they are used."""
    optional: dict[str, Any] = {
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {name: plain_alpha(alpha) for name, alpha in config.alpha_pattern.items()},
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
        "ensure_weight_tying": config.ensure_weight_tying,
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": plain_alpha(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "modules_to_save": config.modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: value for key, value in optional.items() if value},
    }


def plain_alpha(alpha: float) -> int | float:
    """PEFT and vLLM declare alpha a whole number, so it is written as one where it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def adapter_config_from_peft(values: Mapping[str, Any], where: str | Path) -> AdapterConfig:
    """Read an adapter_config.json; `where` is that file, for the messages.

    UserError, naming the key: another method than LoRA, a value of the wrong type, or something that changes what the
    adapter computes and that litlora does not compute.
    """
    refuse_other_arithmetic(values, where)
    dora, rslora = (flag(values, key, where) for key in ("use_dora", "use_rslora"))
    base = values.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise refusal(where, "base_model_name_or_path", f"a path or a name is needed, found {base!r}")
    dropout = number(values.get("lora_dropout", 0.0), where, "lora_dropout")
    if not 0 <= dropout < 1:
        raise refusal(where, "lora_dropout", f"a number from 0 to below 1 is needed, found {dropout!r}")
    targets, layers = names_or_pattern(values, "target_modules", where), layer_numbers(values.get("layers_to_transform"), where)
    if not targets:
        raise refusal(where, "target_modules", "missing", "name the modules that the adapter's tensors belong to")
    if isinstance(targets, str) and layers is not None:
        raise refusal(where, "layers_to_transform", "cannot be used when target_modules is a pattern (nor in PEFT)")
    ranks, alphas = (pattern_table(values, key, where) for key in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(
        r=rank(values.get("r"), where, "r"),
        alpha=number(values.get("lora_alpha"), where, "lora_alpha"),
        dropout=dropout,
        target_modules=targets,
        use_dora=dora,
        use_rslora=rslora,
        rank_pattern={name: rank(value, where, f"rank_pattern.{name}") for name, value in ranks.items()},
        alpha_pattern={name: number(value, where, f"alpha_pattern.{name}") for name, value in alphas.items()},
        exclude_modules=names_or_pattern(values, "exclude_modules", where),
        layers_to_transform=layers,
        layers_pattern=layers_patterns(values, where),
        modules_to_save=module_names(values, where),
        ensure_weight_tying=flag(values, "ensure_weight_tying", where),
        base_model_name_or_path=base,
    )


def refuse_other_arithmetic(values: Mapping[str, Any], where: str | Path) -> None:
    method = values.get("peft_type")
    if method != "LORA":
        what = f"{method!r} is not supported" if method else "missing, so this is no adapter of PEFT"
        raise refusal(where, "peft_type", what, "supported: LORA")
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise refusal(where, "task_type", f"{task!r} is another kind of model", "supported: CAUSAL_LM")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INIT):
        hint = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        raise refusal(where, "init_lora_weights", f"{init!r} changed the base's weights, so the adapter does not fit the base", hint)
    for key, value in values.items():
        nothing = value in (None, False, 0, "", "none") or value in ([], {})
        if nothing or key in READ or key in SILENT:
            continue
        unknown = "litlora does not know this key, so it cannot tell what the adapter computes"
        hint = "merge the adapter into its base with PEFT, and use the merged model"
        raise refusal(where, key, WHY.get(key, unknown), hint)


def refusal(where: str | Path, key: str, why: str, hint: str = "") -> UserError:
    return UserError(why, where=f"{where}: {key}", hint=hint)


def flag(values: Mapping[str, Any], key: str, where: str | Path) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise refusal(where, key, f"true or false is needed, found {value!r}")
    return bool(value)


def rank(value: Any, where: str | Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refusal(where, key, "missing" if value is None else f"a positive whole number is needed, found {value!r}")
    return value


def number(value: Any, where: str | Path, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refusal(where, key, "missing" if value is None else f"a number is needed, found {value!r}")
    return float(value)


def names_or_pattern(values: Mapping[str, Any], key: str, where: str | Path) -> list[str] | str:
    value = values.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return value if value.lower() == ALL_LINEAR else compiled(value, f"{where}: {key}").pattern
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refusal(where, key, f"a list of module names or a pattern is needed, found {value!r}")
    return list(value)


def module_names(values: Mapping[str, Any], where: str | Path) -> list[str]:
    names = values.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise refusal(where, "modules_to_save", f"a list of module names is needed, found {names!r}")
    return list(names)


def pattern_table(values: Mapping[str, Any], key: str, where: str | Path) -> dict[str, Any]:
    table = values.get(key)
    if table is not None and not isinstance(table, Mapping):
        raise refusal(where, key, f"an object from module names to numbers is needed, found {table!r}")
    for pattern in table or {}:
        compiled(pattern, f"{where}: {key}")
    return dict(table or {})


def layer_numbers(value: Any, where: str | Path) -> list[int] | None:
    layers = [value] if isinstance(value, int) else value
    if layers is not None and (not isinstance(layers, list) or not all(type(layer) is int for layer in layers)):
        raise refusal(where, "layers_to_transform", f"a layer's number or a list of them is needed, found {value!r}")
    return list(layers) if layers else None  # to PEFT an empty list is all layers


def layers_patterns(values: Mapping[str, Any], where: str | Path) -> list[str]:
    names = names_or_pattern(values, "layers_pattern", where)
    patterns = [names] if isinstance(names, str) else names
    for pattern in patterns:
        compiled(pattern, f"{where}: layers_pattern")
    return patterns


def is_prompt(values: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is of LLaMA-Adapter's learnt prompts."""
    return values.get("peft_type") == PROMPT


def prompt_to_peft(options: AdapterOptions, depth: int, base_model_name_or_path: str) -> dict[str, Any]:
    """The adapter_config.json of prompts in the upper layers, `depth` of them."""
    return {
        "peft_type": PROMPT,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "adapter_len": options.length,
        "adapter_layers": depth,
        "target_modules": "self_attn",
        "inference_mode": True,
    }


def prompt_from_peft(values: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The fields of AdapterOptions that such an adapter_config.json means. UserError naming the key."""
    if values.get("target_modules") not in (None, "self_attn"):
        raise refusal(where, "target_modules", f"{values['target_modules']!r} is not supported", "supported: self_attn")
    length, layers = (rank(values.get(key), where, key) for key in ("adapter_len", "adapter_layers"))
    return {"kind": "prompt", "length": length, "layers": [f"last:{layers}"]}


# ---- which modules, and how strong -----------------------------------------------------------------------------------


def targets(config: AdapterConfig, linear_names: Sequence[str]) -> list[str]:
    """The modules that an adapter of `config` sits on: its targets, less the excluded ones, in the layers that it names."""
    excluded, layers = config.exclude_modules, config.layers_to_transform
    chosen = match_targets(config.target_modules, linear_names)
    if isinstance(excluded, str):
        chosen = [name for name in chosen if not compiled(excluded).fullmatch(name)]
    else:
        chosen = [name for name in chosen if not any(is_named(name, other) for other in excluded)]
    if layers is not None:  # in PEFT a full name is meant whatever its layer
        chosen = [name for name in chosen if name in config.target_modules or layer_number(name, config.layers_pattern) in layers]
    if not chosen:
        hint = "see exclude_modules and layers_to_transform in its adapter_config.json"
        raise UserError("the adapter's config leaves no module to adapt", hint=hint)
    return chosen


def rank_and_alpha(config: AdapterConfig, module: str) -> tuple[int, float]:
    """(r, alpha) of one module: the first pattern that matches its name's end, else the adapter's own."""
    return by_pattern(config.rank_pattern, module, config.r), by_pattern(config.alpha_pattern, module, config.alpha)


def by_pattern(table: Mapping[str, T], module: str, default: T) -> T:
    return next((value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def scale(alpha: float, r: int, use_rslora: bool = False) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


# ---- adapter_model.safetensors ---------------------------------------------------------------------------------------


def to_peft_name(name: str) -> str:
    """The name that a parameter has in PEFT's files:

    `model.layers.0.self_attn.q_proj.adapter.lora_A` -> `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`,
    `model.layers.0.self_attn.prompt.adaption_gate` -> `base_model.model.model.layers.0.self_attn.adaption_gate`, and
    of a parameter of the base that was trained whole `base_model.model.` and its own.
    """
    module, slot, parameter = name.rpartition(HOST_SLOT)
    if slot:
        return f"{PREFIX}{module}.{PARAMETERS[parameter]}"
    return PREFIX + name.replace(PROMPT_SLOT, ".")


def copied_base_tensor(name: str) -> str | None:
    """The base's tensor that `name` is a copy of, or None: PEFT saves the whole head along when the head has LoRA."""
    copied = name.startswith(PREFIX) and name.endswith(".base_layer.weight")
    return name.removeprefix(PREFIX).replace(".base_layer.weight", ".weight") if copied else None


def check_tensors(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str | Path) -> None:
    """Refuse shapes `found` in a file that are not the `expected` ones: one UserError that lists every key at fault."""
    faults = [f"missing: {name} {tuple(expected[name])}" for name in expected if name not in found]
    faults += [f"unexpected: {name} {tuple(found[name])}" for name in found if name not in expected]
    faults += [
        f"wrong shape: {name} {tuple(found[name])}, needed {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if faults:
        what = "\n  ".join([f"{len(faults)} of {counted(len(expected), 'tensor')} at fault, so none was loaded", *faults])
        hint = "the tensors, what is written about them (adapter_config.json or litlora.json) and the base must belong together"
        raise UserError(what, where=where, hint=hint)
