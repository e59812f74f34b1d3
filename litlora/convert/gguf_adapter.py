"""A LoRA adapter in GGUF: `NAME.lora_a` and `NAME.lora_b` for each weight, as llama.cpp's --lora takes it.

llama.cpp multiplies B A by alpha / R, with one alpha for the whole file. Where a module's own scale is another one (rsLoRA, a rank or
an alpha by pattern), the difference goes into its B. B's rows have the order of the weight's rows in GGUF; A is as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_directory, make_directory
from litlora.config import Config
from litlora.convert.gguf_arch import architecture
from litlora.convert.gguf_file import WORDS, file_bytes, open_package, read_again, type_of, write_gguf
from litlora.convert.gguf_model import add_general, gguf_names, in_its_order, main_type
from litlora.convert.parts import Floats, Part
from litlora.convert.report import make_report, write_report
from litlora.convert.sources import Adapter
from litlora.errors import UserError, located
from litlora.families import linear_shapes
from litlora.methods import from_peft
from litlora.methods.tuning import LoRASlot
from litlora.peft import (
    AdapterConfig,
    adapter_config_from_peft,
    check_tensors,
    copied_base_tensor,
    is_prompt,
    rank_and_alpha,
    scale,
    to_peft_name,
)

COPIED = "the base's own weight, which PEFT stores beside LoRA on the head"


def adapter_to_gguf(adapter: Adapter, out_dir: Path, *, dtype: str = "keep") -> dict[str, Any]:
    """Write the adapter's file and a report into `out_dir`, whole or not at all. UserError of what such a file cannot say."""
    open_package()
    config = adapter.base().config()
    arch = architecture(config, adapter.path)
    described = plain_lora(adapter)
    adapter.dropped.update({name: COPIED for name in adapter.tensors if copied_base_tensor(name) is not None})
    held = {name: part for name, part in adapter.tensors.items() if name not in adapter.dropped}
    with located(adapter.path / names.ADAPTER_CONFIG):
        tuning = from_peft(described, config)
    check_tensors({name: part.shape for name, part in held.items()}, tuning.file_shapes(config), adapter.read[0])
    if "lm_head.adapter" in tuning.slots and config.tie_word_embeddings:
        what = "LoRA on a head that is the embedding's own matrix has no place in GGUF"
        raise UserError(what, where=adapter.path, hint="merge it (litlora merge_lora) and convert the model")
    slots = {slot.removesuffix(".adapter"): kind for slot, kind in tuning.slots.items() if isinstance(kind, LoRASlot)}
    parts = tensors_of(held, slots, described, config)
    tensors = {name: (part, type_of(part, dtype)) for name, part in parts.items()}
    make_directory(out_dir.absolute().parent)
    name = names.gguf_name("adapter", WORDS[dtype] if dtype != "keep" else main_type(tensors))
    with commit_directory(out_dir, needed_bytes=file_bytes(tensors) + 2**24) as directory:
        report = make_report(adapter, "gguf", {}, dtype=dtype, files=[name])
        digest = next(iter(report["from"]["files"].values()))["sha256"]

        def metadata(writer: Any) -> None:
            add_general(writer, adapter.path, "adapter", digest)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", described.alpha)

        write_gguf(directory / name, arch.word, metadata, tensors)
        report["proof"] = read_again(directory / name, tensors)
        write_report(directory, report)
    return report


def plain_lora(adapter: Adapter) -> AdapterConfig:
    """How PEFT describes it. UserError where there is more to it than products of two matrices."""
    hint = "merge it (litlora merge_lora) and convert the model"
    if is_prompt(adapter.values):
        raise UserError("a learnt prompt has no form in GGUF, and cannot be merged", where=adapter.path, hint="serve it with litlora chat")
    described = adapter_config_from_peft(adapter.values, adapter.path / names.ADAPTER_CONFIG)
    if described.use_dora:
        raise UserError("DoRA has no form in GGUF", where=adapter.path, hint=hint)
    if described.alpha == 0:
        raise UserError("lora_alpha is 0, and llama.cpp takes a scale of 0 for none at all", where=adapter.path, hint=hint)
    if described.modules_to_save:
        what = f"modules trained whole ({', '.join(described.modules_to_save)}) have no place in a GGUF adapter"
        raise UserError(what, where=adapter.path, hint=hint)
    return described


def tensors_of(held: Mapping[str, Part], slots: Mapping[str, LoRASlot], described: AdapterConfig, config: Config) -> dict[str, Part]:
    """GGUF's names -> A and B of every module, B with its own scale over the file's."""
    called = gguf_names([f"{module}.weight" for module in linear_shapes(config) if module in slots], config)
    found: dict[str, Part] = {}
    for weight, name in called.items():
        module = weight.removesuffix(".weight")
        a, b = (held[to_peft_name(f"{module}.adapter.{part}")] for part in ("lora_A", "lora_B"))
        r, alpha = rank_and_alpha(described, module)
        factor = scale(alpha, r, described.use_rslora) / (described.alpha / r)
        found[f"{name}.lora_a"] = a
        found[f"{name}.lora_b"] = in_its_order(weight, b if factor == 1 else scaled(b, factor), config)
    return found


def scaled(part: Part, factor: float) -> Part:
    """`factor` times its numbers, in fp32."""

    def load() -> Floats:
        product: Floats = (part.float32().astype(np.float64) * factor).astype(np.float32)
        return product

    return Part(dtype="F32", shape=part.shape, load=load)
