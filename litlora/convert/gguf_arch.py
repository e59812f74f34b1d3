"""llama.cpp's architectures: what each computes of what our families may ask for, and under which keys a file says so.

Read out of llama.cpp's loaders (src/models/*.cpp) and held by tests that compute with it. Where one turns neighbours (`llama`, `granite`)
the rows of q and k stand in another order (gguf_model.py); the others turn halves, as Hugging Face does.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora.config import Config, Rope
from litlora.console import warn
from litlora.convert.gguf_file import open_package
from litlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arch:
    """One of llama.cpp's architectures."""

    word: str
    pairs: bool = False  # whether it turns neighbours
    act: str = "silu"
    ropes: tuple[str, ...] = ("default",)
    square: bool = False  # heads of hidden_size / num_attention_heads only
    out_bias: bool = False  # whether attention's output may have one
    tied: bool | None = None  # whether the head is the embedding's own matrix; None: as the model has it
    windows: bool = False  # whether it knows which layers slide
    capped: bool = False  # whether scores and logits are always capped
    largest: int = 0  # layers of the one of its models whose scores have hidden_size / heads for the size of a head


LLAMA = Arch(word="llama", pairs=True, ropes=("default", "linear", "yarn", "llama3"), out_bias=True)
QWEN = ("default", "linear", "yarn")
GELU = "gelu_pytorch_tanh"
ARCHITECTURES = {  # by our model type
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Arch(word="qwen2", ropes=QWEN, square=True),
    "qwen3": Arch(word="qwen3", ropes=QWEN),
    "gemma": Arch(word="gemma", act=GELU, tied=True),
    "gemma2": Arch(word="gemma2", act=GELU, tied=True, windows=True, capped=True, largest=46),
    "gemma3_text": Arch(word="gemma3", act=GELU, ropes=("default", "linear"), windows=True, largest=62),
    "granite": Arch(word="granite", pairs=True, out_bias=True),
    "olmo2": Arch(word="olmo2", square=True, tied=False),
    "phi3": Arch(word="phi3", square=True),
    "stablelm": Arch(word="stablelm"),
}
YARN = Rope(rope_type="yarn")  # with these betas and no other: llama.cpp has keys for them, and reads them for other architectures alone


def architecture(config: Config, where: Path) -> Arch:
    """The one that computes the model. UserError where it is none of those that this room knows."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        hint = "llama.cpp's own converter may know it: the directory is in Hugging Face's layout"
        raise UserError(f"a {config.model_type} model cannot be written as GGUF yet, only {known}", where=where, hint=hint)
    return ARCHITECTURES[config.model_type]


def refuse_unknown_arithmetic(config: Config, where: Path) -> None:
    """What a model of these may have and llama.cpp's form of it has no place for."""
    arch, rope = architecture(config, where), config.rope
    faults = {
        f"{config.hidden_act} activation": config.hidden_act != arch.act,
        f"{rope.rope_type} rope": rope.rope_type not in arch.ropes,
        "layers without positions": bool(config.unrotated_layers),
        "a bias on the attention's output": config.attention_out_bias and not arch.out_bias,
        "heads of another size than hidden_size / num_attention_heads": arch.square
        and config.head_dim * config.num_attention_heads != config.hidden_size,
        "a head of its own" if arch.tied else "a tied head": arch.tied not in (None, config.tie_word_embeddings),
        "scores or logits without a cap": arch.capped and None in (config.attn_logit_softcapping, config.final_logit_softcapping),
        "scores on another scale (query_pre_attn_scalar)": arch.act == GELU
        and not math.isclose(config.attention_scale, scale_of(arch, config)),
    }
    if asked := [what for what, is_asked in faults.items() if is_asked]:
        raise UserError(f"llama.cpp's {arch.word} does not compute this model: {', '.join(asked)}", where=where)
    plain = replace(
        YARN, rope_theta=rope.rope_theta, factor=rope.factor, original_max_position_embeddings=rope.original_max_position_embeddings
    )
    if rope.rope_type == "yarn" and rope != plain:
        what = "llama.cpp has YaRN with beta_fast 32, beta_slow 1 and the attention factor of its factor; this model has others"
        raise UserError(what, where=where)
    if not arch.windows and config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        what = f"llama.cpp looks all the way back where this model looks {config.sliding_window:,} tokens back"
        warn(f"{what}: up to that length both compute the same, and beyond it they do not")


def scale_of(arch: Arch, config: Config) -> float:
    """What a Gemma's scores are multiplied by there."""
    size = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == arch.largest else config.head_dim
    return 1 / math.sqrt(size)


def add_sizes(writer: Any, config: Config, arch: Arch) -> None:
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
    writer.add_rope_dimension_count(config.rope.turned(config.head_dim))
    (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.rope_theta)
    scaling = open_package().RopeScalingType
    if config.rope.rope_type == "linear":
        writer.add_rope_scaling_type(scaling.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(scaling.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
    add_own(writer, config, arch)


def add_own(writer: Any, config: Config, arch: Arch) -> None:
    """What Llama does not have."""
    if arch.windows:
        writer.add_sliding_window_pattern([config.slides(layer) for layer in range(config.num_hidden_layers)])
        if config.sliding_window is not None:
            writer.add_sliding_window(config.sliding_window)
        if config.local_rope is not None:
            writer.add_rope_freq_base_swa(config.local_rope.rope_theta)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch.word == "granite":
        writer.add_logit_scale(config.logits_scaling)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_scale)
    if arch.word == "stablelm":
        writer.add_parallel_residual(config.parallel_residual)
