"""Quantised checkpoints: fp8 with scales made plain by `litlora convert`; every other one refused by the name of its method."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_tokens, relative, tiny_gpt, tiny_hf_config
from safetensors.torch import load_file, save_file
from talkers import byte_tokenizer
from test_finetune import did, refused

from litlora import GPT
from litlora.checkpoint import names
from litlora.convert.fp8 import e4m3
from litlora.convert.parts import Part
from litlora.families.quant_methods import HOW

BLOCK = (16, 24)  # no side of the matrices is a multiple of it
LAYOUTS = ("blocks", "rows", "matrix")
NAMED = {"blocks": "fp8", "rows": "compressed-tensors", "matrix": "fp8"}


def split(weight: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 numbers and their scales, as whoever publishes them makes them."""
    rows, columns = {"blocks": BLOCK, "rows": (1, weight.size(1)), "matrix": tuple(weight.shape)}[layout]
    down, across = -(-weight.size(0) // rows), -(-weight.size(1) // columns)
    scale = torch.empty(down, across)
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(down):
        for j in range(across):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale if layout != "matrix" else scale.reshape(())


def plain(stored: torch.Tensor, scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The reference: number by number."""
    rows, columns = {"blocks": BLOCK, "rows": (1, stored.size(1)), "matrix": tuple(stored.shape)}[layout]
    i, j = torch.meshgrid(torch.arange(stored.size(0)) // rows, torch.arange(stored.size(1)) // columns, indexing="ij")
    return (stored.float() * (scale if scale.dim() == 0 else scale[i, j])).to(torch.bfloat16)


def published(path: Path, layout: str, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Qwen 3 in fp8, and the plain weights that are meant."""
    values = tiny_hf_config("qwen3", vocab_size=288, torch_dtype="bfloat16", **changes)
    tensors, meant = {}, {}
    for name, tensor in tiny_gpt("qwen3", vocab_size=288, **changes).state_dict().items():
        if tensor.dim() == 1 or "embed" in name or "lm_head" in name:
            tensors[name] = meant[name] = tensor.to(torch.bfloat16).clone()
            continue
        stored, scale = split(tensor, layout)
        module = name.removesuffix("weight")
        tensors |= {name: stored, module + ("weight_scale_inv" if layout == "blocks" else "weight_scale"): scale}
        if layout == "matrix":
            tensors[module + "input_scale"] = torch.tensor(0.5)
        meant[name] = plain(stored, scale, layout)
    path.mkdir()
    own = {"weight_block_size": list(BLOCK)} if layout == "blocks" else {}
    values["quantization_config"] = {"quant_method": NAMED[layout], **own}
    (path / names.CONFIG).write_text(json.dumps(values))
    save_file(tensors, path / names.WEIGHTS, {"format": "pt"})
    return byte_tokenizer(path), meant


def test_every_fp8_number_is_what_torch_says() -> None:
    """All 256, subnormal ones and the two that are no numbers. Caught: bias 8; a leading 1 in the least exponent."""
    codes = np.arange(256, dtype=np.uint8)
    ours = torch.from_numpy(e4m3(Part(dtype="F8_E4M3", shape=(256,), load=lambda: codes)))
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_weights_become_plain_ones(layout: str, tmp_path: Path) -> None:
    """M02, issue 5.3. Bit for bit the reference, rounded once; transformers reads the result. Caught: divided by the scale; blocks of rows
    and columns exchanged; the last block not cut; quantization_config left in config.json."""
    from transformers import AutoModelForCausalLM

    base, meant = published(tmp_path / "fp8", layout)
    said = refused(["finetune", "lora", "--checkpoint_dir", str(base), "--out_dir", str(tmp_path / "run")])
    assert "quantization_config" in said and "litlora convert" in said and not (tmp_path / "run").exists()
    did(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "out")])
    found = load_file(tmp_path / "out" / names.WEIGHTS)
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    ours, tokens = GPT.from_pretrained(tmp_path / "out", dtype=torch.float32).eval(), random_tokens(2, 20)
    with torch.no_grad():
        want = theirs(tokens).logits
        assert (ours(tokens) - want).abs().max() <= 1e-5 * want.abs().max()
        assert relative(ours(tokens), tiny_gpt("qwen3", vocab_size=288)(tokens)) < 0.1  # what fp8 costs
    report = json.loads((tmp_path / "out" / names.CONVERT_REPORT).read_text())
    assert set(report["dropped"]) == {name for name in load_file(base / names.WEIGHTS) if name.endswith("input_scale")}


@pytest.mark.parametrize("fault", ["lost", "shape", "packed", "stray"])
def test_fp8_that_is_not_understood_is_refused_whole(fault: str, tmp_path: Path) -> None:
    base, _ = published(tmp_path / "fp8", "blocks")
    tensors, name = load_file(base / names.WEIGHTS), "model.layers.1.mlp.up_proj.weight"
    if fault == "lost":
        del tensors[f"{name}_scale_inv"]
    elif fault == "shape":
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"].T.contiguous()
    elif fault == "packed":
        tensors[name] = tensors[name].view(torch.uint8)
    else:
        tensors["model.layers.1.mlp.old_proj.weight_scale_inv"] = torch.ones(2, 2)
    save_file(tensors, base / names.WEIGHTS, {"format": "pt"})
    said = refused(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "out")])
    assert ("old_proj" if fault == "stray" else name) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [*HOW, "something-new", None])
def test_every_other_method_is_refused_by_its_name(method: str | None, tmp_path: Path) -> None:
    """Caught: a method without an entry that falls through."""
    base, _ = published(tmp_path / "base", "rows")
    values = json.loads((base / names.CONFIG).read_text())
    values["quantization_config"] = {"bits": 4} if method is None else {"quant_method": method}
    (base / names.CONFIG).write_text(json.dumps(values))
    said = refused(["generate", str(base), "--prompt", "a"])
    assert "quantised" in said and "hint: " in said
    assert (HOW[method][0] if method in HOW else method or "not named") in said
