"""Checkpoints whose weights are quantised: known by the method that their config.json names, refused with what to do."""

from collections.abc import Mapping
from typing import Any

BEFORE = "use the directory of the model before it was quantised"
CONVERT = "litlora convert DIR --to hf --out_dir NEW makes plain weights of it"
IN_TRANSFORMERS = "load it in transformers, call model.dequantize() and save_pretrained, and use that; or " + BEFORE

DEQUANTISED = ("fp8", "compressed-tensors", "fbgemm_fp8", "mxfp4")  # what litlora convert reads; of the second, what is fp8 with scales

HOW: dict[str, tuple[str, str]] = {  # quant_method: what it is called, and what to do
    "fp8": ("fp8 with scales", CONVERT),
    "fbgemm_fp8": ("fp8 with a scale for each row (FBGEMM)", CONVERT),
    "compressed-tensors": ("compressed-tensors (llm-compressor)", CONVERT + ", if it is fp8; else " + BEFORE),
    "bitsandbytes": ("bitsandbytes (8 or 4 bits)", IN_TRANSFORMERS),
    "gptq": ("GPTQ", BEFORE),
    "awq": ("AWQ", BEFORE),
    "mxfp4": ("MXFP4", CONVERT),
    "hqq": ("HQQ", IN_TRANSFORMERS),
    "aqlm": ("AQLM", BEFORE),
    "quip": ("QuIP#", BEFORE),
    "vptq": ("VPTQ", BEFORE),
    "eetq": ("EETQ", BEFORE),
    "quanto": ("Quanto", BEFORE),
    "torchao": ("torchao", BEFORE),
    "auto-round": ("AutoRound", BEFORE),
    "bitnet": ("BitNet, whose activations are quantised too", "it is meant to be computed in this form, which litlora does not do"),
}


def quantised_by(values: Mapping[str, Any]) -> str | None:
    """The method that a config.json names; empty where it names none, None where nothing is quantised."""
    held = values.get("quantization_config") or values.get("compression_config")
    if held is None or held == {}:
        return None
    method = held.get("quant_method") if isinstance(held, Mapping) else None
    return method if isinstance(method, str) else ""


def unquantised(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the plain model that litlora convert makes of it; of what it does not read, or is plain, the same."""
    dropped = () if quantised_by(values) not in DEQUANTISED else ("quantization_config", "compression_config")
    return {key: value for key, value in values.items() if key not in dropped}


def why_refused(method: str) -> tuple[str, str]:
    """What is wrong with it, and what to do."""
    called, action = HOW.get(method, (f"a method that litlora does not know ({method or 'not named'})", BEFORE))
    return f"the weights are quantised by {called}; litlora computes with plain ones", action
