"""A whole model in GGUF: llama.cpp's names, its sizes under its keys, and the rows of q and k in its order.

llama.cpp turns neighbouring pairs of numbers where Hugging Face turns the first half of a head with the second, for the architecture
`llama` (Llama and Mistral): the rows of q and k are put in the order in which that is the same. Its `qwen2` and `qwen3` turn halves.
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
from litlora.console import warn
from litlora.convert.gguf_file import Q8_0, WORDS, Kept, file_bytes, open_package, read_again, type_of, write_gguf
from litlora.convert.gguf_tokens import add_tokens, token_table
from litlora.convert.parts import Part
from litlora.convert.report import make_report, write_report
from litlora.convert.sources import Model
from litlora.errors import UserError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # our model type: llama.cpp's
ROWS_IN_PAIRS = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"
YARN = Rope(rope_type="yarn")  # with these betas and no other: llama.cpp has keys for them, and reads them for other architectures alone


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
            add_sizes(writer, config)
            writer.add_file_type(file_type(tensors))
            writer.add_quantization_version(open_package().GGML_QUANT_VERSION)
            add_tokens(writer, table)

        write_gguf(path, arch, metadata, tensors, progress)
        report["proof"] = read_again(path, tensors)
        write_report(directory, report)
    return report


def architecture(config: Config, where: Path) -> str:
    """llama.cpp's word for the model's arithmetic. UserError where it is none of those that this room knows."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = "llama.cpp's own converter may know it: the directory is in Hugging Face's layout"
        raise UserError(f"a {config.model_type} model cannot be written as GGUF yet, only {known}", where=where, hint=hint)
    return ARCHITECTURES[config.model_type]


def refuse_unknown_arithmetic(config: Config, where: Path) -> None:
    """What a model of these may have and llama.cpp's form of it has no place for."""
    rope = config.rope
    if config.hidden_act != "silu" or config.unrotated_layers or rope.rope_type not in ("default", "linear", "llama3", "yarn"):
        what = f"{config.hidden_act} activation, {rope.rope_type} rope" + (", layers without positions" if config.unrotated_layers else "")
        raise UserError(f"llama.cpp's {ARCHITECTURES[config.model_type]} does not compute this model: {what}", where=where)
    if config.model_type == "qwen3" and config.attention_out_bias:
        raise UserError("llama.cpp's qwen3 has no bias on the attention's output", where=where)
    if config.model_type == "qwen2" and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError("llama.cpp's qwen2 has heads of hidden_size / num_attention_heads only", where=where)
    plain = replace(
        YARN, rope_theta=rope.rope_theta, factor=rope.factor, original_max_position_embeddings=rope.original_max_position_embeddings
    )
    if rope.rope_type == "yarn" and rope != plain:
        what = "llama.cpp has YaRN with beta_fast 32, beta_slow 1 and the attention factor of its factor; this model has others"
        raise UserError(what, where=where)
    if rope.rope_type == "llama3" and config.model_type not in ("llama", "mistral"):
        raise UserError(f"llama.cpp's {config.model_type} has no llama3 rope scaling", where=where)
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        what = f"llama.cpp looks all the way back where this model looks {config.sliding_window:,} tokens back"
        warn(f"{what}: up to that length both compute the same, and beyond it they do not")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of(parts: Mapping[str, Part], config: Config, dtype: str) -> dict[str, tuple[Part, str]]:
    """GGUF's name -> the tensor, rows in llama.cpp's order, and the type it is stored as."""
    called = gguf_names(parts, config)
    found = {called[name]: in_its_order(name, part, config) for name, part in parts.items()}
    if config.rope.rope_type == "llama3":
        factors = rope_factors(config.rope, config.head_dim)
        found[ROPE_FACTORS] = Part(dtype="F32", shape=factors.shape, load=lambda: factors)
    return {name: (part, type_of(part, dtype)) for name, part in found.items()}


def gguf_names(parts: Iterable[str], config: Config) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, by the format's own table."""
    gguf = open_package()
    arch = next(key for key, word in gguf.MODEL_ARCH_NAMES.items() if word == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    called = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in parts}
    lost = [name for name, found in called.items() if found is None]
    if lost:
        raise UserError(f"llama.cpp's {ARCHITECTURES[config.model_type]} has no place for {lost[0]}")
    return called


def in_its_order(name: str, part: Part, config: Config) -> Part:
    """q and k of `llama`: in each head row i of the first half, then row i of the second, and so on."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.model_type] not in ROWS_IN_PAIRS:
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


def add_sizes(writer: Any, config: Config) -> None:
    """The model's shape and arithmetic under the keys of its architecture."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    scaling = open_package().RopeScalingType
    if config.rope.rope_type == "linear":
        writer.add_rope_scaling_type(scaling.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(scaling.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)


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
