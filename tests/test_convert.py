"""Conversions: pickled weights and LitGPT's layout in, PEFT's and Hugging Face's out; nothing lost, nothing run, nothing overwritten."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoint_samples import ADAPTER, CONFIG, adapter_tensors, add_step, base_tensors, copy, make_adapter, make_base
from conftest import ROOT, random_tokens, shared_data, tiny_config, tiny_gpt, tiny_hf_config
from talkers import byte_tokenizer, make_step, make_talker

from litlora import GPT
from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.commit import commit_step
from litlora.checkpoint.manifest import read_manifest
from litlora.checkpoint.reading import sha256
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import mapped, raw_tensors
from litlora.convert import Adapter, convert, open_source
from litlora.convert.litgpt import Heads, ungrouped
from litlora.convert.pickles import read_pickled
from litlora.convert.sources import plain_peft_name
from litlora.errors import UserError, WorkError
from litlora.methods import stored_tuning
from litlora.options import LoRAOptions
from litlora.safetensors_file import write_safetensors

# ---- helpers ---------------------------------------------------------------------------------------------------------


def converted(source: Path, to: str, out: Path, base: Path | None = None, **more: Any) -> dict[str, Any]:
    return convert(open_source(source, to=to, base_dir=str(base) if base else None), to, out, **more)


def tensors_of(directory: Path, name: str = names.WEIGHTS) -> dict[str, torch.Tensor]:
    return mapped(dict.fromkeys(file_names(directory / name), directory / name))


def file_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def tiny_base(path: Path, family: str, **changes: Any) -> Path:
    """A random model of the family as a Hugging Face directory with a tokenizer of bytes."""
    changes = {"vocab_size": 288, **changes}
    path.mkdir(parents=True)
    (path / names.CONFIG).write_text(json.dumps(tiny_hf_config(family, **changes)))
    write_safetensors(path / names.WEIGHTS, raw_tensors(tiny_gpt(family, **changes).state_dict()), {"format": "pt"})
    return byte_tokenizer(path)


def pickled_base(path: Path, *, shards: int = 1, old: bool = False, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same tensors as `make_base` gives, in pickled files; and those tensors."""
    make_base(path, **changes)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(path).items()}
    (path / names.WEIGHTS).unlink()
    if shards == 1:
        torch.save(tensors, path / names.PICKLED_WEIGHTS, _use_new_zipfile_serialization=not old)
        return path, tensors
    homes = {name: f"pytorch_model-{number % shards + 1:05}-of-{shards:05}.bin" for number, name in enumerate(tensors)}
    for file in set(homes.values()):
        torch.save({name: tensors[name] for name in tensors if homes[name] == file}, path / file)
    (path / names.PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return path, tensors


# ---- pickled weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "old"), [(1, False), (1, True), (3, False)], ids=["one file", "written before 1.6", "three files"])
def test_pickled_weights_become_safetensors_tensor_for_tensor(shards: int, old: bool, tmp_path: Path) -> None:
    """M02: same names, equal tensors, config.json to the byte; transformers loads it."""
    from transformers import AutoModelForCausalLM

    base, tensors = pickled_base(tmp_path / "base", shards=shards, old=old)
    report = converted(base, "hf", tmp_path / "out")
    assert same(tensors_of(tmp_path / "out"), tensors)
    assert (tmp_path / "out" / names.CONFIG).read_bytes() == (base / names.CONFIG).read_bytes()
    assert report["proof"] == {"tensors": 21, "equal": 21, "rounded_once": 0, "dtypes": {"F32": 21}}
    files = [path.name for path in base.glob("*.bin")]
    assert report["from"]["files"] == {name: {"size": (base / name).stat().st_size, "sha256": sha256(base / name)} for name in files}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    """Rotary frequencies, and a shared head that is there twice; names without `model.` get it."""
    base, tensors = pickled_base(tmp_path / "base", tie_word_embeddings=True)
    held = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    held |= {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5), "lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(held, base / names.PICKLED_WEIGHTS)
    report = converted(base, "hf", tmp_path / "out")
    assert same(tensors_of(tmp_path / "out"), tensors)
    assert report["dropped"].keys() == {"layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"}
    assert "rotary" in report["dropped"]["layers.0.self_attn.rotary_emb.inv_freq"] and "tie_word" in report["dropped"]["lm_head.weight"]
    assert report["renamed"]["model.norm.weight"] == "norm.weight"
    torch.save(held | {"lm_head.weight": torch.zeros(61, 24)}, base / names.PICKLED_WEIGHTS)
    with pytest.raises(UserError, match=r"differs from model\.embed_tokens\.weight"):
        converted(base, "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda held: held.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda held: held.update({"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (lambda held: held.update({"model.norm.weight": torch.ones(3)}), "wrong shape: model.norm.weight"),
        (lambda held: held.update({"model.norm.weight": "text"}), "no tensor but str"),
        (lambda held: held.update({"model.norm.weight": torch.ones(24).to_sparse()}), "not supported"),
        (lambda held: held.update({"model.norm.weight": torch.ones(1).expand(24)}), "larger than what is stored"),
        (lambda held: held.update({7: torch.ones(1)}), "no name of a tensor"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_and_nothing_is_written(change: Any, why: str, tmp_path: Path) -> None:
    """A01, for pickled bases."""
    base, tensors = pickled_base(tmp_path / "base")
    held: dict[Any, Any] = dict(tensors)
    change(held)
    torch.save(held, base / names.PICKLED_WEIGHTS)
    with pytest.raises(UserError, match=why):
        converted(base, "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    """S04."""
    base, _ = pickled_base(tmp_path / "base", shards=2)
    torch.save({}, tmp_path / "x.bin")
    index = json.loads((base / names.PICKLED_INDEX).read_text())
    for name in ("../x.bin", "/etc/passwd", "a/b.bin", "model.safetensors", 3):
        index["weight_map"]["model.norm.weight"] = name
        (base / names.PICKLED_INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError):
            converted(base, "hf", tmp_path / "out")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


WATCHED = """
import os, sys
from pathlib import Path

import torch, yaml
from litlora.__main__ import main

seen = []
def watch(event, arguments):
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"):
        seen.append((event, arguments))
sys.addaudithook(watch)
for words in eval(sys.argv[1]):
    code = main(words)
    assert code == 2, (words, code)
assert not seen, seen
assert not Path("PWNED").exists()
print("all refused")
"""


def test_a_pickle_that_would_run_code_is_refused_under_every_name_that_is_read(tmp_path: Path) -> None:
    """YARDSTICK S01: os.system in __reduce__, as a bare pickle, in torch's zip, in a state_dict's place and beside tensors; an audit
    hook sees no call. Caught: weights_only=False.
    """
    talker = make_talker(tmp_path / "talker")
    commands = []
    zipped, nested = tmp_path / "zipped", tmp_path / "nested"
    torch.save(Evil(), zipped)
    torch.save({"model": {"a": torch.ones(2), "b": Evil()}}, nested)
    raw = [
        pickle.dumps(Evil()),
        pickle.dumps({"a": Evil()}),
        zipped.read_bytes(),
        nested.read_bytes(),
        b"PK\x03\x04 broken",
        b"",
        os.urandom(99),
    ]
    for number, data in enumerate(raw):
        for file, to in (
            (names.PICKLED_WEIGHTS, "hf"),
            (names.LITGPT_WEIGHTS, "hf"),
            (names.LITGPT_LORA, "peft"),
            *((name, "peft") for name in names.PICKLED_ADAPTERS),
        ):
            place = tmp_path / f"{file}-{number}"
            place.mkdir()
            (place / file).write_bytes(data)
            adapter = file in names.PICKLED_ADAPTERS
            (place / (names.ADAPTER_CONFIG if adapter else names.CONFIG)).write_text(json.dumps(ADAPTER if adapter else CONFIG))
            (place / names.LITGPT_CONFIG).write_text(yaml.safe_dump(litgpt_values("llama")))
            (place / names.LITGPT_HYPERPARAMETERS).write_text(yaml.safe_dump({"lora_r": 2, "lora_alpha": 4}))
            commands.append(["convert", str(place), "--to", to, "--out_dir", str(tmp_path / "out"), "--base_dir", str(talker)])
    tagged = tmp_path / "tagged"
    tagged.mkdir()
    torch.save({"a": torch.ones(2)}, tagged / names.LITGPT_WEIGHTS)
    (tagged / names.LITGPT_CONFIG).write_text("!!python/object/apply:os.system ['touch PWNED']\n")
    commands.append(["convert", str(tagged), "--to", "hf", "--out_dir", str(tmp_path / "out")])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WATCHED, repr(commands)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "all refused" in done.stdout, done.stderr[-3000:]
    assert done.stderr.count("error: ") == len(commands) and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- Hugging Face directories ----------------------------------------------------------------------------------------


def test_a_model_is_cut_into_files_of_the_size_asked_for_and_back_into_one(tmp_path: Path) -> None:
    """M02: three shards, the same tensors, a complete index; one file again; the fingerprint stays."""
    base = make_base(tmp_path / "base")
    converted(base, "hf", tmp_path / "cut", max_shard_size=20_000 / 10**9)
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "cut" / names.WEIGHTS_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(base).values())
    assert all((tmp_path / "cut" / file).stat().st_size < 22_000 for file in files)
    converted(tmp_path / "cut", "hf", tmp_path / "one", max_shard_size=0)
    assert same(tensors_of(tmp_path / "one"), tensors_of(base))
    assert len({resolve(tmp_path / name).fingerprint() for name in ("base", "cut", "one")}) == 1


@pytest.mark.parametrize(("word", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_another_dtype_is_rounded_once_and_config_says_it(word: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch_dtype="float64")
    report = converted(base, "hf", tmp_path / "out", dtype=word)
    assert same(tensors_of(tmp_path / "out"), {name: tensor.to(dtype) for name, tensor in tensors_of(base).items()})
    assert json.loads((tmp_path / "out" / names.CONFIG).read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert report["proof"]["rounded_once"] == (0 if word == "float32" else 21)


def test_a_number_too_large_for_the_dtype_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    tensors = dict(base_tensors())
    tensors["model.norm.weight"] = ("F32", (24,), np.full(24, 1e6, np.float32))
    base = make_base(tmp_path / "base", tensors=tensors)
    with pytest.raises(WorkError, match=r"model\.norm\.weight reaches 1e\+06, more than float16"):
        converted(base, "hf", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_step_that_is_a_whole_model_becomes_a_plain_directory(tmp_path: Path) -> None:
    """A full step loses its manifest and keeps its weights; nothing of the training comes along."""
    base = make_talker(tmp_path / "base")
    manifest = read_manifest(make_step(tmp_path / "other", 1, base))
    from dataclasses import replace

    run = tmp_path / "run"
    run.mkdir()
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.suffix == ".json"}
    step = commit_step(
        run, replace(manifest, method="full", base=None, step=3), tensors={names.WEIGHTS: base_tensors(5, vocab_size=288)}, files=files
    )
    converted(run, "hf", tmp_path / "out")
    assert same(tensors_of(tmp_path / "out"), tensors_of(step))
    assert resolve(tmp_path / "out").kind == "base" and not (tmp_path / "out" / names.MANIFEST).exists()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "hi", "--max_new_tokens", "2", "--threads", "1"]) == 0


@pytest.mark.parametrize(
    ("source", "to", "out", "more", "why"),
    [
        ("base", "peft", "out", {}, "whole model"),
        ("base", "litlora", "out", {}, "whole model"),
        ("adapter", "hf", "out", {}, "merging"),
        ("step", "litlora", "out", {}, "already"),
        ("base", "hf", "out", {"dtype": "q8_0"}, "GGUF"),
        ("adapter", "peft", "out", {"dtype": "float16"}, "keeps its dtype"),
        ("base", "hf", "base/inside", {}, "writes into a base"),
        ("adapter", "peft", "adapter/inside", {}, "writes into"),
        ("base", "hf", "adapter", {}, "exists already"),
        ("adapter", "litlora", "run/step-9", {}, "name of a training step"),
        ("base", "hf", "run/step-9", {}, "name of a training step"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_written(
    source: str, to: str, out: str, more: Any, why: str, tmp_path: Path
) -> None:
    """Nothing is overwritten, and no result lies in its source."""
    base = make_talker(tmp_path / "base")
    make_adapter(tmp_path / "adapter", str(base))
    make_step(tmp_path / "run", 1, base).rename(tmp_path / "step")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=why):
        converted(tmp_path / source, to, tmp_path / out, **more)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# ---- PEFT in and out -------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 11, r"layers\.0\.mlp\.down_proj": 3}},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "layers": {"layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_goes_in_and_out_with_nothing_lost(kind: str, tmp_path: Path) -> None:
    """N02: written by PEFT, to a step (same logits, base recorded), back to a directory that PEFT loads: files equal to the byte.

    Caught: alpha_pattern left out of what is written.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", "llama3")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft = get_peft_model(plain, LoraConfig(**{**settings, **KINDS[kind]})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in peft.named_parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(tmp_path / "theirs")
    report = converted(tmp_path / "theirs", "litlora", tmp_path / "step", base)
    tokens = random_tokens(2, 9, vocab_size=256)
    with torch.no_grad():
        expected = peft(tokens).logits
        ours = GPT.from_pretrained(tmp_path / "step").eval()(tokens)
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    manifest = read_manifest(tmp_path / "step")
    assert manifest.step == 0 and manifest.base is not None and manifest.base.fingerprint == resolve(base).fingerprint()
    (event,) = manifest.lineage
    weights = tmp_path / "theirs" / names.ADAPTER_WEIGHTS
    assert event == {"event": "converted", "from": str(tmp_path / "theirs"), "kind": "PEFT adapter", "sha256": sha256(weights)}
    converted(tmp_path / "step", "peft", tmp_path / "back")
    for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert not (tmp_path / "back" / names.MANIFEST).exists() and (tmp_path / "back" / names.TOKENIZER).exists()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).eval(), str(tmp_path / "back")).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    assert report["proof"]["equal"] == report["proof"]["tensors"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_converted_step_with_the_options_it_records(kind: str, tmp_path: Path) -> None:
    """The manifest's options mean exactly the slots of the adapter, however PEFT's config named them."""
    base = make_talker(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base), **KINDS[kind])
    (adapter / names.ADAPTER_WEIGHTS).unlink()
    write_safetensors(adapter / names.ADAPTER_WEIGHTS, adapter_tensors(0, {**ADAPTER, **KINDS[kind]}, vocab_size=288))
    converted(tmp_path / "adapter", "litlora", tmp_path / "step")
    step = resolve(tmp_path / "step")
    assert step.manifest is not None
    meant = stored_tuning(LoRAOptions(**step.manifest.options), step.config())
    assert meant == step.tuning()


@pytest.mark.parametrize(("family", "targets"), [("pythia", ["query_key_value", "dense"]), ("phi", ["fc1", "q_proj"])])
def test_an_adapter_names_its_modules_as_the_family_does(family: str, targets: list[str], tmp_path: Path) -> None:
    """GPT-NeoX, Phi: PEFT's own adapter, as transformers calls the modules; the options recorded mean the same slots."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", family)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": targets, "rank_pattern": {targets[0]: 2}}
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    peft.save_pretrained(tmp_path / "theirs")
    converted(tmp_path / "theirs", "litlora", tmp_path / "own", base)
    found = resolve(tmp_path / "own")
    assert found.manifest is not None and found.manifest.options["dropout"] == 0.25
    assert stored_tuning(LoRAOptions(**found.manifest.options), found.config()) == found.tuning()


def test_a_converted_step_refuses_another_base_and_is_like_any_other_step(tmp_path: Path) -> None:
    """A02: the fingerprint is recorded. generate, verify and merge_lora take it."""
    base, other = make_talker(tmp_path / "base"), make_talker(tmp_path / "other", seed=1)
    adapter = make_adapter(tmp_path / "adapter", "somewhere/else")
    with pytest.raises(UserError, match="somewhere/else"):
        converted(adapter, "litlora", tmp_path / "own")
    converted(adapter, "litlora", tmp_path / "own", base)
    with pytest.raises(UserError, match="its weights are others"):
        resolve(tmp_path / "own", base_dir=other).base()
    assert main(["verify", str(tmp_path / "own")]) == 0
    assert main(["merge_lora", str(tmp_path / "own")]) == 0
    assert main(["generate", str(tmp_path / "own"), "--prompt", "hi", "--max_new_tokens", "2", "--threads", "1"]) == 0
    copy(base, tmp_path / "moved")
    assert resolve(tmp_path / "own", base_dir=tmp_path / "moved").base().path == tmp_path / "moved"


def test_an_adapter_that_does_not_fit_the_base_or_holds_no_numbers_is_refused(tmp_path: Path) -> None:
    """A01, F16."""
    base = make_talker(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    wider = make_base(tmp_path / "wider", hidden_size=32, vocab_size=288)
    byte_tokenizer(wider)
    with pytest.raises(UserError, match="wrong shape"):
        converted(adapter, "litlora", tmp_path / "out", wider)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(adapter, names.ADAPTER_WEIGHTS).items()}
    broken = next(iter(tensors))
    tensors[broken][0, 0] = float("nan")
    (adapter / names.ADAPTER_WEIGHTS).unlink()
    write_safetensors(adapter / names.ADAPTER_WEIGHTS, raw_tensors(tensors), {"format": "pt"})
    with pytest.raises(UserError, match=broken):
        converted(adapter, "litlora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", names.PICKLED_ADAPTERS)
def test_a_pickled_adapter_becomes_a_safetensors_one_under_the_names_of_its_file(file: str, tmp_path: Path) -> None:
    """adapter_model.bin, and what was saved out of a live model (`default` in the names). Equal tensors; PEFT's config to the byte."""
    base = make_talker(tmp_path / "base")
    plain = make_adapter(tmp_path / "plain", str(base), use_dora=True)
    tensors = tensors_of(plain, names.ADAPTER_WEIGHTS)
    live = {
        name.replace(".lora_A.", ".lora_A.default.").replace("_vector", "_vector.default.weight"): tensor
        for name, tensor in tensors.items()
    }
    old = tmp_path / "old"
    old.mkdir()
    (old / names.ADAPTER_CONFIG).write_bytes((plain / names.ADAPTER_CONFIG).read_bytes())
    torch.save(live, old / file)
    report = converted(old, "peft", tmp_path / "out")
    assert same(tensors_of(tmp_path / "out", names.ADAPTER_WEIGHTS), tensors)
    assert (tmp_path / "out" / names.ADAPTER_CONFIG).read_bytes() == (plain / names.ADAPTER_CONFIG).read_bytes()
    assert set(report["renamed"].values()) == live.keys() - tensors.keys()
    converted(old, "litlora", tmp_path / "step", base)
    assert torch.equal(*(GPT.from_pretrained(path).eval()(torch.tensor([[1, 2, 3]])) for path in (plain, tmp_path / "step")))


def test_names_out_of_a_live_model_become_those_of_a_file() -> None:
    prefix = "base_model.model.model.layers.0."
    for live, plain in (
        (f"{prefix}mlp.up_proj.lora_B.default.weight", f"{prefix}mlp.up_proj.lora_B.weight"),
        (f"{prefix}mlp.up_proj.lora_magnitude_vector.default.weight", f"{prefix}mlp.up_proj.lora_magnitude_vector"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight"),
        (f"{prefix}mlp.up_proj.lora_A.weight", f"{prefix}mlp.up_proj.lora_A.weight"),
    ):
        assert plain_peft_name(live) == plain


def test_a_real_adapter_with_every_key_of_todays_peft_keeps_all_of_it(tmp_path: Path) -> None:
    """A published adapter of PEFT 0.19 whose base is not here: config and tensors as they are; a step of it needs the base."""
    real = shared_data("adapters/gemma3-270m-lora")
    report = converted(real, "peft", tmp_path / "out")
    for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (real / name).read_bytes()
    assert report["proof"]["equal"] == report["proof"]["tensors"] == 144
    with pytest.raises(UserError, match="gemma3-270m-it"):
        converted(real, "litlora", tmp_path / "step")


def test_a_method_that_peft_does_not_know_is_refused_with_the_way_round(tmp_path: Path) -> None:
    base = make_talker(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) + "\n" for n in range(8)))
    words = f"finetune pro {base} --data {rows} --out_dir {tmp_path / 'run'} --train.max_steps 2 --eval.max_samples 1 --threads 1"
    assert main(words.split()) == 0
    for to in ("peft", "gguf"):
        with pytest.raises(UserError, match="PEFT has no format") as refused:
            converted(tmp_path / "run", to, tmp_path / "out")
        assert "merge_lora" in refused.value.hint


def test_a_kill_in_the_middle_leaves_no_directory_and_the_next_try_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A05, F07: whole or not at all."""
    base = make_talker(tmp_path / "base")
    from litlora.convert import hf

    monkeypatch.setattr(hf, "write_small_files", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WorkError, match="the disk is full"):
        converted(base, "hf", tmp_path / "out")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    converted(base, "hf", tmp_path / "out")


def test_a_result_that_differs_from_its_source_is_never_given_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at the end: one changed number is found and named."""
    base = make_talker(tmp_path / "base")
    from litlora.convert import hf

    def write_wrong(path: Path, parts: Mapping[str, Any], progress: Any) -> None:
        tensors = {name: (part.dtype, part.shape, np.array(part.bytes())) for name, part in parts.items()}
        tensors["model.norm.weight"][2][5] ^= 1
        write_safetensors(path, tensors, {"format": "pt"})

    monkeypatch.setattr(hf, "write_parts", write_wrong)
    with pytest.raises(WorkError, match=r"model\.norm\.weight has other bytes"):
        converted(base, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- LitGPT's layout, made by hand -----------------------------------------------------------------------------------

LITGPT = {
    "llama": {},
    "llama3": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"attention_bias": False},
    "smollm": {},
    "linear": {},
}


def litgpt_values(family: str, **changes: Any) -> dict[str, Any]:
    """The model_config.yaml that LitGPT writes for the tiny model of a family."""
    config = tiny_config(family, **{"vocab_size": 288, **LITGPT.get(family, {}), **changes})
    rope = config.rope
    adjusted = {"factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    adjusted["original_max_seq_len"] = rope.original_max_position_embeddings
    return {
        "name": {"mistral": "Mistral-7B-v0.1"}.get(family, "tiny"), "hf_config": {"org": "someone", "name": "tiny"},
        "block_size": config.max_position_embeddings, "n_layer": config.num_hidden_layers, "n_embd": config.hidden_size,
        "vocab_size": 280, "padded_vocab_size": config.vocab_size, "norm_class_name": "RMSNorm", "norm_eps": config.rms_norm_eps,
        "norm_qk": config.qk_norm is not None, "norm_qk_type": "default", "parallel_residual": False, "shared_attention_norm": False,
        "n_head": config.num_attention_heads, "head_size": config.head_dim, "n_query_groups": config.num_key_value_heads,
        "attn_bias": config.attention_bias, "bias": False, "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0,
        "rope_base": int(rope.rope_theta), "rope_condense_ratio": int(rope.factor) if rope.rope_type == "linear" else 1,
        "rope_adjustments": adjusted if rope.rope_type == "llama3" else None,
        "intermediate_size": config.intermediate_size, "n_expert": 0, "lm_head_bias": False, "scale_embeddings": False,
        "sliding_window_size": config.sliding_window,
        "sliding_window_indices": [1] * config.num_hidden_layers if config.sliding_window else None,
    }  # fmt: skip


NAMES = {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj", "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip


def in_litgpt(tensors: Mapping[str, torch.Tensor], *, grouped: int = 0) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors as LitGPT has them; `grouped`: as older versions, with that many heads for each key head."""
    found = {"transformer.wte.weight": tensors["model.embed_tokens.weight"], "transformer.ln_f.weight": tensors["model.norm.weight"]}
    found["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for layer in range(3):
        for theirs, ours in NAMES.items():
            if (name := f"model.layers.{layer}.{ours}.weight") in tensors:
                found[f"transformer.h.{layer}.{theirs}.weight"] = tensors[name]
        for kind in ("weight", "bias"):
            parts = [tensors.get(f"model.layers.{layer}.self_attn.{part}.{kind}") for part in ("q_proj", "k_proj", "v_proj")]
            if parts[0] is None:
                continue
            if grouped:
                groups = len(parts[1]) // 12
                cut = [part.chunk(groups) for part in parts]
                found[f"transformer.h.{layer}.attn.attn.{kind}"] = torch.cat([piece for group in zip(*cut, strict=True) for piece in group])
            else:
                found[f"transformer.h.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def litgpt_directory(path: Path, family: str, tensors: Mapping[str, torch.Tensor], **changes: Any) -> Path:
    path.mkdir(parents=True)
    (path / names.LITGPT_CONFIG).write_text(yaml.safe_dump({**litgpt_values(family), **changes}))
    (path / names.GENERATION_CONFIG).write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257, 258]}))
    byte_tokenizer(path)
    torch.save(dict(tensors), path / names.LITGPT_WEIGHTS)
    return path


@pytest.mark.parametrize("layout", ["fused", "grouped", "nested"])
@pytest.mark.parametrize("family", LITGPT)
def test_a_litgpt_checkpoint_becomes_the_same_model(family: str, layout: str, tmp_path: Path) -> None:
    """The tensors and the config that it was made of, under Hugging Face's names, from the layout of today and of older versions.

    Caught: q, k, v cut in another order; gate and up swapped.
    """
    model = tiny_gpt(family, vocab_size=288, **LITGPT[family])
    tied = model.config.tie_word_embeddings  # LitGPT stores the matrix twice
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    theirs = in_litgpt(tensors, grouped=layout == "grouped")
    litgpt_directory(tmp_path / "lit", family, {"model": theirs} if layout == "nested" else theirs)  # type: ignore[dict-item]
    report = converted(tmp_path / "lit", "hf", tmp_path / "out")
    assert same(tensors_of(tmp_path / "out"), tensors)
    found, expected = resolve(tmp_path / "out").config(), model.config
    for key in (
        "model_type",
        "head_dim",
        "num_key_value_heads",
        "rope",
        "rms_norm_eps",
        "sliding_window",
        "attention_bias",
        "tie_word_embeddings",
    ):
        assert getattr(found, key) == getattr(expected, key), key
    assert (found.bos_token_id, found.eos_token_ids) == (256, (257, 258))
    assert report["from"]["kind"] == "LitGPT checkpoint"
    assert report["renamed"]["model.layers.1.mlp.gate_proj.weight"] == "transformer.h.1.mlp.fc_1.weight"
    assert set(report["dropped"]) == ({"lm_head.weight"} if tied else set())
    tokens = random_tokens(1, 11, vocab_size=256)
    with torch.no_grad():
        assert torch.equal(GPT.from_pretrained(tmp_path / "out").eval()(tokens), model(tokens))


@pytest.mark.parametrize("layout", ["attn.qkv", "attn.attn"])
@pytest.mark.parametrize("more", [16, -14])
def test_a_fused_weight_with_other_rows_than_its_heads_have_is_refused(more: int, layout: str, tmp_path: Path) -> None:
    """Too many are not dropped, too few are no failure of ours; in the older layout as in today's."""
    tensors = in_litgpt(tiny_gpt("llama", vocab_size=288).state_dict(), grouped=2 if layout == "attn.attn" else 0)
    name = next(name for name in tensors if ".attn.attn." in name or ".attn.qkv." in name)
    rows = len(tensors[name])
    tensors[name] = torch.cat([tensors[name], tensors[name]])[: rows + more]
    litgpt_directory(tmp_path / "lit", "llama", tensors)
    with pytest.raises(UserError, match=f"{rows} rows are needed"):
        converted(tmp_path / "lit", "hf", tmp_path / "out")


def test_rows_in_groups_are_put_in_order() -> None:
    """Two key heads of two query heads each, one row a head: q0 q1 k0 v0 q2 q3 k1 v1."""
    assert ungrouped(Heads(query=4, shared=2, size=1)).tolist() == [0, 1, 4, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"norm_class_name": "LayerNorm"}, "norm_class_name"),
        ({"mlp_class_name": "GptNeoxMLP"}, "mlp_class_name"),
        ({"parallel_residual": True}, "parallel_residual"),
        ({"rotary_percentage": 0.25}, "rotary_percentage"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_scores_scalar": 7}, "attention_scores_scalar"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, "rope_adjustments"),
        ({"n_layer": "many"}, "n_layer"),
        ({"n_layer": 4}, "missing: model.layers.3"),
        ({"head_size": 6}, "rows are needed"),
        ({"sliding_window_size": 7, "sliding_window_indices": 1}, "sliding_window_indices"),
    ],
)
def test_a_litgpt_model_of_another_arithmetic_is_refused_by_the_key(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    tensors = in_litgpt(tiny_gpt("llama", vocab_size=288).state_dict())
    litgpt_directory(tmp_path / "lit", "llama", tensors, **changes)
    with pytest.raises(UserError, match=why):
        converted(tmp_path / "lit", "hf", tmp_path / "out")


def litgpt_lora(path: Path, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any], family: str = "llama3") -> Path:
    path.mkdir(parents=True)
    (path / names.LITGPT_CONFIG).write_text(yaml.safe_dump(litgpt_values(family)))
    hyperparameters = {"checkpoint_dir": "checkpoints/tiny", "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.05, **options}
    (path / names.LITGPT_HYPERPARAMETERS).write_text(yaml.safe_dump(hyperparameters))
    torch.save({"model": dict(tensors)}, path / names.LITGPT_LORA)
    return path


ENABLED = {"qv": (True, False, True), "qkv": (True, True, True), "k": (False, True, False), "kv": (False, True, True)}


@pytest.mark.parametrize("enabled", ENABLED)
def test_a_litgpt_lora_on_the_fused_weight_is_split_into_what_each_part_adds(enabled: str, tmp_path: Path) -> None:
    """What LitGPT adds to the fused weight, zeros where a part is not trained, against B A of q, k and v apart.

    Caught: A not stacked by the parts that are trained; B cut at the places of all three parts.
    """
    rows, on, r = (48, 24, 24), ENABLED[enabled], 3
    generator = torch.Generator().manual_seed(0)
    count = sum(size for size, used in zip(rows, on, strict=True) if used)
    lora: dict[str, torch.Tensor] = {}
    update = torch.zeros(sum(rows), 40)
    for layer in range(3):
        a, b = torch.randn(r * sum(on), 40, generator=generator), torch.randn(count, r, generator=generator)
        lora |= {f"transformer.h.{layer}.attn.qkv.lora_A": a, f"transformer.h.{layer}.attn.qkv.lora_B": b}
        lora |= {
            f"transformer.h.{layer}.mlp.fc_2.lora_A": a[:r],
            f"transformer.h.{layer}.mlp.fc_2.lora_B": torch.randn(72, r, generator=generator),
        }
        if layer == 1:  # the definition, part by part
            place = row = 0
            for part, (size, used) in enumerate(zip(rows, on, strict=True)):
                if used:
                    mine = a[r * sum(on[:part]) : r * (1 + sum(on[:part]))]
                    update[place : place + size] = b[row : row + size] @ mine
                    row += size
                place += size
    words = {f"lora_{word}": used for word, used in zip(("query", "key", "value"), on, strict=True)}
    litgpt_lora(tmp_path / "lit", lora, {**words, "lora_mlp": True})
    base = tiny_base(tmp_path / "base", "llama3")
    converted(tmp_path / "lit", "peft", tmp_path / "out")
    found = tensors_of(tmp_path / "out", names.ADAPTER_WEIGHTS)
    prefix = "base_model.model.model.layers.1"
    for part, start, end in (("q_proj", 0, 48), ("k_proj", 48, 72), ("v_proj", 72, 96)):
        a = found.get(f"{prefix}.self_attn.{part}.lora_A.weight")
        assert (a is None) == (part[0] not in enabled)
        if a is not None:
            assert torch.allclose(found[f"{prefix}.self_attn.{part}.lora_B.weight"] @ a, update[start:end], atol=1e-6)
    assert torch.equal(found[f"{prefix}.mlp.up_proj.lora_B.weight"], lora["transformer.h.1.mlp.fc_2.lora_B"])
    config = json.loads((tmp_path / "out" / names.ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["base_model_name_or_path"]) == (3, 6, 0.05, "someone/tiny")
    converted(tmp_path / "lit", "litlora", tmp_path / "step", base)
    assert isinstance(open_source(tmp_path / "lit", to="peft"), Adapter)
    assert resolve(tmp_path / "step").tuning().slots.keys() == {
        f"model.layers.{layer}.{name}.adapter" for layer in range(3) for name in (*(f"self_attn.{c}_proj" for c in enabled), "mlp.up_proj")
    }


def test_an_older_litgpt_lora_and_a_wrong_rank_are_refused(tmp_path: Path) -> None:
    options = {"lora_query": True, "lora_key": False, "lora_value": True}
    old = {"transformer.h.0.attn.attn.lora_A": torch.ones(6, 40), "transformer.h.0.attn.attn.lora_B": torch.ones(72, 3)}
    for number, (lora, why) in enumerate(
        ((old, "older LitGPT"), ({name.replace("attn.attn", "attn.qkv"): tensor[:5] for name, tensor in old.items()}, "6 rows are needed"))
    ):
        litgpt_lora(tmp_path / f"lit-{number}", lora, options)
        with pytest.raises(UserError, match=why):
            converted(tmp_path / f"lit-{number}", "peft", tmp_path / "out")


# ---- LitGPT itself ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litgpt() -> Any:
    return pytest.importorskip("litgpt", reason="litgpt is not installed: pip install --no-deps litgpt==0.5.13 to compare with it")


def litgpt_model(litgpt: Any, family: str, lora: bool, **options: Any) -> Any:
    from litgpt.config import Config as PlainConfig
    from litgpt.lora import GPT as LoRAModel
    from litgpt.lora import Config as LoRAConfig

    torch.manual_seed(0)
    values = litgpt_values(family)
    model = LoRAModel(LoRAConfig(**values, **options)) if lora else litgpt.GPT(PlainConfig(**values))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name or "ln_f" in name else 0.4 * noise / max(1, parameter.shape[-1]) ** 0.5)
    return model.eval()


@pytest.mark.parametrize("family", [family for family in LITGPT if family != "smollm"])
def test_litgpt_computes_the_same_logits(family: str, litgpt: Any, tmp_path: Path) -> None:
    """Its own model, saved as it saves it."""
    theirs = litgpt_model(litgpt, family, lora=False)
    litgpt_directory(tmp_path / "lit", family, theirs.state_dict())
    converted(tmp_path / "lit", "hf", tmp_path / "out")
    tokens = random_tokens(2, 13, vocab_size=256)
    with torch.no_grad():
        expected, ours = theirs(tokens), GPT.from_pretrained(tmp_path / "out").eval()(tokens)
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("enabled", ENABLED)
def test_litgpts_lora_adds_and_merges_the_same(enabled: str, litgpt: Any, tmp_path: Path) -> None:
    """Logits of its LoRA model equal ours with the converted step; its merge equals merge_lora's, number for number to rounding."""
    from litgpt.lora import lora_filter, merge_lora_weights

    on = ENABLED[enabled]
    words = {f"lora_{word}": used for word, used in zip(("query", "key", "value"), on, strict=True)}
    options = {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0, **words, "lora_projection": True, "lora_mlp": True, "lora_head": True}
    theirs = litgpt_model(litgpt, "llama3", lora=True, **options)
    state = theirs.state_dict()
    plain = {name.replace(".linear.", "."): tensor.clone() for name, tensor in state.items() if not lora_filter(name, tensor)}
    litgpt_directory(tmp_path / "lit", "llama3", plain)
    converted(tmp_path / "lit", "hf", tmp_path / "base")
    litgpt_lora(tmp_path / "lora", {name: tensor.clone() for name, tensor in state.items() if lora_filter(name, tensor)}, options)
    converted(tmp_path / "lora", "litlora", tmp_path / "step", tmp_path / "base")
    tokens = random_tokens(2, 13, vocab_size=256)
    with torch.no_grad():
        expected, ours = theirs(tokens), GPT.from_pretrained(tmp_path / "step").eval()(tokens)
        assert (ours - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        before = GPT.from_pretrained(tmp_path / "base").eval()(tokens)
        assert (before - expected).abs().max() > 1e-2
        merge_lora_weights(theirs)
    merged = {name.replace(".linear.", "."): tensor for name, tensor in theirs.state_dict().items() if not lora_filter(name, tensor)}
    litgpt_directory(tmp_path / "lit-merged", "llama3", merged)
    converted(tmp_path / "lit-merged", "hf", tmp_path / "theirs")
    assert main(["merge_lora", str(tmp_path / "step")]) == 0
    found, wanted = tensors_of(tmp_path / "step" / names.MERGED), tensors_of(tmp_path / "theirs")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-6), name


def test_the_command_says_what_it_read_and_prints_where_the_result_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    step = add_step(tmp_path / "run", 2, base)
    assert main(["convert", str(tmp_path / "run"), "--to", "peft", "--out_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    assert str(step) in said.err and "equal to the source's" in said.err and "litlora chat" in said.err
    for words, why in (
        ([], "into which format"),
        (["--to", "hf"], "where is the result to go"),
        (["--to", "onnx", "--out_dir", "x"], "onnx"),
    ):
        assert main(["convert", str(base), *words]) == 2
        assert why in capsys.readouterr().err


def test_a_file_of_weights_alone_says_that_its_directory_is_needed(tmp_path: Path) -> None:
    base, _ = pickled_base(tmp_path / "base")
    with pytest.raises(UserError, match="is a file of pickled weights") as refused:
        open_source(base / names.PICKLED_WEIGHTS, to="hf")
    assert f"litlora convert {base} --to hf" in refused.value.hint
    assert read_pickled(base / names.PICKLED_WEIGHTS).keys() == base_tensors().keys()
    assert Checkpoint(base, "base").config().hidden_size == 24
