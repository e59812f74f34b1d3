"""GGUF files: what the format's own reader finds in them, and what llama.cpp itself computes with them, where it is installed."""

import contextlib
import io
import json
import re
import resource
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import ADAPTER, make_adapter
from conftest import COMMON, EVERY, random_tokens, shared_data, tiny_config, tiny_gpt, tiny_hf_config
from crashing_disk import in_child
from talkers import byte_tokenizer, make_step, make_talker

from litlora import GPT
from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.weights import raw_tensors
from litlora.convert import convert, open_source
from litlora.convert.gguf_file import beyond_q8_0
from litlora.convert.gguf_model import paired_rows, rope_factors
from litlora.convert.gguf_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, cutter, token_table
from litlora.errors import UserError, WorkError
from litlora.families import linear_shapes
from litlora.methods import from_peft
from litlora.peft import adapter_config_from_peft
from litlora.safetensors_file import write_safetensors
from litlora.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'litlora[gguf]')")

YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}  # the usual betas
SQUARE = {"hidden_size": 48, "head_dim": 12, "intermediate_size": 64}  # where llama.cpp has no heads of another size
CHANGES: dict[str, dict[str, Any]] = {
    "yarn": YARN,
    "qwen2": SQUARE,
    "qwen3": {"attention_bias": False},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "olmo2": SQUARE,
    "phi3": SQUARE,
}
UNKNOWN_THERE = ("olmo3", "cohere", "smollm3", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
REFUSED = {  # as conftest has them
    "yarn": "YaRN", "yarn_mscale": "YaRN", "qwen3": "bias", "dynamic": "dynamic rope", "longrope": "longrope rope",
    "gemma2": "another scale", "gemma3": "another scale", "phi3": "heads of another size", "olmo2": "heads of another size",
    **dict.fromkeys(UNKNOWN_THERE, "cannot be written as GGUF"),
}  # fmt: skip
CONVERTED = (
    "llama", "llama3", "llama_biased", "linear", "yarn", "mistral", "qwen2", "qwen3", "smollm",
    "gemma", "gemma2", "gemma3", "granite", "olmo2", "phi3", "stablelm", "stablelm_2", "stablelm_12b",
)  # fmt: skip
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
LENGTH = 24


def family_changes(family: str) -> dict[str, Any]:
    return {"vocab_size": 288, **CHANGES.get(family, {})}


def tiny_base(path: Path, family: str, **changes: Any) -> Path:
    """A random model of the family with a tokenizer of bytes, as a Hugging Face directory."""
    changes = {**family_changes(family), **changes}
    path.mkdir(parents=True)
    (path / names.CONFIG).write_text(json.dumps(tiny_hf_config(family, **changes)))
    write_safetensors(path / names.WEIGHTS, raw_tensors(tiny_gpt(family, **changes).state_dict()), {"format": "pt"})
    byte_tokenizer(path)
    with_merges(path)
    return path


def with_merges(path: Path) -> None:
    """llama.cpp reads no byte-level vocabulary without a merge."""
    raw = json.loads((path / names.TOKENIZER).read_text())
    raw["model"]["vocab"]["th"] = 259
    raw["model"]["merges"] = [["t", "h"]]
    (path / names.TOKENIZER).write_text(json.dumps(raw))


def to_gguf(source: Path, out: Path, dtype: str = "keep", base: Path | None = None) -> Path:
    report = convert(open_source(source, to="gguf", base_dir=str(base) if base else None), "gguf", out, dtype=dtype)
    return out / report["files"][0]


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors in fp32) by the format's own reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        for tensor in reader.tensors
    }
    return fields, tensors


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONVERTED)
def test_every_tensor_lies_under_its_name_and_the_keys_say_what_the_config_says(family: str, tmp_path: Path) -> None:
    """The format's own reader finds the architecture's keys, and the model's numbers, q and k of `llama` in pairs of rows.

    Caught: gate and up swapped; q and k left in Hugging Face's order.
    """
    base = tiny_base(tmp_path / "base", family)
    config = tiny_config(family, **family_changes(family))
    fields, tensors = read(to_gguf(base, tmp_path / "out"))
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    assert fields["general.architecture"] == arch and fields["general.type"] == "model"
    assert fields[f"{arch}.attention.head_count_kv"] == config.num_key_value_heads
    assert fields[f"{arch}.rope.freq_base"] == pytest.approx(config.rope.rope_theta)
    assert fields[f"{arch}.attention.key_length"] == config.head_dim
    assert fields[f"{arch}.rope.dimension_count"] == config.rope.turned(config.head_dim)
    assert fields.get(f"{arch}.rope.scaling.type") == {"linear": "linear", "yarn": "yarn"}.get(config.rope.rope_type)
    assert ("output.weight" in tensors) is not config.tie_word_embeddings
    weights = {name: tensor.numpy() for name, tensor in tiny_gpt(family, **family_changes(family)).state_dict().items()}
    assert np.array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    for theirs, ours in (
        ("attn_v", "self_attn.v_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        *((("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")) if config.mlp == "fused" else ()),
    ):
        if f"model.layers.2.{ours}.weight" not in weights:
            continue
        assert np.array_equal(tensors[f"blk.2.{theirs}.weight"], weights[f"model.layers.2.{ours}.weight"]), theirs
    D = config.head_dim
    for theirs, ours in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        for kind in ("weight", "bias"):
            if (plain := weights.get(f"model.layers.1.{ours}.{kind}")) is None:
                continue
            found = tensors[f"blk.1.{theirs}.{kind}"]
            for row in range(len(plain)):  # of a head: number j is row 2 j in the first half, 2 (j - D/2) + 1 in the second
                head, j = divmod(row, D)
                place = row if arch not in ("llama", "granite") else head * D + (2 * j if j < D // 2 else 2 * (j - D // 2) + 1)
                assert np.array_equal(found[place], plain[row]), (theirs, kind, row)
    extra = {"rope_freqs.weight"} if config.rope.rope_type == "llama3" else set()
    heads = [name for name in weights if ".norms." in name]
    if heads:
        gains = np.stack([weights[f"model.layers.1.self_attn.k_norm.norms.{head}.weight"] for head in range(2)])
        assert np.array_equal(tensors["blk.1.attn_k_norm.weight"], gains)
    if config.norm_offset:
        assert np.allclose(tensors["output_norm.weight"], 1 + weights["model.norm.weight"])
    assert len(tensors) + len(heads) - 6 * bool(heads) == len(weights) - config.tie_word_embeddings * ("lm_head.weight" in weights) + len(
        extra
    )


def test_turning_neighbours_of_paired_rows_is_turning_halves() -> None:
    """The reason for the order: q.k after llama.cpp's rotation of pairs equals q.k after Hugging Face's rotation of halves."""
    heads, size = 3, 10
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, heads, size))
    for place in (0, 1, 7):
        angles = place / 100.0 ** (np.arange(0, size, 2) / size)
        order = paired_rows(heads, size)
        pairs = [vector.reshape(-1)[order].reshape(heads, size // 2, 2) for vector in (q, k)]
        turned = pairs[0][..., 0] + 1j * pairs[0][..., 1]
        turned = turned * np.exp(1j * angles)
        by_pairs = (turned.real * pairs[1][..., 0] + turned.imag * pairs[1][..., 1]).sum(-1)
        first, second = q[:, : size // 2], q[:, size // 2 :]
        halves = np.concatenate([first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], 1)
        assert np.allclose(by_pairs, (halves * k).sum(-1), atol=1e-12)


def test_llama3s_factors_are_those_by_which_transformers_slows_each_frequency() -> None:
    """rope_freqs.weight against the reference's own frequencies."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = tiny_hf_config("llama3")
    config = tiny_config("llama3")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**values), "cpu")
    plain = 1 / config.rope.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    factors = rope_factors(config.rope, config.head_dim)
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert factors[0] == 1 and factors.max() == pytest.approx(4) and len(set(factors.tolist())) > 2


WORDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}  # the option's: llama.cpp's


@pytest.mark.parametrize("dtype", WORDS)
def test_each_type_keeps_what_it_can_hold(dtype: str, tmp_path: Path) -> None:
    """Norms stay fp32; matrices are rounded once, q8_0 as its definition says, rows that are no whole blocks of 32 as f16.

    Caught: q8_0's numbers rounded down.
    """
    base = tiny_base(tmp_path / "base", "llama", hidden_size=64, head_dim=16, intermediate_size=72)
    path = to_gguf(base, tmp_path / "out", dtype)
    assert path.name == f"model-{WORDS[dtype]}.gguf"
    _, tensors = read(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    weights = {name: tensor.numpy() for name, tensor in tiny_gpt("llama", vocab_size=288, hidden_size=64, head_dim=16).state_dict().items()}
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if dtype == "q8_0" else WORDS[dtype].upper())  # rows of 72
    assert kinds["blk.0.attn_v.weight"] == WORDS[dtype].upper()
    v = weights["model.layers.0.self_attn.v_proj.weight"]
    expected = {
        "f32": v,
        "f16": v.astype(np.float16).astype(np.float32),
        "bf16": torch.from_numpy(v).bfloat16().float().numpy(),
        "q8_0": by_definition(v),
    }
    assert np.array_equal(tensors["blk.0.attn_v.weight"], expected[WORDS[dtype]])


def by_definition(values: np.ndarray) -> np.ndarray:
    """q8_0: 32 numbers share a scale, their largest / 127 as fp16; each is the nearest whole multiple of it, halves away from zero."""
    found = np.empty_like(values).reshape(-1, 32)
    for row, block in enumerate(values.reshape(-1, 32)):
        step = np.float32(np.abs(block).max()) / np.float32(127)
        scaled = block * (np.float32(1) / step)
        whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
        found[row] = whole.astype(np.float32) * np.float32(np.float16(step))
    return found.reshape(values.shape)


def test_a_number_further_off_than_q8_0_rounds_is_found() -> None:
    """The proof's bound: as rounded it passes, half a step more it does not; blocks of zeros are zeros."""
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    values[0, :32] = 0
    rounded = (
        by_definition(values)
        if values[0, :32].any()
        else np.concatenate([values.reshape(-1, 32)[:1], by_definition(values[1:]).reshape(-1, 32)])
    )
    blocks = values.reshape(-1, 32)
    stored = gguf.quants.dequantize(gguf.quants.quantize(blocks, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    assert len(rounded) and not beyond_q8_0(blocks, stored)
    stored[3, 5] += np.abs(blocks[3]).max() / 127
    assert "at 1 of 256" in beyond_q8_0(blocks, stored)


@pytest.mark.parametrize("family", REFUSED)
def test_arithmetic_that_llama_cpp_lacks_is_refused_before_anything_is_written(family: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family, **{key: EVERY[family].get(key, COMMON.get(key)) for key in CHANGES.get(family, {})})
    with pytest.raises(UserError, match=REFUSED[family]):
        to_gguf(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_number_too_large_for_the_type_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """F07, N05: no half file at the final name."""
    base = tiny_base(tmp_path / "base", "llama")
    tensors = tiny_gpt("llama", vocab_size=288).state_dict()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    (base / names.WEIGHTS).unlink()
    write_safetensors(base / names.WEIGHTS, raw_tensors(tensors), {"format": "pt"})
    with pytest.raises(WorkError, match=r"blk\.1\.ffn_up\.weight reaches 1e\+06"):
        to_gguf(base, tmp_path / "out", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    to_gguf(base, tmp_path / "out", "bfloat16")


def test_a_disk_that_becomes_full_between_any_two_bytes_is_said_to_be_full(tmp_path: Path) -> None:
    """F07. Caught: numpy's `tofile`, with which the gguf package writes tensors, drops the last bytes unsaid, and says of others only
    how many were written."""
    base, whole = make_talker(tmp_path / "base"), tmp_path / "whole"
    assert main(["convert", str(base), "--to", "gguf", "--out_dir", str(whole)]) == 0
    size = (whole / names.gguf_name("model", "F32")).stat().st_size
    for limit in (size // 3, size - 1):

        def work(say: Callable[[str], None], limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with contextlib.redirect_stderr(io.StringIO()) as told:
                code = main(["convert", str(base), "--to", "gguf", "--out_dir", str(tmp_path / "out")])
            say(f"{code} {told.getvalue()}")

        said = in_child(work)[1]
        assert re.match(r"1 (?s:.*) may not become that large here.*: [\d,]+ bytes needed, [\d,]+ free", said), said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "whole"]


def test_without_the_package_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="gguf package") as refused:
        to_gguf(make_talker(tmp_path / "base"), tmp_path / "out")
    assert "litlora[gguf]" in refused.value.hint


def test_without_the_package_nothing_is_said_of_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Caught: the lines `source` and `result` first, and only then the refusal."""
    base = make_talker(tmp_path / "base")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main(["convert", str(base), "--to", "gguf", "--out_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: GGUF files need the gguf package") and "litlora[gguf]" in said.err


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_what_is_refused_is_said_to_be_nothing_before(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither said nor written, above the result's place either. Caught: the lines `source` and `result` first."""
    base = make_talker(tmp_path / "base")
    if what == "model":
        (base / names.CONFIG).write_text(json.dumps(json.loads((base / names.CONFIG).read_text()) | {"hidden_act": "gelu"}))
    else:
        base = make_adapter(tmp_path / "adapter", str(base), use_dora=True)
    assert main(["convert", str(base), "--to", "gguf", "--out_dir", str(tmp_path / "new" / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and not (tmp_path / "new").exists()


def test_the_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    path = to_gguf(base, tmp_path / "out")
    fields, _ = read(path)
    report = json.loads((tmp_path / "out" / names.CONVERT_REPORT).read_text())
    assert fields["litlora.source_sha256"] == report["from"]["files"][names.WEIGHTS]["sha256"]
    assert fields["litlora.converted_from"] == "base" and fields["general.name"] == "base"
    assert report["proof"]["tensors"] == report["proof"]["equal"] > 20


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_pieces_has_scores_that_sort_as_its_merges(tmp_path: Path) -> None:
    """SentencePiece's kind: types of every sort, scores from the merges, a space in front."""
    directory = shared_data("models/stories3m-llama")
    table = token_table(directory, 4100)
    raw = json.loads((directory / names.TOKENIZER).read_text())
    merges = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in raw["model"]["merges"]]
    scores = [table.scores[table.tokens.index(made)] for made in dict.fromkeys(merges)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
    assert table.model == "llama" and table.space_prefix and table.adds_bos
    assert table.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and table.types[-4:] == [UNUSED] * 4
    assert table.tokens[3:5] == ["<0x00>", "<0x01>"] and table.types[300] == NORMAL
    assert table.ids["bos"] == 1 and table.ids["eos"] == 2 and table.ids["unk"] == 0


@pytest.mark.parametrize(
    ("tokenizer", "pre"), [("llama-3", "llama-bpe"), ("qwen2.5", "qwen2"), ("smollm", "smollm"), ("gpt2", "gpt-2"), ("minimind", "gpt-2")]
)
def test_real_tokenizers_are_known_by_llama_cpps_word_for_them(tokenizer: str, pre: str) -> None:
    table = token_table(shared_data(f"tokenizers/{tokenizer}"), 160_000)
    assert (table.model, table.pre) == ("gpt2", pre)
    assert len(table.merges) > 5000 and all(merge.count(" ") == 1 for merge in table.merges)
    assert len(table.tokens) == len(table.types) == 160_000
    if tokenizer == "llama-3":
        assert table.types[128_000] == CONTROL and table.tokens[128_000] == "<|begin_of_text|>"
    if tokenizer == "qwen2.5":
        assert table.types[table.tokens.index("<|im_end|>")] == CONTROL and not table.adds_bos


def test_a_tokenizer_model_alone_gives_the_table_of_its_tokenizer_json(tmp_path: Path) -> None:
    """A directory without tokenizer.json: the same pieces, kinds and named ids out of tokenizer.model."""
    directory = shared_data("tokenizers/tinyllama-chat")
    for name in ("tokenizer.model", names.TOKENIZER_CONFIG):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    found, expected = token_table(tmp_path, 32_000), token_table(directory, 32_000)
    assert (found.tokens, found.types, found.ids, found.space_prefix) == (
        expected.tokens,
        expected.types,
        expected.ids,
        expected.space_prefix,
    )
    assert found.model == "llama" and found.scores[300] < found.scores[299]


def test_a_rule_that_llama_cpp_does_not_know_is_refused() -> None:
    raw = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+|."}, "behavior": "Isolated", "invert": False}}
    with pytest.raises(UserError, match="cuts texts by a rule"):
        cutter(raw, Path("tokenizer.json"))


def test_a_chat_template_and_added_words_travel(tmp_path: Path) -> None:
    base = make_talker(tmp_path / "base")
    raw = json.loads((base / names.TOKENIZER).read_text())
    raw["added_tokens"].append(
        {"id": 259, "content": "▁▁", "special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    )
    (base / names.TOKENIZER).write_text(json.dumps(raw))
    table = token_table(base, 288)
    assert table.chat_template == Tokenizer(base).chat_template
    assert (table.tokens[259], table.types[259]) == ("  ", USER_DEFINED)
    assert table.types[256:259] == [CONTROL] * 3 and table.ids["bos"] == 256
    with pytest.raises(UserError, match="260 tokens, and the model 200 rows"):
        token_table(base, 200)


# ---- adapters --------------------------------------------------------------------------------------------------------


def products(path: Path, alpha: float) -> dict[str, np.ndarray]:
    """Weight's name -> what llama.cpp adds to it: alpha / R times B A."""
    _, tensors = read(path)
    pairs = {
        name.removesuffix(".lora_a"): (tensors[name], tensors[name.replace("lora_a", "lora_b")]) for name in tensors if name.endswith("a")
    }
    return {name: alpha / len(a) * (b.astype(np.float64) @ a) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.0.self_attn.q_proj": 11}},
        {"layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "layers"],
)
def test_what_llama_cpp_adds_to_a_weight_is_what_the_merge_adds(changes: dict[str, Any], tmp_path: Path) -> None:
    """alpha / R has one alpha for all: other scales are in B. q's and k's rows are in llama.cpp's order.

    Caught: B's rows in Hugging Face's order; rsLoRA's scale left out.
    """
    base = make_talker(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base), **{"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], **changes})
    path = to_gguf(adapter, tmp_path / "out")
    fields, _ = read(path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    added = products(path, fields["adapter.lora.alpha"])
    assert main(["merge_lora", str(adapter), "--out_dir", str(tmp_path / "merged")]) == 0
    _, before = read(to_gguf(base, tmp_path / "base-gguf"))
    _, after = read(to_gguf(tmp_path / "merged", tmp_path / "merged-gguf"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert added.keys() == changed and changed
    for name, update in added.items():
        assert np.allclose(before[name] + update, after[name], atol=2e-5), name


def test_what_an_adapters_file_cannot_say_is_refused(tmp_path: Path) -> None:
    base = make_talker(tmp_path / "base")
    for number, (changes, why) in enumerate((({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "lm_head"))):
        adapter = make_adapter(tmp_path / f"adapter-{number}", str(base), **changes)
        with pytest.raises(UserError, match=why) as refused:
            to_gguf(adapter, tmp_path / "out")
        assert "merge_lora" in refused.value.hint
    assert not (tmp_path / "out").exists()


def test_a_step_becomes_an_adapters_file_with_its_bases_architecture(tmp_path: Path) -> None:
    base = make_talker(tmp_path / "base")
    step = make_step(tmp_path / "run", 5, base)
    fields, tensors = read(to_gguf(step, tmp_path / "out", "float16"))
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == ADAPTER["lora_alpha"]
    assert len(tensors) == 2 * 2 * 3 and {name.rpartition(".")[2] for name in tensors} == {"lora_a", "lora_b"}


def test_an_alpha_of_zero_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(make_talker(tmp_path / "base")), lora_alpha=0)
    with pytest.raises(UserError, match="lora_alpha is 0"):
        to_gguf(adapter, tmp_path / "out")


# ---- llama.cpp itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: build it to compare with llama.cpp itself")


def opened(llama_cpp: Any, path: Path, lora: Path | None = None, **more: Any) -> Any:
    """The model in llama.cpp, keys and values in fp32 (GGML's type 0; fp16 by default), what YaRN needs taken from the file."""
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False}
    options |= dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
    return llama_cpp.Llama(model_path=str(path), lora_path=str(lora) if lora else None, verbose=False, **{**options, **more})


def their_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    model.reset()
    model.eval(list(ids))
    return np.array(model.scores[: len(ids)])


def greedy(step: Any, ids: Sequence[int], count: int) -> list[int]:
    """`step` gives the logits of the last position for ids."""
    found = list(ids)
    for _ in range(count):
        found.append(int(np.argmax(step(found))))
    return found[len(ids) :]


def compare(llama_cpp: Any, ours: Path, file: Path, lora: Path | None, ids: Sequence[int], bound: float, count: int = 0) -> None:
    """Logits within `bound` times the largest, and as many greedy tokens equal as are asked for."""
    model, theirs = GPT.from_pretrained(ours).eval(), opened(llama_cpp, file, lora)
    with torch.no_grad():
        expected = model(torch.tensor([list(ids)]))[0].float().numpy()
        found = their_logits(theirs, ids)
        assert np.abs(found - expected).max() <= bound * max(1.0, float(np.abs(expected).max()))
        said = greedy(lambda all_ids: model(torch.tensor([all_ids]))[0, -1].float().numpy(), ids, count)
        assert said == greedy(lambda all_ids: their_logits(theirs, all_ids)[-1], ids, count)


@pytest.mark.parametrize("family", CONVERTED)
def test_llama_cpp_computes_the_same_logits_for_every_family(family: str, llama_cpp: Any, tmp_path: Path) -> None:
    """Random models, every tensor random, up to the window of those that slide. Caught: each of the mutations above."""
    base = tiny_base(tmp_path / "base", family)
    config = tiny_config(family, **family_changes(family))
    window = LENGTH if config.model_type.startswith("gemma") else config.sliding_window or LENGTH  # of the others it knows no window
    ids = random_tokens(1, min(window, LENGTH), vocab_size=256)[0].tolist()
    bound = 1e-3 if config.hidden_act.startswith("gelu") else 2e-4  # llama.cpp looks gelu up in a table of fp16
    compare(llama_cpp, base, to_gguf(base, tmp_path / "out"), None, ids, bound)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_have_another_scale_of_scores(family: str, layers: int, llama_cpp: Any, tmp_path: Path) -> None:
    """27B: hidden_size / heads stands for the size of a head, and llama.cpp knows it by its depth. Caught: head_dim there as well."""
    sizes = {
        "num_hidden_layers": layers,
        "query_pre_attn_scalar": 10,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }
    base = tiny_base(tmp_path / "base", family, **sizes)
    compare(llama_cpp, base, to_gguf(base, tmp_path / "out"), None, random_tokens(1, LENGTH, vocab_size=256)[0].tolist(), 1e-2)
    with pytest.raises(UserError, match="another scale"):
        to_gguf(tiny_base(tmp_path / "other", family, **sizes | {"query_pre_attn_scalar": 12}), tmp_path / "none")


@pytest.mark.parametrize("family", ["granite", "phi3", "gemma3", "olmo2", "stablelm"])
def test_llama_cpp_adds_an_adapter_to_a_base_of_another_family(family: str, llama_cpp: Any, tmp_path: Path) -> None:
    """Fused matrices, and rows of q and k in pairs or not. Caught: B's rows in the order of Hugging Face for granite."""
    base, adapter = tiny_base(tmp_path / "base", family), tmp_path / "adapter"
    config = GPT.from_pretrained(base).config
    targets = sorted({name.rpartition(".")[2] for name in linear_shapes(config)} - {"lm_head"})
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "base_model_name_or_path": str(base)}
    shapes = from_peft(adapter_config_from_peft(values, names.ADAPTER_CONFIG), config).file_shapes(config)
    random = np.random.default_rng(0)
    adapter.mkdir()
    (adapter / names.ADAPTER_CONFIG).write_text(json.dumps(values))
    tensors = {name: ("F32", shape, (0.1 * random.normal(size=shape)).astype(np.float32)) for name, shape in shapes.items()}
    write_safetensors(adapter / names.ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    ids = random_tokens(1, 7, vocab_size=256)[0].tolist()
    bound = 1e-3 if config.hidden_act.startswith("gelu") else 2e-4
    compare(llama_cpp, adapter, to_gguf(base, tmp_path / "out"), to_gguf(adapter, tmp_path / "lora"), ids, bound)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, step) of a real pretrained Llama and real rows."""
    base, rows = shared_data("models/stories3m-llama"), shared_data("instruct/alpaca_en_demo.json")
    run = tmp_path_factory.mktemp("gguf") / "out"
    words = f"finetune lora {base} --data {rows} --out_dir {run} --train.max_steps 3 --train.max_seq_length 64 --lora.use_rslora true"
    words += " --train.global_batch_size 4 --train.lr 1e-2 --train.lr_warmup_steps 0 --eval.max_samples 2 --threads 1"
    words += " --lora.rank_pattern down_proj=4"
    assert main(words.split()) == 0
    return base, run / "step-3"


STORY = [1, 403, 407, 261, 378]  # "Once upon a time"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_says_the_same_words_with_base_adapter_and_merged_model(
    dtype: str, llama_cpp: Any, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Greedy tokens from the same prompt ids: the base, the base with the adapter's file, and the merged model."""
    base, step = trained
    bound, place = {"float32": (1e-4, "base"), "float16": (3e-3, "base")}[dtype]
    file = to_gguf(base, tmp_path / place, dtype)
    compare(llama_cpp, base, file, None, STORY, bound, 30)
    compare(llama_cpp, step, file, to_gguf(step, tmp_path / "lora", dtype), STORY, bound, 30)
    assert main(["merge_lora", str(step), "--out_dir", str(tmp_path / "merged")]) == 0
    compare(llama_cpp, tmp_path / "merged", to_gguf(tmp_path / "merged", tmp_path / "merged-gguf", dtype), None, STORY, bound, 30)


TEXTS = (
    "Once upon a time there was a small house.",
    "  two spaces,\ta tab\nand a line\n\n\nwith  gaps ",
    "ünïcödé 你好，世界 🙂🇫🇷 e\u0301 \u200bend",
    "def f(x):\n    return x**2 + 3.14159 - 12345678",
    "I'll don't WE'RE it's o'clock's 100% #tag @me",
    "<s> and </s> are text here",
)


def vocabulary_only(directory: Path, path: Path, config: Mapping[str, Any]) -> Path:
    """A model of almost nothing with a real vocabulary."""
    path.mkdir()
    for name in names.TOKENIZER_FILES:
        if (directory / name).exists():
            (path / name).write_bytes((directory / name).read_bytes())
    changes = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "head_dim": 16,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    (path / names.CONFIG).write_text(json.dumps(tiny_hf_config("llama", **{**changes, **config, "num_key_value_heads": 2})))
    model = GPT(tiny_config("llama", **{**changes, **config, "num_key_value_heads": 2}))
    write_safetensors(path / names.WEIGHTS, raw_tensors(model.state_dict()), {"format": "pt"})
    return path


@pytest.mark.parametrize(
    "tokenizer",
    [
        "models/stories3m-llama",
        "tokenizers/tinyllama-chat",
        "tokenizers/llama-3",
        "tokenizers/qwen2.5",
        "tokenizers/smollm",
        "tokenizers/mistral-v0.3",
    ],
)
def test_llama_cpp_makes_the_same_ids_of_texts(tokenizer: str, llama_cpp: Any, tmp_path: Path) -> None:
    """Both kinds of tokenizer, on texts of many kinds; the id that begins a text where there is one."""
    directory = shared_data(tokenizer)
    ours = Tokenizer(directory)
    base = vocabulary_only(directory, tmp_path / "base", {"vocab_size": ours.size})
    theirs = opened(llama_cpp, to_gguf(base, tmp_path / "out", "float16"), vocab_only=True, logits_all=False)
    for text in TEXTS:
        if tokenizer.endswith("qwen2.5"):
            text = unicodedata.normalize("NFC", text)  # what Qwen's tokenizer does first, and llama.cpp leaves to the user
        if tokenizer.endswith("mistral-v0.3"):
            text = text.lstrip()  # before a space Mistral's puts no other, and llama.cpp does: convert warns of it
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, special=False), text
    begin = [ours.bos_id] if ours.adds_bos else []
    assert theirs.tokenize(b"hi", add_bos=True, special=False) == begin + ours.encode("hi", special=False)
