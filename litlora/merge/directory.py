"""What lies beside the weights, so that the directory is a complete model: config, tokenizer, template, licence, report."""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import combine
from litlora.checkpoint.reading import file_in, parse_json, read_bytes, sha256
from litlora.checkpoint.tokenizers import template_files, tokenizer_files
from litlora.console import counted
from litlora.families import changed_keys, expected_tensors, with_changes
from litlora.merge.outputs import NewModel
from litlora.merge.plan import Plan
from litlora.merge.tensors import Moved
from litlora.methods.tuning import HEAD, LoRASlot, ScaleShiftSlot, Tuning
from litlora.safetensors_file import DTYPES


def write_small_files(plan: Plan, directory: Path) -> None:
    """config.json, generation_config.json, the index, licences, tokenizer, chat template and README."""
    write_model_files(plan.model, directory)
    for name, data in new_tokenizer_files(plan).items():
        (directory / name).write_bytes(data)
    (directory / names.README).write_text(model_card(plan))


def write_model_files(model: NewModel, directory: Path) -> None:
    """What says which model the weights are, and what its base says of use and licence."""
    (directory / names.CONFIG).write_bytes(config_bytes(model))
    if not (directory / names.WEIGHTS).exists():
        (directory / names.WEIGHTS_INDEX).write_bytes(index_bytes(model))
    copy_files(model.base.path, (names.GENERATION_CONFIG, *names.LICENCE_FILES, *names.PROCESSOR_FILES), directory)


def copy_files(source: Path, wanted: Iterable[str], directory: Path) -> None:
    for name in wanted:
        if (source / name).exists():
            (directory / name).write_bytes(read_bytes(file_in(source, name)))


def config_bytes(model: NewModel) -> bytes:
    """The base's config.json, byte for byte where the model has its shape; its dtype is another one only where the weights' is."""
    raw = read_bytes(file_in(model.base.path, names.CONFIG))
    changed = changed_keys(model.base_config, model.config)
    if model.dtype is None and not changed:
        return raw
    values = parse_json(raw, model.base.path / names.CONFIG)
    if model.dtype is not None:
        word = next(word for word, code in DTYPES.items() if code == model.dtype)
        values = values | dict.fromkeys([key for key in ("torch_dtype", "dtype") if key in values] or ["torch_dtype"], word)
    return encode(with_changes(values, changed))


def index_bytes(model: NewModel) -> bytes:
    """The base's index, where the same files hold the same tensors; else one of all tensors, as every file has what it had and more."""
    raw = read_bytes(file_in(model.base.path, names.WEIGHTS_INDEX))
    if model.dtype is None and model.keeps_names:
        return raw
    values = parse_json(raw, model.base.path / names.WEIGHTS_INDEX)
    metadata = values.get("metadata")
    metadata = (dict(metadata) if isinstance(metadata, dict) else {}) | {"total_size": model.bytes}
    if model.keeps_names:
        return encode(values | {"metadata": metadata})
    metadata.pop("total_parameters", None)  # of the base
    return encode({"metadata": metadata, "weight_map": {name: path.name for name, path in sorted(new_shards(model).items())}})


def new_shards(model: NewModel) -> dict[str, Path]:
    """Every tensor of the new model that a reader sees, and the base's file of the name of its own. (What the base's index leaves
    out, where it stays, is left out.)"""
    if model.keeps_names:
        return model.base.shards()
    return {output.name: path for path, outputs in model.outputs.items() for output in outputs}


def new_tokenizer_files(plan: Plan) -> dict[str, bytes]:
    """The adapter's tokenizer, and how it was spoken to. A template goes to both places where readers look for one: a file of its own,
    and tokenizer_config.json; several go to the latter alone."""
    found, template = tokenizer_files(plan.checkpoint.tokenizer_dir()), chat_template(plan)
    config = found.get(names.TOKENIZER_CONFIG)
    if template and config is not None:
        values = parse_json(config, plan.checkpoint.tokenizer_dir() / names.TOKENIZER_CONFIG)
        found[names.TOKENIZER_CONFIG] = encode(values | {"chat_template": template})
    found.pop(names.CHAT_TEMPLATE, None)
    return found | ({names.CHAT_TEMPLATE: template.encode()} if isinstance(template, str) else {})


def chat_template(plan: Plan) -> Any:
    """The template that the adapter was trained with, as its directory has it, or a list of several by name; else the base's."""
    for place in (plan.checkpoint.path, plan.model.base.path):
        found = template_files(place)
        if names.CHAT_TEMPLATE in found:
            return found[names.CHAT_TEMPLATE].decode("utf-8")
        if template := parse_json(found.get(names.TOKENIZER_CONFIG, b"{}"), place / names.TOKENIZER_CONFIG).get("chat_template"):
            return template
    return None


def model_card(plan: Plan) -> str:
    """README.md: where this model comes from, and commands that work with it."""
    base, manifest = plan.model.base, plan.checkpoint.manifest
    trained = f" after {counted(manifest.step, 'step')} of training" if manifest and manifest.step else ""
    return f"""{front_matter(plan.model, [method_word(plan), "merged"])}
# {base.path.name} with {what_was_trained(plan.tuning)} merged in

Written by `litlora merge_lora` from the base `{base.recorded_path}` and the adapter `{plan.checkpoint.path.name}`{trained}. It is a
plain model: nothing is left to attach. `{names.MERGE_REPORT}` says which modules changed, by how much, and what rounding cost. The
licence of the base goes for this model too.

{how_to_use()}"""


def front_matter(model: NewModel, tags: list[str]) -> str:
    licence = base_licence(model.base.path)
    lines = ["library_name: transformers", "pipeline_tag: text-generation", *([f"license: {licence}"] if licence else [])]
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---", ""])


def how_to_use() -> str:
    return """In the directory that holds this file:

    litlora chat .
    vllm serve .
    python -c "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.from_pretrained('.'))"
"""


def method_word(plan: Plan) -> str:
    dora = any(isinstance(slot, LoRASlot) and slot.use_dora for slot in plan.tuning.slots.values())
    return "dora" if dora else plan.checkpoint.method


def what_was_trained(tuning: Tuning) -> str:
    """In words: LoRA on 14 modules and 2 tensors trained whole."""
    kinds = Counter("DoRA" if slot.use_dora else "LoRA" for slot in tuning.slots.values() if isinstance(slot, LoRASlot))
    kinds["scales and shifts"] = sum(isinstance(slot, ScaleShiftSlot) for slot in tuning.slots.values())
    parts = [f"{kind} on {counted(number, 'module')}" for kind, number in kinds.items() if number]
    parts += [f"{counted(len(tuning.inserted), 'new block')} (LLaMA-Pro)"] if tuning.inserted else []
    parts += [f"{counted(len(tuning.whole), 'tensor')} trained whole"] if tuning.whole else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def base_licence(base: Path) -> str:
    """What the base's own card says its licence is."""
    card = base / names.README
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]
    words = [line.removeprefix("license:").strip() for line in lines if line.startswith("license:")]
    return words[0] if words and words[0].replace("-", "").replace(".", "").isalnum() else ""


# ---- the report ------------------------------------------------------------------------------------------------------


def make_report(plan: Plan, moved: Mapping[str, Moved], directory: Path) -> dict[str, Any]:
    """merge_report.json. It holds no time and no duration: the same merge gives the same bytes."""
    model, changed = plan.model, by_module(plan.model, moved)
    total = summed(changed.values())
    record = plan.checkpoint.manifest
    return {
        "format_version": 2,  # 1 had no hash of its own
        "adapter": {
            "path": str(plan.checkpoint.path.resolve()),
            "sha256": plan.adapter_sha256,
            "step": record.step if record else None,
            "method": method_word(plan),
        },
        "base": {"path": model.base.recorded_path, "bytes": model.base_bytes, "fingerprint": fingerprint_before(model, moved)},
        "base_was_proven": record is not None and record.base is not None,
        "trained_on": plan.checkpoint.quantize,  # the few bits that training held the base in; what was merged into is the base itself
        "merged": {"bytes": model.bytes, "fingerprint": fingerprint_after(model, moved)},
        "size": size_explained(model),
        "tensors": {
            "changed": sum(output.own and output.is_changed for output in model),
            "converted": sum(bool(output.source) and output.dtype != output.source_dtype for output in model),
            "copied": sum(output.own and output.is_copied for output in model),
            "new": sum(not output.own for output in model),
        },
        "new_layers": list(model.new_layers),
        "update_relative_norm": short(total.relative),
        "update_lost_to_rounding": short(total.lost),
        "modules_unchanged": [module for module, one in changed.items() if not one.update],
        "modules": {module: {"relative_norm": short(one.relative), "lost_to_rounding": short(one.lost)} for module, one in changed.items()},
        "versions": {"litlora": version(), "numpy": np.__version__, "python": platform.python_version()},
        "files": {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name not in {file.name for file in model.files}},
        "weights": {name: one.after for name, one in sorted(moved.items())},
    }


def by_module(model: NewModel, moved: Mapping[str, Moved]) -> dict[str, Moved]:
    """What happened to each module that training changed, its weight and its bias together; in the model's order."""
    order = {name: number for number, name in enumerate(expected_tensors(model.config))}
    of_module: dict[str, list[Moved]] = {}
    for output in sorted(model, key=lambda output: order.get(output.parameter, len(order))):
        if output.is_changed:
            of_module.setdefault(output.module, []).append(moved[output.name])
    return {module: summed(parts) for module, parts in of_module.items()}


def summed(parts: Iterable[Moved]) -> Moved:
    total = Moved()
    for one in parts:
        total.weight, total.update, total.rounding = total.weight + one.weight, total.update + one.update, total.rounding + one.rounding
    return total


def fingerprint_before(model: NewModel, moved: Mapping[str, Moved]) -> str:
    """Of all weights of the base, from the bytes that were read."""
    digests = {output.source: moved[output.name].before for output in model if output.own and output.source}
    return combine({name: digests[name] for name in model.base.shards()})


def fingerprint_after(model: NewModel, moved: Mapping[str, Moved]) -> str:
    return combine({name: moved[name].after for name in new_shards(model)})


def size_explained(model: NewModel) -> str:
    why = reasons(model)
    if not why:
        return "as large as the base: every tensor keeps its name, shape and dtype, and what was trained is in its numbers"
    kept = "" if any(not output.own for output in model) else "; no tensor was added or left out"
    return f"{model.bytes / model.base_bytes:.2f} times the base: {'; '.join(why)}{kept}"


def reasons(model: NewModel) -> list[str]:
    """Why it is not as large as its base."""
    added = [output for output in model if not output.own]
    blocks, biases = len(model.new_layers), sum(not output.in_new_layer and output.parameter.endswith(".bias") for output in added)
    why = [f"{counted(blocks, 'block was', 'blocks were')} inserted"] if blocks else []
    why += ["the head was separated from the embedding"] if any(output.parameter == HEAD for output in added) else []
    why += [f"{counted(biases, 'bias was', 'biases were')} added"] if biases else []
    converted = any(output.source and output.dtype != output.source_dtype for output in model)
    return [*why, "the numbers are stored in another dtype"] if converted else why


def short(value: float) -> float | None:
    """Four digits: enough to judge by, and the same on every machine. None for a share of nothing."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def version() -> str:
    from litlora import __version__

    return __version__


def encode(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
