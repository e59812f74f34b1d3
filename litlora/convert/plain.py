"""A model whose weights are quantised as the plain model that they mean: read by its method's file (fp8.py, mxfp4.py), under the names that
the family has, with a config.json that says nothing of quantisation any more."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from litlora.checkpoint import names
from litlora.checkpoint.files import as_json
from litlora.checkpoint.reading import read_json
from litlora.checkpoint.shards import find_shards
from litlora.convert import fp8, mxfp4
from litlora.convert.parts import Part, parts_of
from litlora.convert.sources import Model, whole_model
from litlora.errors import UserError
from litlora.families import DEQUANTISED, config_from_hf, quantised_by, unquantised
from litlora.safetensors_file import DTYPES

BEFORE = "use the directory of the model before it was quantised"


def is_dequantised(directory: Path) -> bool:
    """Whether it is a model that this file reads."""
    return (directory / names.CONFIG).exists() and quantised_by(read_json(directory, names.CONFIG)) in DEQUANTISED


def plain_model(directory: Path) -> Model:
    """The plain model that a directory of quantised weights means. UserError where a tensor has no scale, or one that does not fit it."""
    values = read_json(directory, names.CONFIG)
    plain, method = unquantised(values), quantised_by(values)
    way = mxfp4 if method == "mxfp4" else fp8
    if "torch_dtype" not in plain and "dtype" not in plain:
        plain["torch_dtype"] = "bfloat16"  # gpt-oss does not say
    config = config_from_hf(plain, directory / names.CONFIG)
    if config.torch_dtype not in DTYPES:
        raise UserError(f"{config.torch_dtype!r} is no dtype to make plain weights of", where=f"{directory / names.CONFIG}: torch_dtype")
    shards = find_shards(directory)
    stored = parts_of(shards)
    quantisation = values.get("quantization_config") or values.get("compression_config") or {}
    tensors, dropped = way.dequantised(stored, quantisation, DTYPES[config.torch_dtype], directory)
    refuse_odd(tensors, directory)
    model = whole_model(directory, f"Hugging Face directory in {way.CALLED}", config, tensors, sorted(set(shards.values())))
    return replace(model, config_json=as_json(plain), dropped=model.dropped | dropped)


def refuse_odd(tensors: Mapping[str, Part], where: Path) -> None:
    """UserError where a tensor is still of no dtype that a plain model has."""
    odd = next((name for name, part in tensors.items() if part.dtype not in DTYPES.values()), None)
    if odd is not None:
        raise UserError(f"{odd} is {tensors[odd].dtype}, and nothing says what its numbers mean", where=where, hint=BEFORE)
