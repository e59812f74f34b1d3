"""Values out of a config.json, checked, and what they mean where families differ."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.config import LayerType
from litlora.errors import UserError, did_you_mean
from litlora.families.quant_methods import quantised_by, why_refused
from litlora.families.table import ACTION, ACTIVATIONS, ALSO_KNOWN_AS, NEUTRAL, SUPPORTED, WHY_NOT, Family
from litlora.families.wrapped import WRAPPED

LLAMA_PRO_LAYERS = "llama_pro_layers"  # our own key of config.json: which layers were inserted; other readers ignore it
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what families call the same number
DEFAULT_MAX_WINDOW_LAYERS = 28  # transformers' default for qwen


class Reader:
    """Values of a config.json by key, checked. A key that is absent or null takes the default given. `spelt`: keys that are asked for
    by Llama's name and have another one there."""

    def __init__(self, values: Mapping[str, Any], where: str | Path, prefix: str = "", spelt: Mapping[str, str] | None = None) -> None:
        self.spelt = spelt or {}
        plain = {key: value for key, value in values.items() if key not in self.spelt}
        self.values = plain | {ours: values[theirs] for ours, theirs in self.spelt.items() if theirs in values}
        self.where, self.prefix = where, prefix

    def refusal(self, key: str, why: str, hint: str = "") -> UserError:
        return UserError(why, where=f"{self.where}: {self.prefix}{self.spelt.get(key, key)}", hint=hint)

    def integer(self, key: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive whole number. Without a default it must be there; `null` is what a null means, where that differs."""
        value = self.values.get(key, default)
        value = (null or default) if value is None else value
        if value is None:
            raise self.refusal(key, "missing", "config.json must say how large the model is")
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
            raise self.refusal(key, f"a positive whole number is needed, found {value!r}")
        return int(value)

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number; `zero`: or zero."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refusal(key, "missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf or (zero and value == 0)):
            raise self.refusal(key, f"a positive number is needed, found {value!r}")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, f"true or false is needed, found {value!r}")
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, f"a name is needed, found {value!r}")
        return default if value is None else value

    def tokens(self, key: str, default: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """Token ids: config.json has one, a list or null. An absent key takes the default, a null is no token."""
        value = self.values.get(key, default)
        ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.refusal(key, f"a token id or a list of them is needed, found {value!r}")
        return tuple(token for token in ids if token >= 0)  # -1 is an old way to say that there is none

    def token(self, key: str, default: int | None) -> int | None:
        ids = self.tokens(key, default)
        return ids[0] if ids else None


def supported_family(reader: Reader) -> tuple[str, Family]:
    model_type = reader.values.get("model_type")
    names = ", ".join(SUPPORTED)
    if not isinstance(model_type, str):
        raise reader.refusal("model_type", "missing, so this is no model's config.json", f"supported: {names}")
    if model_type not in SUPPORTED and isinstance(reader.values.get("text_config"), Mapping):
        why = f"{model_type!r} is a model of text and more (it has a text_config); of those only {' and '.join(WRAPPED)} are supported"
        raise reader.refusal("model_type", why, f"its text model saved by itself, if its model type is one of: {names}")
    if model_type not in SUPPORTED:
        guess = did_you_mean(model_type, SUPPORTED)
        hint = f"supported: {names} ({ALSO_KNOWN_AS})"
        why = f": {WHY_NOT[model_type]}" if model_type in WHY_NOT else f"; {guess}" if guess else ""
        raise reader.refusal("model_type", f"{model_type!r} is not supported{why}", hint)
    return model_type, SUPPORTED[model_type]


def refuse_foreign_arithmetic(reader: Reader, model_type: str, family: Family) -> None:
    if (method := quantised_by(reader.values)) is not None:
        key = "quantization_config" if reader.values.get("quantization_config") else "compression_config"
        raise reader.refusal(key, *why_refused(method))
    own = {
        *family.numbers,
        family.qk_norm_key,
        "no_rope_layers" if family.unrotated == "listed" else "",
        *(["partial_rotary_factor", family.partial_key] if family.partial else []),
        *(EXPERT_COUNTS if family.experts else []),
        "kv_lora_rank" if family.latent else "",
    }
    for key, neutral in ({key: values for key, values in NEUTRAL.items() if key not in own} | dict(family.refused)).items():
        if key in reader.values and reader.values[key] not in neutral:
            supported = next((value for value in neutral if value is not None), "to leave it out")
            shown = repr(reader.values[key])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise reader.refusal(key, f"{shown} is not supported", ACTION.get(key, f"supported: {supported}"))
    if family.bias == "none" and reader.flag("attention_bias"):
        raise reader.refusal("attention_bias", f"a {model_type} model has no attention bias")
    if not family.mlp_bias and reader.flag("mlp_bias"):
        raise reader.refusal("mlp_bias", f"a {model_type} model has no MLP bias")


def activation(reader: Reader, model_type: str, family: Family) -> str:
    """By our word for it. Of the two keys that there are, the family has one; the other may not say something else."""
    other = "hidden_activation" if family.act_key == "hidden_act" else "hidden_act"
    for key, default in ((family.act_key, family.hidden_act), (other, "silu")):
        if (name := reader.text(key, default)) not in ACTIVATIONS:
            raise reader.refusal(key, f"{name!r} is not supported", f"supported: {', '.join(ACTIVATIONS)}")
    act = ACTIVATIONS[reader.text(family.act_key, family.hidden_act)]
    if model_type == "gemma" and act == "gelu":  # how the first ones were published; it was always meant so
        act = "gelu_pytorch_tanh"
    said = reader.values.get(other)
    if said is not None and ACTIVATIONS[said] not in (act, "gelu" if model_type == "gemma" else act):
        raise reader.refusal(other, f"{said!r} is not what {family.act_key} says: {act!r}")
    return act


def head_dim(reader: Reader, family: Family, hidden: int, heads: int) -> int:
    size = reader.integer("head_dim", family.head_dim or max(1, hidden // heads))
    derived = reader.values.get("head_dim") is None and family.head_dim is None
    if family.square and size * heads != hidden:
        raise reader.refusal("head_dim", f"{heads} heads of {size} do not make up hidden_size {hidden}, as they must in this family")
    if derived and hidden % heads:
        raise reader.refusal("num_attention_heads", f"hidden_size {hidden} is no multiple of {heads} heads, and there is no head_dim")
    if size % 2:
        raise reader.refusal("head_dim" if not derived else "num_attention_heads", f"a head of {size} cannot be rotated in pairs")
    return size


def sliding(reader: Reader, model_type: str, family: Family, layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
    """The window in tokens and each layer's type; (None, ()) where every layer looks all the way back."""
    types = reader.values.get("layer_types")
    plain = types is None or (family.window == "none" and all(kind == "full_attention" for kind in types))
    if family.window not in ("upper", "pattern") and not plain:  # transformers reads a mistral with layer_types as another model type
        raise reader.refusal("layer_types", f"layers of several types are not supported in a {model_type} model")
    if family.window == "none":
        return None, ()
    window = None
    if reader.values.get("sliding_window", family.sliding_window) is not None:
        window = reader.integer("sliding_window", family.sliding_window)
    if family.window == "all":
        slides: LayerType = "sliding_attention"
        return (None, ()) if window is None else (window, (slides,) * layers)
    if family.window == "pattern":
        every = reader.integer("sliding_window_pattern", family.pattern)
        types = types or ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
        return checked_layers(reader, types, window, layers)
    if not reader.flag("use_sliding_window"):
        window = None
    if types is None:
        first = reader.values.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int):
            raise reader.refusal("max_window_layers", f"a whole number is needed, found {first!r}")
        types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)]
    return checked_layers(reader, types, window, layers)


def checked_layers(reader: Reader, types: Any, window: int | None, layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
    if not isinstance(types, list) or len(types) != layers:
        raise reader.refusal("layer_types", f"{layers} types are needed, one per layer")
    kinds: list[LayerType] = types
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise reader.refusal("layer_types", f"{kind!r} is not supported", "supported: full_attention, sliding_attention")
    if "sliding_attention" not in kinds:
        return None, ()
    if window is None:
        raise reader.refusal("sliding_window", "layer_types has sliding layers, but no window is given or use_sliding_window is not true")
    return window, tuple(kinds)


def inserted_layers(reader: Reader, layers: int) -> tuple[int, ...]:
    value = reader.values.get(LLAMA_PRO_LAYERS) or []
    if not isinstance(value, list) or any(type(layer) is not int or not 0 <= layer < layers for layer in value):
        raise reader.refusal(LLAMA_PRO_LAYERS, f"a list of layer numbers below {layers} is needed, found {value!r}")
    return tuple(sorted(set(value)))


def unrotated_layers(reader: Reader, family: Family, layers: int, types: tuple[LayerType, ...]) -> tuple[int, ...]:
    """The layers that see no positions. In no_rope_layers a 1 is a layer that does, a 0 one that does not."""
    if family.unrotated == "none":
        return ()
    if family.unrotated == "full":
        return tuple(i for i in range(layers) if not types or types[i] == "full_attention")
    every, listed = reader.integer("no_rope_layer_interval", 4), reader.values.get("no_rope_layers")
    if listed is None:
        return tuple(i for i in range(layers) if (i + 1) % every == 0)
    if not isinstance(listed, list) or len(listed) < layers or any(flag not in (0, 1) for flag in listed):
        raise reader.refusal("no_rope_layers", f"{layers} zeros and ones are needed, one per layer, found {listed!r}")
    return tuple(i for i in range(layers) if not listed[i])
