"""What C4 merges, and whether it was merged right.

    python -m extensions.benchmarks.merge_files step BASE STEP
    python -m extensions.benchmarks.merge_files check BASE STEP MERGED

In processes of their own: Linux counts what a driver once held as the peak of every process that it starts later.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from extensions.benchmarks.artefacts import PROJECTIONS, sizes
from litlora.safetensors_file import SafetensorsFile, from_float32, to_float32

RANK, ALPHA, SEED = 16, 32, 1235
SAMPLED = 64  # rows of each sampled module that are compared with fp64
ALL = 2**31  # more rows than there are
DIGITS = {"BF16": 8, "F32": 24}  # binary ones of a number, the leading one included
WEIGHTS = "model.safetensors"  # of the base
SETTLED = 3.0  # seconds after its last change; hashes of a younger file are not remembered

Read = Callable[[str, int], tuple[str, npt.NDArray[np.float32]]]  # of a module its dtype and its first rows


def make_step(base: Path, step: Path) -> None:
    """A step as training commits it: LoRA on every projection, and a manifest with the base's fingerprint. It is a PEFT adapter too.

    Its numbers are such as bf16 has, so that a tool which keeps an adapter in bf16 merges the same one.
    """
    from litlora import peft
    from litlora.checkpoint import BaseRecord, Manifest, commit_step
    from litlora.checkpoint.fingerprint import fingerprint
    from litlora.families import config_from_hf
    from litlora.methods import from_peft

    shutil.rmtree(step.parent, ignore_errors=True)
    step.parent.mkdir(parents=True)
    config = config_from_hf(json.loads((base / "config.json").read_text()), "the benchmark's base")
    adapter = peft.AdapterConfig(r=RANK, alpha=ALPHA, target_modules=peft.ALL_LINEAR, base_model_name_or_path=str(base))
    generator = np.random.default_rng(SEED)

    def drawn(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return to_float32(from_float32(generator.standard_normal(shape, np.float32) * np.float32(0.01), "BF16"), "BF16", shape)

    tensors = {name: ("F32", shape, drawn(shape)) for name, shape in from_peft(adapter, config).file_shapes(config).items()}
    time.sleep(max(0.0, (base / WEIGHTS).stat().st_ctime + SETTLED - time.time()))
    with SafetensorsFile(base / WEIGHTS) as file:
        seen = fingerprint(dict.fromkeys(file.tensors, base / WEIGHTS))
    of_base = BaseRecord(path=str(base), model_type="llama", fingerprint=seen)
    commit_step(
        step.parent,
        Manifest(method="lora", options={"r": RANK}, step=int(step.name.partition("-")[2]), epoch=1.0, tokens=0, base=of_base),
        tensors={"adapter_model.safetensors": tensors},
        files={"adapter_config.json": json.dumps(peft.adapter_config_to_peft(adapter)).encode()},
    )


def check(base: Path, step: Path, merged: Path) -> dict[str, Any]:
    """Rows of every projection of the first and the last block against fp64; and what nothing was merged into, bit for bit: the
    embedding, the last block's first norm, the last norm, and the head where it is not the embedding.

    `units`: the worst error, counted in steps of bf16 at the largest of base, change and sum; rounded once it is at most a half.
    `of_bound`: the same over half a step of what was written and what products in fp32 may lose; at most 1 for what adds in fp32.
    """
    config = json.loads((base / "config.json").read_text())
    read = read_litgpt(merged, config) if (merged / "lit_model.pth").is_file() else read_safetensors(merged)
    units, of_bound, dtypes = [], [], set()
    last = config["num_hidden_layers"] - 1
    untouched = ["model.embed_tokens", f"model.layers.{last}.input_layernorm", "model.norm"]
    if not config["tie_word_embeddings"]:
        untouched.append("lm_head")
    with SafetensorsFile(base / WEIGHTS) as before, SafetensorsFile(step / "adapter_model.safetensors") as adapter:
        for module in (f"model.layers.{layer}.{name}" for layer in (0, last) for name in PROJECTIONS):
            a, b = (adapter.float32(f"base_model.model.{module}.lora_{side}.weight").astype(np.float64) for side in "AB")
            old, b = before.float32(f"{module}.weight")[:SAMPLED].astype(np.float64), ALPHA / RANK * b[:SAMPLED]
            dtype, found = read(module, len(old))
            new, exact = found.astype(np.float64), old + b @ a
            largest = np.maximum(np.maximum(np.abs(old), np.abs(b @ a)), np.abs(exact))
            lost = (RANK + 2) * 2.0**-24 * (np.abs(old) + np.abs(b) @ np.abs(a))
            units.append((np.abs(new - exact) / (2 * half_step(largest, "BF16"))).max())
            of_bound.append((np.abs(new - exact) / (half_step(np.abs(new), dtype) + lost)).max())
            dtypes.add(dtype)
        same = [equal_bits(read(module, ALL)[1], before.float32(f"{module}.weight")) for module in untouched]
    worst = {"units": float(np.max(units)), "of_bound": float(np.max(of_bound))}  # a nan stays one
    return {"dtype": " ".join(sorted(dtypes)), **worst, "untouched_same": all(same)}


def equal_bits(found: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> bool:
    return np.array_equal(found.view(np.uint32), right.view(np.uint32))


def half_step(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """Half the distance to the next number that `dtype` has: the most that one rounding to it loses."""
    halves: npt.NDArray[np.float64] = 2.0 ** (np.floor(np.log2(np.maximum(values, 2.0**-126))) - DIGITS[dtype])
    return halves


def read_safetensors(merged: Path) -> Read:
    files = [SafetensorsFile(path) for path in sorted(merged.glob("*.safetensors"))]

    def read(module: str, rows: int) -> tuple[str, npt.NDArray[np.float32]]:
        file = next(file for file in files if f"{module}.weight" in file.tensors)
        return file.tensors[f"{module}.weight"].dtype, file.float32(f"{module}.weight")[:rows]

    return read


def read_litgpt(merged: Path, config: dict[str, Any]) -> Read:
    """litgpt stacks q, k and v in one matrix."""
    import torch

    weights = torch.load(merged / "lit_model.pth", mmap=True, weights_only=True)
    width = sizes(config)
    outside = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
    theirs = {
        "input_layernorm": ("norm_1", 0),
        "self_attn.q_proj": ("attn.qkv", 0),
        "self_attn.k_proj": ("attn.qkv", width["queries"]),
        "self_attn.v_proj": ("attn.qkv", width["queries"] + width["keys"]),
        "self_attn.o_proj": ("attn.proj", 0),
        "mlp.gate_proj": ("mlp.fc_1", 0),
        "mlp.up_proj": ("mlp.fc_2", 0),
        "mlp.down_proj": ("mlp.proj", 0),
    }

    def read(module: str, rows: int) -> tuple[str, npt.NDArray[np.float32]]:
        if module in outside:
            name, start = outside[module], 0
        else:
            _, _, layer, within = module.split(".", 3)
            name, start = theirs[within]
            name = f"transformer.h.{layer}.{name}"
        weight = weights[f"{name}.weight"]
        return {torch.bfloat16: "BF16", torch.float32: "F32"}[weight.dtype], weight[start : start + rows].float().numpy()

    return read


if __name__ == "__main__":
    places = [Path(word) for word in sys.argv[2:]]
    if sys.argv[1] == "step":
        make_step(*places)
    else:
        print(json.dumps(check(*places)))
