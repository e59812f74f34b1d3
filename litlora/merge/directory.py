"""What lies beside the weights, so that the directory is a complete model: config, tokenizer, template, licence, report."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import combine
from litlora.checkpoint.reading import file_in, parse_json, read_bytes, read_json, sha256
from litlora.merge.plan import Plan
from litlora.merge.tensors import DTYPES, Moved


def write_small_files(plan: Plan, directory: Path) -> None:
    """config.json, generation_config.json, the index, licences, tokenizer, chat template and README."""
    base, tokenizer = plan.base.path, plan.checkpoint.tokenizer_dir()
    (directory / names.CONFIG).write_bytes(config_bytes(plan))
    copied = [(base, name) for name in (names.GENERATION_CONFIG, *names.LICENCE_FILES)]
    copied += [(tokenizer, name) for name in names.TOKENIZER_FILES if name not in (names.TOKENIZER_CONFIG, names.CHAT_TEMPLATE)]
    for place, name in copied:
        if (place / name).exists():
            (directory / name).write_bytes(read_bytes(file_in(place, name)))
    if not (directory / names.WEIGHTS).exists():
        (directory / names.WEIGHTS_INDEX).write_bytes(index_bytes(plan))
    write_tokenizer_config(plan, directory)
    (directory / names.README).write_text(model_card(plan))


def config_bytes(plan: Plan) -> bytes:
    """The base's config.json; its dtype is another one only where the weights' is, under both names that it has had."""
    raw = read_bytes(file_in(plan.base.path, names.CONFIG))
    if plan.dtype is None:
        return raw
    values = parse_json(raw, plan.base.path / names.CONFIG)
    word = next(word for word, code in DTYPES.items() if code == plan.dtype)
    keys = [key for key in ("torch_dtype", "dtype") if key in values] or ["torch_dtype"]
    return encode(values | dict.fromkeys(keys, word))


def index_bytes(plan: Plan) -> bytes:
    """The base's index: the same files hold the same tensors; only their size may be another one."""
    raw = read_bytes(file_in(plan.base.path, names.WEIGHTS_INDEX))
    if plan.dtype is None:
        return raw
    values = parse_json(raw, plan.base.path / names.WEIGHTS_INDEX)
    metadata = values.get("metadata")
    return encode(values | {"metadata": (metadata if isinstance(metadata, dict) else {}) | {"total_size": plan.merged_bytes}})


def write_tokenizer_config(plan: Plan, directory: Path) -> None:
    """The chat template goes to both places where readers look for one: a file of its own, and tokenizer_config.json."""
    place, template = plan.checkpoint.tokenizer_dir(), chat_template(plan)
    if template is not None:
        (directory / names.CHAT_TEMPLATE).write_bytes(template.encode())
    if (place / names.TOKENIZER_CONFIG).exists():
        values = read_json(place, names.TOKENIZER_CONFIG)
        (directory / names.TOKENIZER_CONFIG).write_bytes(encode(values | ({"chat_template": template} if template is not None else {})))


def chat_template(plan: Plan) -> str | None:
    """The template that the adapter was trained with, as its directory has it; else the base's."""
    for place in (plan.checkpoint.path, plan.base.path):
        if (place / names.CHAT_TEMPLATE).exists():
            return read_bytes(file_in(place, names.CHAT_TEMPLATE)).decode("utf-8")
        if (place / names.TOKENIZER_CONFIG).exists():
            template = read_json(place, names.TOKENIZER_CONFIG).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def model_card(plan: Plan) -> str:
    """README.md: where this model comes from, and commands that work with it."""
    licence = base_licence(plan)
    manifest = plan.checkpoint.manifest
    trained = f" after {manifest.step} steps of training" if manifest else ""
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"license: {licence}"] if licence else []),
        "tags: [lora, merged]",
    ]
    return f"""---
{chr(10).join(front)}
---

# {plan.base.path.name} with a LoRA adapter merged in

Written by `litlora merge_lora` from the base `{plan.base.recorded_path}` and the adapter `{plan.checkpoint.path.name}`{trained}. It is a
plain model: nothing is left to attach. `{names.MERGE_REPORT}` says which modules changed, by how much, and what rounding cost. The
licence of the base goes for this model too.

In the directory that holds this file:

    litlora chat .
    vllm serve .
    python -c "from transformers import AutoModelForCausalLM; print(AutoModelForCausalLM.from_pretrained('.'))"
"""


def base_licence(plan: Plan) -> str:
    """What the base's own card says its licence is."""
    card = plan.base.path / names.README
    if not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]
    words = [line.removeprefix("license:").strip() for line in lines if line.startswith("license:")]
    return words[0] if words and words[0].replace("-", "").replace(".", "").isalnum() else ""


# ---- the report ------------------------------------------------------------------------------------------------------


def make_report(plan: Plan, moved: Mapping[str, Moved], directory: Path) -> dict[str, Any]:
    """merge_report.json. It holds no time and no duration: the same merge gives the same bytes."""
    changed = {target.module: moved[name] for name, target in plan.targets.items()}
    update, rounding = (sum(getattr(one, part) for one in changed.values()) for part in ("update", "rounding"))
    converted = [name for tensors in plan.files.values() for name, info in tensors.items() if plan.stored_dtype(name, info) != info.dtype]
    record = plan.checkpoint.manifest
    return {
        "format_version": 1,
        "adapter": {
            "path": str(plan.checkpoint.path.resolve()),
            "sha256": plan.adapter_sha256,
            "step": record.step if record else None,
            "method": "dora" if any(target.magnitude for target in plan.targets.values()) else "lora",
        },
        "base": {"path": plan.base.recorded_path, "bytes": plan.base_bytes, "fingerprint": whole(plan, moved, "before")},
        "base_was_proven": record is not None and record.base is not None,
        "merged": {"bytes": plan.merged_bytes, "fingerprint": whole(plan, moved, "after")},
        "size": size_explained(plan),
        "tensors": {
            "changed": len(plan.targets),
            "converted": len(converted),
            "copied": sum(one.before == one.after for name, one in moved.items() if name not in plan.targets),
        },
        "update_relative_norm": short(Moved(weight=sum(one.weight for one in changed.values()), update=update).relative),
        "update_lost_to_rounding": short(Moved(update=update, rounding=rounding).lost),
        "modules_unchanged": [module for module, one in changed.items() if not one.update],
        "modules": {module: {"relative_norm": short(one.relative), "lost_to_rounding": short(one.lost)} for module, one in changed.items()},
        "versions": {"litlora": version(), "numpy": np.__version__, "python": platform.python_version()},
        "files": {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.name not in {file.name for file in plan.files}},
        "weights": {name: one.after for name, one in sorted(moved.items())},
    }


def whole(plan: Plan, moved: Mapping[str, Moved], moment: str) -> str:
    """The fingerprint of all weights, before or after."""
    return combine({name: getattr(moved[name], moment) for name in plan.base.shards()})


def size_explained(plan: Plan) -> str:
    if plan.merged_bytes == plan.base_bytes:
        return "as large as the base: every tensor keeps its name, shape and dtype, and the adapter is added into its numbers"
    share = plan.merged_bytes / plan.base_bytes
    return f"{share:.2f} times the base: the numbers are stored in another dtype; no tensor was added or left out"


def short(value: float) -> float:
    """Four digits: enough to judge by, and the same on every machine."""
    return float(f"{value:.4g}")


def version() -> str:
    from litlora import __version__

    return __version__


def encode(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
