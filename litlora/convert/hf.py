"""A whole model as a Hugging Face directory: safetensors in files of a chosen size, and everything that lies beside them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_directory, make_directory
from litlora.checkpoint.files import as_json
from litlora.checkpoint.reading import file_in, read_bytes
from litlora.checkpoint.shards import find_shards
from litlora.checkpoint.tokenizers import tokenizer_files
from litlora.convert.parts import Part, cast, parts_of, write_parts
from litlora.convert.report import compared, make_report, write_report
from litlora.convert.sources import Model
from litlora.families import learns, stored_name
from litlora.safetensors_file import DTYPES

GB = 10**9


def model_to_hf(
    model: Model, out_dir: Path, *, dtype: str = "keep", max_shard_size: float = 5.0, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write `out_dir`, whole or not at all, and return its report. `max_shard_size` in GB, 0: one file. WorkError."""
    tensors = {stored_name(name, model.config): part for name, part in model.tensors.items()}
    parts = stored_as(tensors, dtype)
    size = sum(part.size for part in parts.values())
    shards = in_shards(parts, max_shard_size * GB)
    make_directory(out_dir.absolute().parent)
    with commit_directory(out_dir, needed_bytes=size + 2**24) as directory:
        for name, held in shards.items():
            write_parts(directory / name, held, progress)
        if len(shards) > 1:
            weight_map = {tensor: name for name, held in shards.items() for tensor in held}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (directory / names.WEIGHTS_INDEX).write_bytes(as_json(index))
        write_small_files(model, directory, dtype)
        proof = compared(tensors, parts_of(find_shards(directory)), directory)
        report = make_report(model, "hf", proof, dtype=dtype, files=sorted(shards))
        write_report(directory, report)
    return report


def stored_as(tensors: Mapping[str, Part], dtype: str) -> dict[str, Part]:
    return {name: part if dtype == "keep" or not learns(name) else cast(part, DTYPES[dtype], name) for name, part in tensors.items()}


def in_shards(parts: Mapping[str, Part], limit: float) -> dict[str, dict[str, Part]]:
    """File name -> its tensors, in the model's order. A tensor that is larger than the limit has a file of its own."""
    held: list[dict[str, Part]] = [{}]
    room = limit
    for name, part in parts.items():
        if limit and held[-1] and part.size > room:
            held.append({})
            room = limit
        held[-1][name] = part
        room -= part.size
    return {names.shard_name(number, len(held)): inside for number, inside in enumerate(held, 1)}


def write_small_files(model: Model, directory: Path, dtype: str) -> None:
    """config.json (the source's, to the byte, where it says the right dtype), tokenizer, generation config, licence, README."""
    if model.config_json is not None and dtype == "keep":
        (directory / names.CONFIG).write_bytes(model.config_json)
    else:
        word = dtype if dtype != "keep" else model.config.torch_dtype
        values = model.values()
        keys = [key for key in ("torch_dtype", "dtype") if key in values] or ["torch_dtype"]
        (directory / names.CONFIG).write_bytes(as_json(values | dict.fromkeys(keys, word)))
    wanted = (names.GENERATION_CONFIG, *names.LICENCE_FILES)
    kept = {name: read_bytes(file_in(model.path, name)) for name in wanted if (model.path / name).exists()}
    for name, data in (kept | tokenizer_files(model.path)).items():
        (directory / name).write_bytes(data)
    if not (directory / names.GENERATION_CONFIG).exists() and model.config_json is None:
        ids = {key: model.values()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (directory / names.GENERATION_CONFIG).write_bytes(as_json({key: value for key, value in ids.items() if value is not None}))
    (directory / names.README).write_text(card(model), encoding="utf-8")


def card(model: Model) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [litlora, converted]
---

# {model.path.resolve().name}

A Hugging Face directory, made by `litlora convert` from the {model.kind} `{model.path.resolve()}`. `{names.CONVERT_REPORT}` says what was
read, with its sha256, and that every tensor was compared with it. The licence of the source goes for this model too.

In the directory that holds this file:

    litlora chat .
    vllm serve .
    python -c "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.from_pretrained('.'))"
"""
