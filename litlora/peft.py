"""PEFT's file format: adapter_config.json, the names of the tensors, and which modules and ranks a config means.

A step directory is a PEFT adapter, so what is written here is what every reader of PEFT files sees: few keys, because
each key that PEFT added later broke the readers before it. What is read is PEFT's own, of any age; a key that changes
what the adapter computes, and that litlora does not compute, is refused by its name. Matching follows PEFT 0.21
(`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`). No torch here.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from litlora.errors import UserError, did_you_mean
from litlora.options import LoRAOptions

T = TypeVar("T")

ALL_LINEAR = "all-linear"  # every projection of the blocks; not the head
PREFIX = "base_model.model."  # in front of every name: PEFT's wrapper and its tuner
HOST_SLOT = ".adapter."  # in our names, between a module and its adapter's parameter

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
    "ensure_weight_tying",  # of modules_to_save and embeddings, which are refused
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
}
WHY = {  # of what PEFT has and litlora refuses
    "bias": "trained biases of the base are not supported; only 'none' is",
    "lora_bias": "a bias on lora_B is not supported",
    "modules_to_save": "modules trained whole beside LoRA are not supported",
    "trainable_token_indices": "trained embedding rows are not supported",
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
    modules_to_save: list[str] = field(default_factory=list)  # always empty: refused when read
    base_model_name_or_path: str | None = None


def adapter_config(options: LoRAOptions, linear_names: Sequence[str], base_model_name_or_path: str | None = None) -> AdapterConfig:
    """The AdapterConfig that `options` mean for a model with these Linears; its targets are short names where they can be."""
    return AdapterConfig(
        r=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=shortened(match_targets(options.target_modules, linear_names), linear_names),
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        base_model_name_or_path=base_model_name_or_path,
    )


# ---- adapter_config.json ---------------------------------------------------------------------------------------------


def adapter_config_to_peft(config: AdapterConfig) -> dict[str, Any]:
    """The content of adapter_config.json: the keys that every PEFT knows, and others only where they are used."""
    optional: dict[str, Any] = {
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {name: whole(alpha) for name, alpha in config.alpha_pattern.items()},
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "modules_to_save": config.modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: value for key, value in optional.items() if value},
    }


def whole(alpha: float) -> int | float:
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
        shown = f" ({', '.join(map(str, value))})" if key == "modules_to_save" and isinstance(value, list) else ""
        hint = "merge the adapter into its base with PEFT, and use the merged model"
        raise refusal(where, key, WHY.get(key, unknown) + shown, hint)


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


def compiled(pattern: str, where: str = "") -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}", where=where) from error


# ---- which modules, and how strong -----------------------------------------------------------------------------------


def match_targets(target_modules: Sequence[str] | str, linear_names: Sequence[str]) -> list[str]:
    """The names among `linear_names` that the targets mean, in the order of `linear_names`.

    A target in a list is a full name, the end of one after a dot (`q_proj`, `self_attn.q_proj`), or all-linear: every
    projection of the blocks, so not the head. A string is all-linear, or a regular expression for the full name, as in
    PEFT. UserError if nothing matches, or if one target of a list matches nothing; it lists the names that exist.
    """
    blocks = {name for name in linear_names if layer_number(name, ()) is not None}
    if isinstance(target_modules, str):
        if target_modules.lower() == ALL_LINEAR:
            return [name for name in linear_names if name in blocks]
        pattern = compiled(target_modules, "target_modules")
        found = {name for name in linear_names if pattern.fullmatch(name)}
        if not found:
            raise no_such_module([target_modules], linear_names)
    else:
        by_target = {
            target: blocks if target.lower() == ALL_LINEAR else {name for name in linear_names if is_named(name, target)}
            for target in target_modules
        }
        lost = [target for target, names in by_target.items() if not names]
        if lost or not by_target:
            raise no_such_module(lost, linear_names)
        found = set().union(*by_target.values())
    return [name for name in linear_names if name in found]


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


def is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def layer_number(name: str, layers_pattern: Sequence[str]) -> int | None:
    """The number of the layer that a module belongs to: the first number after a list of layers; None outside of them."""
    for pattern in layers_pattern or [r"[^.]*"]:
        anywhere = r"(?:^|.*?\.)" if layers_pattern else r".*?\."
        if found := re.match(rf"{anywhere}{pattern}\.(?P<layer>\d+)\.", name):
            return int(found["layer"])
    return None


def no_such_module(lost: Sequence[str], linear_names: Sequence[str]) -> UserError:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_names))
    guesses = [guess for guess in (did_you_mean(target, ends) for target in lost) if guess]
    what = f"no module of this model is a target named {', '.join(lost)}" if lost else "no target module is named"
    return UserError("; ".join([what, *guesses[:1]]), where="target_modules", hint=f"its modules: {', '.join(ends)}, or {ALL_LINEAR}")


def shortened(modules: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """Names for adapter_config.json that mean exactly `modules`: `q_proj` where every q_proj is meant, else full names."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    return ends if set(match_targets(ends, linear_names)) == set(modules) else list(modules)


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
    """`model.layers.0.self_attn.q_proj.adapter.lora_A` -> `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`"""
    module, slot, parameter = name.rpartition(HOST_SLOT)
    assert slot, f"{name} is no adapter's parameter"
    return f"{PREFIX}{module}.{PARAMETERS[parameter]}"


def from_peft_name(name: str) -> str | None:
    """The other way round; None where the name is no tensor of LoRA on a Linear."""
    for ours, theirs in PARAMETERS.items():
        if name.startswith(PREFIX) and name.endswith(f".{theirs}"):
            return f"{name.removeprefix(PREFIX).removesuffix('.' + theirs)}{HOST_SLOT}{ours}"
    return None


def copied_base_tensor(name: str) -> str | None:
    """The base's tensor that `name` is a copy of, or None: PEFT saves the whole head along when the head has LoRA."""
    copied = name.startswith(PREFIX) and name.endswith(".base_layer.weight")
    return name.removeprefix(PREFIX).replace(".base_layer.weight", ".weight") if copied else None


def expected_adapter_tensors(config: AdapterConfig, linear_shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """PEFT's names and shapes of an adapter's tensors, for a model with these Linears: name -> (out, in)."""
    tensors: dict[str, tuple[int, ...]] = {}
    for module in targets(config, list(linear_shapes)):
        (out, into), (r, _) = linear_shapes[module], rank_and_alpha(config, module)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": (r, into), f"{PREFIX}{module}.lora_B.weight": (out, r)}
        if config.use_dora:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = (out,)
    return tensors


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
        what = "\n  ".join([f"{len(faults)} of {len(expected)} tensors at fault, so none was loaded", *faults])
        hint = "the tensors, adapter_config.json (r, target_modules, use_dora) and the base must belong together"
        raise UserError(what, where=where, hint=hint)
