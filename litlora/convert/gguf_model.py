"""A whole model in GGUF: llama.cpp's names, its sizes under its keys, and the rows of q and k in its order.

Where llama.cpp turns neighbouring pairs of numbers and Hugging Face the first half of a head with the second (`llama`, `granite`), the
rows of q and k are put in the order in which that is the same. Gains that are stored as gain - 1 (Gemma's) are whole there. The rest is
known to gguf_arch.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from litlora import __version__
from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_directory, make_directory
from litlora.config import Config, Rope
from litlora.convert.gguf_arch import ARCHITECTURES, add_sizes, architecture, refuse_unknown_arithmetic
from litlora.convert.gguf_file import Q8_0, WORDS, Kept, file_bytes, open_package, read_again, type_of, write_gguf
from litlora.convert.gguf_tokens import add_tokens, token_table
from litlora.convert.parts import Part, stacked
from litlora.convert.report import make_report, write_report
from litlora.convert.sources import Model
from litlora.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
NORM = "norm.weight"


def model_to_gguf(
    model: Model, out_dir: Path, *, dtype: str = "keep", progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Write one GGUF file and its report into `out_dir`, whole or not at all. UserError of what llama.cpp does not compute."""
    open_package()
    config = model.config
    arch = architecture(config, model.path)
    refuse_unknown_arithmetic(config, model.path)
    table = token_table(model.path, config.vocab_size)
    tensors = tensors_of(model.tensors, config, dtype)
    make_directory(out_dir.absolute().parent)
    name = names.gguf_name("model", WORDS[dtype] if dtype != "keep" else main_type(tensors))
    with commit_directory(out_dir, needed_bytes=file_bytes(tensors) + 2**25) as directory:
        path = directory / name
        report = make_report(model, "gguf", {}, dtype=dtype, files=[name])
        digest = next(iter(report["from"]["files"].values()))["sha256"]

        def metadata(writer: Any) -> None:
            add_general(writer, model.path, "model", digest)
            add_sizes(writer, config, arch)
            writer.add_file_type(file_type(tensors))
            writer.add_quantization_version(open_package().GGML_QUANT_VERSION)
            add_tokens(writer, table)

        write_gguf(path, arch.word, metadata, tensors, progress)
        report["proof"] = read_again(path, tensors)
        write_report(directory, report)
    return report


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of(parts: Mapping[str, Part], config: Config, dtype: str) -> dict[str, tuple[Part, str]]:
    """GGUF's name -> the tensor, rows in llama.cpp's order, and the type it is stored as."""
    parts = with_whole_norms(parts)
    called = gguf_names(parts, config)
    found = {called[name]: in_its_order(name, part, config) for name, part in parts.items()}
    if config.norm_offset:
        found |= {name: shifted(part, config.norm_offset) for name, part in found.items() if name.endswith(NORM)}
    if config.rope.rope_type == "llama3":
        factors = rope_factors(config.rope, config.head_dim)
        found[ROPE_FACTORS] = Part(dtype="F32", shape=factors.shape, load=lambda: factors)
    return {name: (part, "F32" if name.endswith(NORM) else type_of(part, dtype)) for name, part in found.items()}


def with_whole_norms(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Gains that lie in a tensor for each head, as one of (heads, D)."""
    heads: dict[str, list[Part]] = {}
    for name, part in parts.items():
        if ".norms." in name:
            rows = replace(part, shape=(1, *part.shape))
            heads.setdefault(f"{name.partition('.norms.')[0]}.weight", []).append(rows)
    return {name: part for name, part in parts.items() if ".norms." not in name} | {name: stacked(rows) for name, rows in heads.items()}


def shifted(part: Part, offset: float) -> Part:
    """Gains as they are multiplied by, where they are stored as what is added to `offset`."""
    return Part(dtype="F32", shape=part.shape, load=lambda: part.float32() + np.float32(offset))


def gguf_names(parts: Iterable[str], config: Config) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, by the format's own table."""
    gguf = open_package()
    word = ARCHITECTURES[config.model_type].word
    arch = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == word)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    called = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in parts}
    lost = [name for name, found in called.items() if found is None]
    if lost:
        raise UserError(f"llama.cpp's {word} has no place for {lost[0]}")
    return called


def in_its_order(name: str, part: Part, config: Config) -> Part:
    """q and k where neighbours turn: in each head row i of the first half, then row i of the second, and so on."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or not ARCHITECTURES[config.model_type].pairs:
        return part
    return part.in_order(paired_rows(heads, config.head_dim))


def paired_rows(heads: int, size: int) -> "np.ndarray[Any, np.dtype[np.intp]]":
    """Which row of Hugging Face's goes where: 0, D/2, 1, D/2 + 1, ... in every head."""
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def rope_factors(rope: Rope, size: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """What llama3's scaling divides each frequency by (D/2 of them): 1 for the fast, `factor` for the slow, in between a blend."""
    wavelengths = 2 * math.pi * rope.rope_theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    turns = rope.original_max_position_embeddings / wavelengths  # within the first context
    blend = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (1 / ((1 - blend) / rope.factor + blend)).astype(np.float32)


# ---- metadata --------------------------------------------------------------------------------------------------------


def add_general(writer: Any, source: Path, kind: str, digest: str) -> None:
    writer.add_type(kind)
    writer.add_name(source.resolve().name)
    writer.add_string("litlora.version", __version__)
    writer.add_string("litlora.converted_from", source.resolve().name)
    writer.add_string("litlora.source_sha256", digest)


def file_type(tensors: Kept) -> int:
    """general.file_type: what most of it is stored as. For people; every tensor says its own."""
    types = open_package().LlamaFileType
    found = {"F32": types.ALL_F32, "F16": types.MOSTLY_F16, "BF16": types.MOSTLY_BF16, Q8_0: types.MOSTLY_Q8_0}
    return int(found[main_type(tensors)])


def main_type(tensors: Kept) -> str:
    """The type that holds most of the numbers."""
    sizes: dict[str, int] = {}
    for part, kind in tensors.values():
        sizes[kind] = sizes.get(kind, 0) + math.prod(part.shape)
    return max(sizes, key=lambda kind: sizes[kind])
