"""An adapter as a PEFT directory, or as one of our own steps, which knows its base. The tensors are the same to the byte in both."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litlora import __version__
from litlora.checkpoint import names
from litlora.checkpoint.card import model_card
from litlora.checkpoint.commit import commit_directory, make_directory
from litlora.checkpoint.files import as_json, serving_files
from litlora.checkpoint.manifest import Manifest, records_of
from litlora.checkpoint.reading import sha256
from litlora.checkpoint.tokenizers import tokenizer_files
from litlora.config import Config
from litlora.convert.parts import parts_of, refuse_not_finite, write_parts
from litlora.convert.report import compared, made_from, make_report, write_report
from litlora.convert.sources import Adapter, names_in
from litlora.errors import UserError, located
from litlora.methods import from_manifest, from_peft, lora_options
from litlora.methods.tuning import Tuning, why_misread, why_unmergeable
from litlora.peft import (
    adapter_config_from_peft,
    check_tensors,
    copied_base_tensor,
    is_prompt,
    prompt_from_peft,
)
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer


def adapter_to_peft(adapter: Adapter, out_dir: Path) -> dict[str, Any]:
    """Write a directory that holds what PEFT reads and no more, and return its report. UserError, WorkError."""
    if not is_prompt(adapter.values):
        adapter_config_from_peft(adapter.values, adapter.path / names.ADAPTER_CONFIG)  # refuses what is no LoRA, or is not understood
    make_directory(out_dir.absolute().parent)
    with commit_directory(out_dir, needed_bytes=adapter_bytes(adapter)) as directory:
        write_adapter(adapter, directory)
        for name, data in tokenizer_files(adapter.path).items():
            (directory / name).write_bytes(data)
        (directory / names.README).write_text(peft_card(adapter), encoding="utf-8")
        report = make_report(adapter, "peft", proof_of(adapter, directory))
        write_report(directory, report)
    return report


def adapter_to_step(adapter: Adapter, out_dir: Path) -> dict[str, Any]:
    """Write a step: what PEFT reads, with a manifest that records the base's fingerprint, its tokenizer and where it comes from.

    UserError where the base is not there, the adapter does not fit it, or it computes something that litlora does not.
    """
    base = adapter.base()
    config = base.config()
    method, options, tuning = meaning(adapter, config)
    held = {name: part for name, part in adapter.tensors.items() if copied_base_tensor(name) is None}
    check_tensors({name: part.shape for name, part in held.items()}, tuning.file_shapes(config), adapter.read[0])
    refuse_not_finite(held, adapter.read[0])
    place = adapter.path if names.has_vocabulary(adapter.path) else base.path
    prompts = Prompts(Tokenizer(place, base.path))
    origin = made_from(adapter)
    (digest,) = (record["sha256"] for record in origin["files"].values())
    manifest = Manifest(
        method=method,
        options=options,
        step=0,
        epoch=0.0,
        tokens=0,
        base=base.record(out_dir.absolute().parent),
        tokenizer=prompts.tokenizer.hash,
        chat_template=prompts.template_hash,
        lineage=({"event": "converted", "from": origin["path"], "kind": adapter.kind, "sha256": digest},),
        versions={"litlora": __version__},
    )
    make_directory(out_dir.absolute().parent)
    with commit_directory(out_dir, needed_bytes=adapter_bytes(adapter)) as directory:
        write_adapter(adapter, directory)
        for name, data in serving_files(place, prompts.template, prompts.tool_template).items():
            (directory / name).write_bytes(data)
        card = model_card(manifest, str(out_dir), misread=why_misread(tuning, config), unmergeable=why_unmergeable(tuning, config))
        (directory / names.README).write_text(card, encoding="utf-8")
        report = make_report(adapter, "litlora", proof_of(adapter, directory), base=asdict(manifest.base) if manifest.base else None)
        write_report(directory, report)
        (directory / names.MANIFEST).write_bytes(manifest.with_files(records_of(directory)).encode())
    return report


def write_adapter(adapter: Adapter, directory: Path) -> None:
    """Its config and its tensors. Files that are in PEFT's form already are copied."""
    config = adapter.config_json if adapter.config_json is not None else as_json(adapter.values)
    (directory / names.ADAPTER_CONFIG).write_bytes(config)
    target = directory / names.ADAPTER_WEIGHTS
    if adapter.file is not None:
        shutil.copyfile(adapter.file, target)
    else:
        write_parts(target, adapter.tensors)


def proof_of(adapter: Adapter, directory: Path) -> dict[str, Any]:
    path = directory / names.ADAPTER_WEIGHTS
    return compared(adapter.tensors, parts_of(dict.fromkeys(names_in(path), path)), directory) | {"sha256": sha256(path)}


def adapter_bytes(adapter: Adapter) -> int:
    return sum(part.size for part in adapter.tensors.values()) + 2**24


# ---- what a manifest says of it --------------------------------------------------------------------------------------


def meaning(adapter: Adapter, config: Config) -> tuple[str, dict[str, Any], Tuning]:
    """(method, its options, what it does to its base) of an adapter as PEFT describes it."""
    where = adapter.path / names.ADAPTER_CONFIG
    if is_prompt(adapter.values):
        options = prompt_from_peft(adapter.values, where)
        tuning = from_manifest("adapter", options, config, where)
        if not tuning.in_peft:
            raise UserError(f"PEFT computes something else for such prompts on this {config.model_type} model", where=where)
        return "adapter", options, tuning
    described = adapter_config_from_peft(adapter.values, where)
    with located(where):
        tuning = from_peft(described, config)
    return "lora", asdict(lora_options(tuning, config)), tuning


def peft_card(adapter: Adapter) -> str:
    """README.md of a PEFT directory."""
    base = adapter.values.get("base_model_name_or_path")
    return f"""---
library_name: peft
tags: [litlora, converted]
---

# {adapter.path.resolve().name}

A PEFT adapter, made by `litlora convert` from the {adapter.kind} `{adapter.path.resolve()}`. It holds no base weights; its base is
`{base or "not recorded"}`. `{names.CONVERT_REPORT}` says what was read, with its sha256, and that every tensor was compared with it.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base or "the base"!r})
model = PeftModel.from_pretrained(model, "the directory that holds this file")
```
"""
