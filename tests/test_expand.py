"""`litlora expand`: a deeper model that computes what its base does, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_samples as samples
import numpy as np
import pytest
import torch
from conftest import EXPERTS, FAMILIES, ROOT, random_tokens, tiny_hf_config
from safetensors.torch import load_file, save_file
from test_merge import as_dtype, make_base, read, tree_hash

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import tensor_digests
from litlora.checkpoint.manifest import seal
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.shards import find_shards
from litlora.checkpoint.weights import load_model
from litlora.commands.expand import expand
from litlora.errors import UserError, WorkError
from litlora.families import config_from_hf
from litlora.merge.expand import prepare_expansion
from litlora.methods import METHODS
from litlora.options import Expand, ProOptions
from litlora.safetensors_file import SafetensorsFile

WRITES_LAST = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")


def base_of(path: Path, family: str, dtype: str = "F32", **more: Any) -> Path:
    return make_base(path, dtype, **{**tiny_hf_config(family), **more})


def expanded(base: Path, out_dir: Path, **options: Any) -> Path:
    expand(Expand(checkpoint_dir=str(base), out_dir=str(out_dir), **options))
    return out_dir


def line_of(count: int, new: list[int]) -> list[tuple[int, bool]]:
    """Of each layer of the deeper model: which of the base's it is, or copies, and whether it is a copy."""
    line: list[tuple[int, bool]] = []
    for layer in range(count):
        line.append((layer - sum(earlier < layer for earlier in new), False) if layer not in new else (line[-1][0], True))
    return line


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deeper_model_computes_the_same_to_the_last_bit(tmp_path: Path, family: str, dtype: str) -> None:
    """N07: in litlora, and in transformers. (Mutations seen to fail: the biases of the last projections copied; the layer types not.)"""
    transformers = pytest.importorskip("transformers")
    base = base_of(tmp_path / "base", family, dtype, torch_dtype={"F32": "float32", "BF16": "bfloat16"}[dtype])
    out = expanded(base, tmp_path / "deep", positions=["0", "2"])
    tokens = random_tokens(2, 20)
    ours, theirs = [], []
    for place in (base, out):
        plain = {"attn_implementation": "eager"} | ({"experts_implementation": "eager"} if family in EXPERTS else {})
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto", **plain).eval()
        assert str(model.dtype).removeprefix("torch.") == json.loads((base / names.CONFIG).read_text())["torch_dtype"]
        with torch.inference_mode():
            ours.append(load_model(resolve(place))(tokens))
            theirs.append(model(tokens).logits)
    assert torch.equal(*ours)
    assert torch.equal(*theirs)
    assert ours[0].float().std() > 0.01


@pytest.mark.parametrize(("options", "new"), [({}, [3]), ({"n_insert": 2}, [1, 4]), ({"positions": ["0-1"]}, [1, 3])])
@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "smollm"])
def test_new_blocks_are_silent_copies_and_the_rest_is_the_base(
    tmp_path: Path, family: str, options: dict[str, Any], new: list[int]
) -> None:
    """N07: byte for byte, in a base of several files too. (Mutation: a copy of the layer after it.)"""
    base = base_of(tmp_path / "base", family, "BF16", shards=3)
    out = expanded(base, tmp_path / "deep", **options)
    before, after = read(base), read(out)
    line = line_of(3 + len(new), new)
    seen = set()
    for name, (dtype, values, raw) in after.items():
        parts = name.split(".")
        layer, is_new = line[int(parts[2])] if parts[1] == "layers" else (0, False)
        origin = ".".join([*parts[:2], str(layer), *parts[3:]]) if parts[1] == "layers" else name
        seen.add(origin)
        assert dtype == "BF16"
        assert values.shape == before[origin][1].shape
        assert raw == (bytes(len(raw)) if is_new and name.endswith(WRITES_LAST) else before[origin][2]), name
    assert seen == before.keys()
    config = config_from_hf(json.loads((out / names.CONFIG).read_text()), "config")
    assert (config.num_hidden_layers, config.llama_pro_layers) == (3 + len(new), tuple(new))
    of_base = config_from_hf(json.loads((base / names.CONFIG).read_text()), "config")
    assert [config.window(i) for i in range(config.num_hidden_layers)] == [of_base.window(layer) for layer, _ in line]
    index = json.loads((out / names.WEIGHTS_INDEX).read_text())
    assert index["weight_map"] == {name: path.name for path in out.glob("*.safetensors") for name in SafetensorsFile(path).tensors}
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in after.values())


def test_fine_tuning_pro_trains_exactly_the_new_layers(tmp_path: Path) -> None:
    """DESIGN 5: config.json names them."""
    base = base_of(tmp_path / "base", "llama_biased")
    out = expanded(base, tmp_path / "deep", n_insert=2)
    tuning = METHODS["pro"].tuning(ProOptions(), resolve(out).config())
    assert not tuning.inserted
    assert set(tuning.whole) == {name for name in read(out) if name.startswith(("model.layers.1.", "model.layers.4."))}


def test_a_deeper_model_can_be_made_deeper(tmp_path: Path) -> None:
    """N07: what this expansion inserted is recorded, and what an earlier one did is a layer like any other; the same bytes each time."""
    base = base_of(tmp_path / "base", "qwen2")
    first = expanded(base, tmp_path / "one", positions=["1"])
    second = expanded(first, tmp_path / "two", positions=["0", "2"])
    assert json.loads((second / names.CONFIG).read_text())["llama_pro_layers"] == [1, 4]
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        assert torch.equal(load_model(resolve(base))(tokens), load_model(resolve(second))(tokens))
    assert tree_hash(second) == tree_hash(expanded(first, tmp_path / "three", positions=["0", "2"]))


def test_the_deeper_model_is_a_whole_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A07: every small file of the base, byte for byte; the card and the terminal say what is new, and what to type."""
    base = base_of(tmp_path / "base", "llama", our_own_key="kept")
    small = {
        names.TOKENIZER: "{}",
        names.TOKENIZER_CONFIG: '{"chat_template":   "old"}',
        names.CHAT_TEMPLATE: "new",
        names.GENERATION_CONFIG: '{"eos_token_id": [2, 4]}',
        "LICENSE": "Do what you like.",
    }
    for name, text in {**small, names.README: "---\nlicense: apache-2.0\n---\n", "modeling_evil.py": "raise SystemExit"}.items():
        (base / name).write_text(text)
    untouched = tree_hash(base)
    out = expanded(base, tmp_path / "here" / "deep", n_insert=2)
    told = capsys.readouterr()
    assert told.out == f"{out}\n"
    for words in (
        "3 layers",
        "5 layers",
        "layers 1, 4 (from 0)",
        "read again from the disk: 48 tensors",
        f"litlora finetune pro {out} --data FILE",
    ):
        assert words in told.err, told.err
    assert {path.name for path in out.iterdir()} == {*small, names.CONFIG, names.WEIGHTS, names.README, names.EXPAND_REPORT}
    assert {name: (out / name).read_text() for name in small} == small
    assert json.loads((out / names.CONFIG).read_text())["our_own_key"] == "kept"
    card = (out / names.README).read_text()
    for words in (
        "license: apache-2.0",
        "5 layers instead of 3",
        "counted from 0: 1, 4.",
        resolve(base).fingerprint(),
        "litlora finetune pro .",
    ):
        assert words in card, card
    assert tree_hash(base) == untouched


def test_the_demo_base_is_what_is_expanded_where_none_is_named(tmp_path: Path) -> None:
    """Every default works offline."""
    expand(Expand(out_dir=str(tmp_path / "deep")))
    before, after = (json.loads((place / names.CONFIG).read_text())["num_hidden_layers"] for place in (names.DEMO_BASE, tmp_path / "deep"))
    assert after == before + -(-before // 4)


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_their_prefix_become_whole(tmp_path: Path, tied: bool) -> None:
    """A07: with a head of its own beside them, a reader that puts `model.` before every name would lose it."""
    transformers = pytest.importorskip("transformers")
    values = tiny_hf_config("llama", tie_word_embeddings=tied)
    tensors = as_dtype(samples.base_tensors(**values), "F32", 0.3)
    base = samples.make_base(tmp_path / "base", tensors={name.removeprefix("model."): one for name, one in tensors.items()}, **values)
    out = expanded(base, tmp_path / "deep", positions=["0"])
    assert all(name.startswith(("model.", "lm_head.")) for name in read(out))
    _, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.inference_mode():
        assert torch.equal(load_model(resolve(out))(random_tokens(1, 9)), load_model(resolve(base))(random_tokens(1, 9)))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_expanded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """A05, F08."""
    base = base_of(tmp_path / "base", "llama")
    step = samples.add_step(tmp_path / "run", 100, samples.make_base(tmp_path / "other"))
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(base)
    out = str(tmp_path / "deep")
    before = sorted(tmp_path.rglob("*"))
    for options, told in (
        (Expand(checkpoint_dir=str(base)), "no directory is given"),
        (Expand(checkpoint_dir=str(step), out_dir=out), f"litlora merge_lora {step}"),
        (Expand(checkpoint_dir=str(tmp_path / "run"), out_dir=out), "only whole models"),
        (Expand(checkpoint_dir=str(base), out_dir=str(tmp_path / "there")), "exists already"),
        (Expand(checkpoint_dir=str(base), out_dir=str(base)), "exists already"),
        (Expand(checkpoint_dir=str(base), out_dir=str(base / "deep")), "no command writes into a base"),
        (Expand(checkpoint_dir=str(base), out_dir=str(tmp_path / "link" / "deep")), "no command writes into a base"),
        (Expand(checkpoint_dir=str(base), out_dir=str(base / names.CONFIG / "deep")), "no command writes into a base"),
        (Expand(checkpoint_dir=str(base), out_dir=str(step / names.README / "deep")), "is no directory"),
        (Expand(checkpoint_dir=str(base), out_dir=out, n_insert=4), "4 new blocks do not go between 3"),
        (Expand(checkpoint_dir=str(base), out_dir=out, positions=["3"]), "the model has layers 0 to 2"),
        (Expand(checkpoint_dir=str(base), out_dir=out, n_insert=1, positions=["1"]), "cannot both be given"),
    ):
        with pytest.raises(UserError) as caught:
            expand(options)
        assert told in caught.value.report()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F07."""
    base = base_of(tmp_path / "base", "llama")
    monkeypatch.setattr("litlora.checkpoint.commit.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="disk is full"):
        prepare_expansion(resolve(base), tmp_path / "deep")


def test_a_torn_base_is_named(tmp_path: Path) -> None:
    """F13."""
    base = base_of(tmp_path / "base", "llama")
    (base / names.WEIGHTS).write_bytes((base / names.WEIGHTS).read_bytes()[:-10])
    with pytest.raises(UserError, match=names.WEIGHTS):
        prepare_expansion(resolve(base), tmp_path / "deep")


def test_what_did_not_reach_the_disk_never_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 2: read again after it was written. (Mutation: the hashes that were made while writing are believed.)"""
    base = base_of(tmp_path / "base", "llama")
    from litlora.merge import tensors

    write = tensors.write_at

    def faulty(sink: int, data: Any, start: int) -> None:
        raw = bytearray(data)
        if len(raw) == 72 * 40 * 4 and not any(raw):  # a new down_proj
            raw[5] = 1
        write(sink, raw, start)

    monkeypatch.setattr(tensors, "write_at", faulty)
    with pytest.raises(WorkError, match=r"not what was written:\n  model\.layers\.1\.mlp\.down_proj\.weight"):
        expanded(base, tmp_path / "place" / "deep", positions=["0"])
    assert os.listdir(tmp_path / "place") == []


def test_the_command_expands_without_torch(tmp_path: Path) -> None:
    """DESIGN 2."""
    base = base_of(tmp_path / "base", "llama", "BF16")
    code = """
import sys
from litlora.__main__ import main
assert main(["expand", sys.argv[1], "--out_dir", sys.argv[2], "--n_insert", "1"]) == 0
heavy = [name for name in ("torch", "lightning_fabric", "transformers", "tokenizers") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, str(base), str(tmp_path / "deep")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read(tmp_path / "deep")["lm_head.weight"][1], read(base)["lm_head.weight"][1])


# ---- verify ----------------------------------------------------------------------------------------------------------


def verified(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    capsys.readouterr()
    code = main(["verify", str(path), "--json"])
    return code, {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def change_one_number(path: Path, name: str) -> None:
    tensors = load_file(path / names.WEIGHTS)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path / names.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama_biased", "gemma2", "olmo2"])
def test_verify_proves_that_a_deeper_model_is_still_its_base(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """N07: silent blocks, the base's own bytes, equal logits. Where its base is gone or another one now, it says so and does not fail."""
    base = base_of(tmp_path / "base", family)
    out = expanded(base, tmp_path / "deep", positions=["0", "2"])
    code, found = verified(out, capsys)
    assert code == 0 and len(found) == 5 and not any(finding["faults"] or finding["warnings"] for finding in found.values())
    assert found["its 2 inserted layers"]["figures"] == {"inserted": [1, 4], "trained": []}
    assert f"all but its new layers is its base's, byte for byte, and those are silent copies: {base}" in found
    assert "logits equal to its base's, to the last bit" in found
    change_one_number(base, "model.norm.weight")
    code, found = verified(out, capsys)
    assert code == 0 and found["it was not compared with its base"]["warnings"] == [f"{base} holds other weights than it did"]
    base.rename(tmp_path / "moved")
    code, found = verified(out, capsys)
    assert code == 0 and "no such directory" in found["it was not compared with its base"]["warnings"][0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "is not silent: it holds other numbers than 0"),
        ("model.layers.4.mlp.down_proj.bias", "is not silent: it holds other numbers than 0"),
        ("model.layers.1.mlp.up_proj.weight", "is not the base's model.layers.0.mlp.up_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", "is not the base's model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_verify_names_what_was_altered_in_a_deeper_model(tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where whoever altered it wrote the report anew. Against: a copy of another block; biases that were forgotten."""
    out = expanded(base_of(tmp_path / "base", "llama_biased"), tmp_path / "deep", positions=["0", "2"])
    change_one_number(out, name)
    values = json.loads((out / names.EXPAND_REPORT).read_text())
    values = {key: value for key, value in values.items() if key != "sha256"}
    (out / names.EXPAND_REPORT).write_bytes(seal({**values, "weights": tensor_digests(find_shards(out), use_cache=False)}))
    code, found = verified(out, capsys)
    assert code == 1 and found["every tensor and file against its report"]["faults"] == []
    faults = {what: finding["faults"] for what, finding in found.items() if finding["faults"]}
    (compared,) = (lines for what, lines in faults.items() if "byte for byte" in what)
    assert compared == [f"{name} {said}"]
    hidden = name == "model.layers.1.mlp.up_proj.weight"  # behind a projection that is zero
    assert ("logits equal to its base's, to the last bit" in faults) is not hidden
    layer = int(name.split(".")[2])
    assert found["its 2 inserted layers"]["figures"]["trained"] == ([layer] if "silent" in said else [])


def test_verify_says_which_inserted_layers_were_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with inserted blocks and no report of expand: what a run made of it. That they have learnt is no fault."""
    out = expanded(base_of(tmp_path / "base", "gemma2"), tmp_path / "deep", positions=["0", "2"])
    (out / names.EXPAND_REPORT).unlink()
    code, found = verified(out, capsys)
    assert code == 0 and found["its 2 inserted layers"]["figures"]["trained"] == []
    change_one_number(out, "model.layers.4.post_feedforward_layernorm.weight")
    change_one_number(out, "model.layers.1.self_attn.q_proj.weight")  # it cannot be heard behind a gain of zero
    code, found = verified(out, capsys)
    assert code == 0 and found["its 2 inserted layers"]["figures"] == {"inserted": [1, 4], "trained": [4]}
    main(["verify", str(out)])
    assert "layers 4 were trained: it computes something else than it did without them" in capsys.readouterr().out
