"""Small checkpoints for tests, made without torch: a base of unfriendly shapes, steps on it, PEFT adapters."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import Tensors, commit_step
from litlora.checkpoint.manifest import BaseRecord, Manifest, TrainingState
from litlora.families import config_from_hf, expected_tensors
from litlora.methods import from_peft
from litlora.peft import adapter_config_from_peft
from litlora.safetensors_file import write_safetensors

CONFIG: dict[str, Any] = {  # head_dim * heads != hidden_size, fewer key/value heads, no power of two anywhere
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "bias": "none",
}


def base_tensors(seed: int = 0, **changes: Any) -> Tensors:
    """Every tensor of the base, norm gains included, random."""
    random = np.random.default_rng(seed)
    shapes = expected_tensors(config_from_hf({**CONFIG, **changes}, "config.json"))
    return {name: ("F32", shape, random.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def make_base(path: Path, seed: int = 0, *, shards: int = 1, tensors: Tensors | None = None, **changes: Any) -> Path:
    """A Hugging Face directory."""
    path.mkdir(parents=True)
    tensors = base_tensors(seed, **changes) if tensors is None else tensors
    (path / names.CONFIG).write_text(json.dumps({**CONFIG, **changes}))
    (path / names.TOKENIZER).write_text('{"version": "1.0"}')
    if shards == 1:
        write_safetensors(path / names.WEIGHTS, tensors, {"format": "pt"})
        return path
    weight_map = {name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        write_safetensors(path / file, {name: tensors[name] for name in tensors if weight_map[name] == file}, {"format": "pt"})
    (path / names.WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def adapter_tensors(seed: int = 0, config: Mapping[str, Any] = ADAPTER, **changes: Any) -> Tensors:
    random = np.random.default_rng(seed)
    base = config_from_hf({**CONFIG, **changes}, "config.json")
    shapes = from_peft(adapter_config_from_peft(config, "adapter_config.json"), base).file_shapes(base)
    return {name: ("F32", shape, random.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def make_adapter(path: Path, base: str, seed: int = 0, **changes: Any) -> Path:
    """A PEFT adapter that litlora did not write."""
    path.mkdir(parents=True)
    config = {**ADAPTER, "base_model_name_or_path": base, **changes}
    (path / names.ADAPTER_CONFIG).write_text(json.dumps(config))
    write_safetensors(path / names.ADAPTER_WEIGHTS, adapter_tensors(seed, config), {"format": "pt"})
    return path


def manifest_of(step: int, base: BaseRecord | None = None, *, val_loss: float | None = None, **changes: Any) -> Manifest:
    options = {"r": ADAPTER["r"], "alpha": 6.0, "target_modules": ADAPTER["target_modules"], "use_dora": False}
    values: dict[str, Any] = {
        "method": "lora", "options": options, "step": step, "epoch": step / 100, "tokens": 1000 * step, "train_loss": 1.5,
        "val_loss": val_loss, "base": base, "tokenizer": "t" * 64, "chat_template": "c" * 64, "data": "d" * 64, "versions": {"torch": "0"},
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def add_step(run: Path, step: int, base: Path | None = None, *, val_loss: float | None = None, state: bool = True, size: int = 0) -> Path:
    """Commit `step-N`; without a base its record is made up. `size`: bytes more of training state."""
    run.mkdir(parents=True, exist_ok=True)
    record = (
        Checkpoint(base, "base").record(run) if base else BaseRecord(path="/nowhere", model_type="llama", fingerprint="xxh3:" + "0" * 32)
    )
    files = {
        names.ADAPTER_CONFIG: json.dumps({**ADAPTER, "base_model_name_or_path": record.path}).encode(),
        names.TOKENIZER: b'{"version": "1.0"}',
        names.CHAT_TEMPLATE: b"{{ messages }}",
        names.README: b"# a step\n",
    }
    moments = np.random.default_rng(step).normal(size=50 + size // 4).astype(np.float32)
    training = (
        TrainingState(tensors={"w/exp_avg": ("F32", moments.shape, moments)}, values={"values": {"position": step}}) if state else None
    )
    return commit_step(
        run,
        manifest_of(step, record, val_loss=val_loss),
        tensors={names.ADAPTER_WEIGHTS: adapter_tensors(step)},
        files=files,
        state=training,
    )


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, symlinks=True))
