"""Rotary embeddings as config.json has them, read and written.

Two spellings exist and both are read: `rope_theta` with `rope_scaling`, and `rope_parameters` since transformers 5. No torch here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from litlora.config import Config, Rope
from litlora.families.reading import Reader
from litlora.families.table import Family

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
OF_LAYERS = ("full_attention", "sliding_attention")


def ropes(reader: Reader, family: Family, context: int, head_dim: int) -> tuple[Rope, Rope | None]:
    """The rope of a model, and of its sliding layers where they have another. `context` is max_position_embeddings, which is also what
    a stretched model's first context defaults to."""
    key = "rope_scaling" if reader.values.get("rope_scaling") else "rope_parameters"  # as transformers decides
    values = reader.values.get(key) or family.rope
    if not isinstance(values, Mapping):
        raise reader.refusal(key, f"an object is needed, found {values!r}")
    nested = any(isinstance(value, Mapping) for value in values.values())
    if nested and (family.local_theta is None or set(values) - set(OF_LAYERS)):
        raise reader.refusal(key, "an embedding for each type of layer is not supported")
    full, local = (values.get(name) or {} for name in OF_LAYERS) if nested else (values, {})
    prefix = f"{key}.full_attention." if nested else f"{key}."
    one = rope(reader, Reader(full, reader.where, prefix), family, context, head_dim)
    if family.local_theta is None:
        return one, None
    inner = Reader(local, reader.where, f"{key}.sliding_attention.")
    theta = inner.number("rope_theta", reader.number(family.local_theta_key, family.local_theta))
    return one, rope(reader, Reader({**local, "rope_theta": theta}, reader.where, inner.prefix), family, context, head_dim)


def rope(reader: Reader, inner: Reader, family: Family, context: int, head_dim: int) -> Rope:
    """One of them; `inner` reads its own object."""
    theta = inner.number("rope_theta", reader.number(family.theta_key, family.theta))
    share = inner.number("partial_rotary_factor", reader.number(family.partial_key, family.partial or 1.0))
    if family.partial is None and share != 1.0:
        raise inner.refusal("partial_rotary_factor", "rotating a part of each head is not supported in this family")
    interleaved = reader.flag(family.interleaved_key, family.interleaved) if family.interleaved_key else family.interleaved
    plain = Rope(rope_theta=theta, partial_rotary_factor=share, interleaved=interleaved)
    size = plain.turned(head_dim)
    if not 0 < size <= head_dim or size % 2:
        raise reader.refusal("partial_rotary_factor", f"{size} of the {head_dim} dimensions of a head cannot be turned in pairs")
    name = "rope_type" if inner.values.get("rope_type") is not None else "type"
    kind = inner.text(name, "default")
    if family.architecture == "Phi3ForCausalLM" and kind in ("su", "yarn"):  # what longrope was called at first
        kind = "longrope"
    if kind not in TYPES:
        raise inner.refusal(name, f"{kind!r} is not supported", f"supported: {', '.join(TYPES)}")
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, rope_type="linear", factor=inner.number("factor"))
    if kind == "dynamic":
        return replace(plain, rope_type="dynamic", factor=inner.number("factor"), original_max_position_embeddings=context)
    original = reader.integer("original_max_position_embeddings", inner.integer("original_max_position_embeddings", context))
    plain = replace(plain, original_max_position_embeddings=original)
    if kind == "llama3":
        return llama3(inner, plain)
    if kind == "longrope":
        short, long = (factors(inner, key, size // 2) for key in ("short_factor", "long_factor"))
        return replace(
            plain,
            rope_type="longrope",
            factor=inner.number("factor", context / original),
            attention_factor=inner.number_or_none("attention_factor"),
            short_factor=short,
            long_factor=long,
        )
    return replace(
        plain,
        rope_type="yarn",
        factor=inner.number("factor", context / original),
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        attention_factor=inner.number_or_none("attention_factor"),
        mscale=inner.number_or_none("mscale"),
        mscale_all_dim=inner.number_or_none("mscale_all_dim"),
        truncate=inner.flag("truncate", True),
    )


def llama3(inner: Reader, plain: Rope) -> Rope:
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if low >= high:
        raise inner.refusal("high_freq_factor", f"{high} must be more than low_freq_factor {low}")
    return replace(plain, rope_type="llama3", factor=inner.number("factor"), low_freq_factor=low, high_freq_factor=high)


def factors(inner: Reader, key: str, count: int) -> tuple[float, ...]:
    values = inner.values.get(key)
    if not isinstance(values, list) or len(values) != count or any(type(value) not in (int, float) or value <= 0 for value in values):
        raise inner.refusal(key, f"a list of {count} positive numbers is needed, one per pair of dimensions")
    return tuple(float(value) for value in values)


# ---- writing ---------------------------------------------------------------------------------------------------------


def ropes_to_hf(config: Config, family: Family) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` for readers of the old spelling, `rope_parameters` for those of the new."""
    one, share = config.rope, {"partial_rotary_factor": config.rope.partial_rotary_factor} if family.partial else {}
    scaling = stretch_to_hf(one)
    original = {"original_max_position_embeddings": one.original_max_position_embeddings} if one.rope_type == "longrope" else {}
    parameters: dict[str, Any] = {"rope_theta": one.rope_theta, **share, **(scaling or {"rope_type": "default"})}
    beside = {family.partial_key: one.partial_rotary_factor} if family.partial else {}
    old = {family.theta_key: one.rope_theta, "rope_scaling": scaling, **beside, **original}
    if family.interleaved_key:
        old[family.interleaved_key] = one.interleaved
    if config.local_rope is not None:
        local = config.local_rope
        own = {"rope_theta": local.rope_theta, **(stretch_to_hf(local) or {"rope_type": "default"})}
        parameters = dict(zip(OF_LAYERS, (parameters, own), strict=True))
        old |= {family.local_theta_key: local.rope_theta} if family.local_theta_key else {}
    return {**old, "rope_parameters": parameters}


def stretch_to_hf(rope: Rope) -> dict[str, Any] | None:
    """What `rope_scaling` holds."""
    if rope.rope_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.rope_type == "longrope":
        scaling |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    optional = {name: getattr(rope, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
    scaling |= {name: value for name, value in optional.items() if value is not None}
    if rope.rope_type in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return scaling
