"""From one format to another: what others write (pickled weights, LitGPT) into ours, and ours into what others read (PEFT, GGUF).

Every conversion is a new directory, committed whole or not at all, with a report of what it was made from, what became of every tensor,
and that the result was read again and compared.

    sources.py     what a path holds: a whole model under Hugging Face's names, or an adapter under PEFT's
    pickles.py     the one place that opens pickled weights, and runs no code of theirs
    plain.py       quantised weights made plain        fp8.py, mxfp4.py   what their numbers mean
    litgpt.py      LitGPT's names, its fused q, k and v, and the LoRA on them
    parts.py       tensors on the way: known by dtype and shape, read when they are written
    hf.py          a model as a Hugging Face directory         adapters.py      an adapter as PEFT's directory, or as a step
    gguf_arch.py   what llama.cpp computes, and its keys
    gguf_model.py  a model for llama.cpp                       gguf_adapter.py  a LoRA for it
    gguf_file.py   one GGUF file, written and read again       gguf_tokens.py   its tokenizer
    report.py      convert_report.json, and the proof
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from litlora.checkpoint.card import typed
from litlora.checkpoint.commit import check_new, check_outside
from litlora.convert.sources import Adapter, Model, open_source
from litlora.errors import UserError

__all__ = ["Adapter", "Model", "check", "convert", "open_source"]


def check(source: Model | Adapter, to: str, out_dir: Path, dtype: str) -> None:
    """UserError of what cannot be asked for, before anything is read."""
    check_outside(out_dir, source.path)
    check_new(out_dir)
    if isinstance(source, Model):
        if to in ("peft", "litlora"):
            what = f"is a whole model, and --to {to} is for adapters"
            raise UserError(what, where=source.path, hint="--to hf, or --to gguf")
        if to == "hf" and dtype == "q8_0":
            raise UserError("q8_0 is a type of GGUF's alone", where="--dtype q8_0", hint="--dtype float32 (or the like), or --to gguf")
        return
    if to == "hf":
        if source.checkpoint is None:
            hint = "first litlora convert --to peft (or litlora), then litlora merge_lora of that"
        else:
            hint = f"litlora merge_lora {typed(str(source.path))} --out_dir {typed(str(out_dir))}"
        raise UserError("is an adapter, and becomes a plain model by merging", where=source.path, hint=hint)
    if to in ("peft", "litlora") and dtype != "keep":
        raise UserError("an adapter keeps its dtype", where=f"--dtype {dtype}", hint="leave --dtype out")
    if to == "litlora" and source.checkpoint is not None and source.checkpoint.manifest is not None:
        raise UserError("is a step of litlora already", where=source.path, hint="--to peft, or --to gguf")


def convert(
    source: Model | Adapter,
    to: str,
    out_dir: Path,
    *,
    dtype: str = "keep",
    max_shard_size: float = 5.0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Write `out_dir` and return what its report says. UserError: refused, nothing written; WorkError: nothing is left behind."""
    check(source, to, out_dir, dtype)
    if isinstance(source, Model):
        if to == "hf":
            from litlora.convert.hf import model_to_hf

            return model_to_hf(source, out_dir, dtype=dtype, max_shard_size=max_shard_size, progress=progress)
        from litlora.convert.gguf_model import model_to_gguf

        return model_to_gguf(source, out_dir, dtype=dtype, progress=progress)
    if to == "gguf":
        from litlora.convert.gguf_adapter import adapter_to_gguf

        return adapter_to_gguf(source, out_dir, dtype=dtype)
    from litlora.convert.adapters import adapter_to_peft, adapter_to_step

    return adapter_to_peft(source, out_dir) if to == "peft" else adapter_to_step(source, out_dir)
