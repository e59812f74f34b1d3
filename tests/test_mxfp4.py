"""MXFP4, as gpt-oss is released: `litlora convert` makes it plain, bit for bit what transformers makes of it."""

import json
import tracemalloc
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
from litlora.convert.mxfp4 import PAIRS, dequantised
from litlora.convert.parts import Part, cast, differing, parts_of, write_parts

SIZES: dict[str, Any] = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS = ("gate_up_proj", "down_proj")
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, in, out) -> blocks (E, out, in / 32, 16) and scales (E, out, in / 32), as section 6.3 of the specification makes them."""
    values = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # (E, out, groups, 32)
    exponent = values.abs().amax(-1).log2().floor() - 2  # 2 is the exponent of the largest number, 6
    codes = ((values / 2 ** exponent[..., None]).abs()[..., None] - MAGNITUDES).abs().argmin(-1) | (values < 0).long() << 3
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8)


def published(path: Path, **changes: Any) -> Path:
    """A gpt-oss as it is released: experts in MXFP4, everything else bf16, and no dtype in config.json."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tiny_gpt("gpt_oss", **SIZES).state_dict().items():
        name = name.replace("mlp.gate.", "mlp.router.")
        if name.endswith(EXPERTS):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantised(tensor)
        else:
            tensors[name] = tensor.to(torch.bfloat16).clone()
    path.mkdir()
    values = {**tiny_hf_config("gpt_oss", **SIZES), "quantization_config": {"quant_method": "mxfp4"}, **changes}
    (path / names.CONFIG).write_text(json.dumps(values))
    save_file(tensors, path / names.WEIGHTS, {"format": "pt"})
    return byte_tokenizer(path)


def plain(base: Path) -> dict[str, torch.Tensor]:
    """The reference: what transformers makes of the same file."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = load_file(base / names.WEIGHTS)
    wholes = {name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")}
    meant = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales"))}
    return meant | {name: convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]) for name in wholes}


def test_every_byte_is_two_numbers_of_four_bits() -> None:
    """All 256 against the table that transformers has. Caught: the high half first; an exponent's bias of 2; a sign lost."""
    from transformers.integrations.mxfp4 import FP4_VALUES

    for byte, (first, second) in enumerate(PAIRS.tolist()):
        assert (first, second) == (FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4])


def test_a_released_gpt_oss_becomes_plain(tmp_path: Path) -> None:
    """M02, issue 5: bit for bit what transformers dequantises; the model is read by transformers and computes what it does there.

    Caught: blocks not transposed; the scale's bias 128; quantization_config left in config.json.
    """
    from transformers import AutoModelForCausalLM, Mxfp4Config

    base = published(tmp_path / "mxfp4")
    said = refused(["finetune", "lora", "--checkpoint_dir", str(base), "--out_dir", str(tmp_path / "run")])
    assert "MXFP4" in said and "litlora convert" in said and not (tmp_path / "run").exists()
    did(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "out")])
    found, meant = load_file(tmp_path / "out" / names.WEIGHTS), plain(base)
    assert found.keys() == meant.keys() and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], meant[name]) for name in meant)
    values = json.loads((tmp_path / "out" / names.CONFIG).read_text())
    assert "quantization_config" not in values and values["torch_dtype"] == "bfloat16"
    report = json.loads((tmp_path / "out" / names.CONVERT_REPORT).read_text())
    assert report["from"]["kind"].endswith("in MXFP4") and report["proof"]["equal"] == len(found)
    tokens = random_tokens(2, 20)
    read: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        ours = GPT.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(tokens)
        dequantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=Mxfp4Config(dequantize=True), **read)
        for theirs in (AutoModelForCausalLM.from_pretrained(tmp_path / "out", **read), dequantised):
            want = theirs.eval()(tokens).logits
            assert (ours - want).abs().max() <= 1e-5 * want.abs().max()
        assert 0 < relative(ours, tiny_gpt("gpt_oss", **SIZES)(tokens)) < 0.3  # what four bits cost


@pytest.mark.parametrize(("dtype", "code"), [("float32", torch.float32), ("float16", torch.float16)])
def test_mxfp4_as_another_dtype_is_the_same_numbers(dtype: str, code: torch.dtype, tmp_path: Path) -> None:
    base = published(tmp_path / "mxfp4")
    did(["convert", str(base), "--to", "hf", "--dtype", dtype, "--out_dir", str(tmp_path / "out")])
    found, meant = load_file(tmp_path / "out" / names.WEIGHTS), plain(base)
    assert all(torch.equal(found[name], meant[name].to(code)) for name in meant)
    assert json.loads((tmp_path / "out" / names.CONFIG).read_text())["torch_dtype"] == dtype


def test_the_smallest_and_the_largest_scales_are_exact(tmp_path: Path) -> None:
    """Scale codes from 0 on, subnormal numbers of bf16 among them. Caught: exponents cut at -126."""
    base = published(tmp_path / "mxfp4")
    tensors, name = load_file(base / names.WEIGHTS), "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_scales"].view(-1)[:4] = torch.tensor([0, 1, 252, 254])
    tensors[f"{name}_blocks"].view(-1, 16)[3] = 0  # times any scale
    save_file(tensors, base / names.WEIGHTS, {"format": "pt"})
    did(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "out")])
    found, meant = load_file(tmp_path / "out" / names.WEIGHTS)[name], plain(base)[name]
    assert torch.equal(found, meant) and 0 < found.abs()[found != 0].min() < 2.0**-126 and found.abs().max() > 2.0**126


FAULTS = {
    "no blocks": "down_proj_blocks is missing",
    "no scales": "down_proj_scales is missing",
    "twice": "down_proj is there a second time",
    "shape": "down_proj: its blocks",
    "no experts": "down_proj: its blocks",
    "nothing in them": "down_proj: its blocks",
    "dtype": "down_proj: its blocks",
    "no number": "down_proj holds values that are not finite",
    "too large": "down_proj holds values that are not finite",
    "other bytes": "old_weight is U8",
    "experts": "down_proj",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mxfp4_that_is_torn_or_not_understood_is_refused_whole(fault: str, tmp_path: Path) -> None:
    """F13, N05: by the tensor's name, and nothing is written. Caught: 255 taken for a scale; a second copy that is dropped."""
    base = published(tmp_path / "mxfp4")
    tensors, name = load_file(base / names.WEIGHTS), "model.layers.1.mlp.experts.down_proj"
    if fault == "no blocks":
        del tensors[f"{name}_blocks"]
    elif fault == "no scales":
        del tensors[f"{name}_scales"]
    elif fault == "twice":
        tensors[name] = torch.zeros(2, 2)
    elif fault == "shape":
        tensors[f"{name}_scales"] = tensors[f"{name}_scales"][..., 1:].contiguous()
    elif fault == "no experts":
        for end in ("_blocks", "_scales"):
            tensors[name + end] = tensors[name + end][:0].contiguous()
    elif fault == "nothing in them":
        for end in ("_blocks", "_scales"):
            tensors[name + end] = tensors[name + end][:, :, :0].contiguous()
    elif fault == "dtype":
        tensors[f"{name}_scales"] = tensors[f"{name}_scales"].float()
    elif fault == "no number":
        tensors[f"{name}_blocks"][0, 0, 0] = 0
        tensors[f"{name}_scales"][0, 0, 0] = 255
    elif fault == "too large":
        tensors[f"{name}_scales"][0, 0, 0] = 254
    elif fault == "other bytes":
        tensors["old_weight"] = torch.zeros(3, dtype=torch.uint8)
    else:
        for end in ("_blocks", "_scales"):
            tensors[name + end] = tensors[name + end][1:].contiguous()
    save_file(tensors, base / names.WEIGHTS, {"format": "pt"})
    code = 1 if "finite" in FAULTS[fault] else 2
    said = refused(["convert", str(base), "--to", "hf", "--out_dir", str(tmp_path / "out")], code=code)
    assert FAULTS[fault] in said and (fault == "other bytes" or "layers.1.mlp.experts" in said)
    assert not (tmp_path / "out").exists()


def stack(experts: int) -> Part:
    """The plain tensor of random blocks, (E, 192, 256)."""
    random = np.random.default_rng(0)
    raw = {"w_blocks": random.integers(0, 256, (experts, 256, 6, 16)), "w_scales": random.integers(120, 130, (experts, 256, 6))}
    stored = {name: part_of(codes.astype(np.uint8)) for name, codes in raw.items()}
    return dequantised(stored, {}, "BF16", Path("here"))[0]["w"]


def part_of(codes: np.ndarray) -> Part:
    return Part(dtype="U8", shape=codes.shape, load=lambda: codes)


def test_one_expert_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """A08: a stack of gpt-oss-120b has 4 GB. Caught: the stack written, or compared, as one."""
    part = stack(64)
    write_parts(tmp_path / "warm", {"w": stack(1)})
    tracemalloc.start()
    write_parts(tmp_path / "w", {"w": part})
    written = tracemalloc.get_traced_memory()[1]
    with_names = parts_of({"w": tmp_path / "w"})
    tracemalloc.reset_peak()
    assert not differing(part, with_names["w"])
    compared = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.size > 6e6 and max(written, compared) < part.size / 4


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_another_bit_in_any_expert_is_found(dtype: str, tmp_path: Path) -> None:
    """The proof that a conversion ends with. Caught: the first expert compared alone; every one with the first."""
    part = stack(3)
    for byte in (10, part.size // 2, part.size - 1):
        write_parts(tmp_path / f"{dtype}-{byte}", {"w": cast(part, dtype, "w")})
        found = parts_of({"w": tmp_path / f"{dtype}-{byte}"})["w"]
        assert not differing(part, found)
        codes = found.bytes().copy()
        codes[byte * len(codes) // part.size] ^= 64
        assert differing(part, Part(dtype=dtype, shape=part.shape, load=lambda codes=codes: codes))
