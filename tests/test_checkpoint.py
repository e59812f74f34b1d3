"""From files to a model and back: strict loading, memory maps, the optimizer's state, the manifest, the model card (YARDSTICK A01, A02)."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import ADAPTER, CONFIG, adapter_tensors, add_step, base_tensors, copy, make_adapter, make_base, manifest_of
from conftest import random_tokens, shared_data, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.checkpoint import names
from litlora.checkpoint.card import model_card
from litlora.checkpoint.commit import Tensors, commit_step
from litlora.checkpoint.files import serving_files
from litlora.checkpoint.manifest import BaseRecord, Manifest, read_manifest, seal, unseal
from litlora.checkpoint.resolve import read_step, resolve
from litlora.checkpoint.state import VALUES, load_state, save_state
from litlora.checkpoint.weights import adapter_tensors as read_adapter
from litlora.checkpoint.weights import load_base, load_model, raw_tensors
from litlora.errors import UserError
from litlora.methods import from_peft, tuning_of
from litlora.methods.attach import attach, load_tuned_state, merge, trainable, tuned_state
from litlora.methods.tuning import Tuning, why_misread
from litlora.model import GPT
from litlora.options import LoRAOptions
from litlora.peft import adapter_config_from_peft
from litlora.safetensors_file import write_safetensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:  # (B, T)
    return random_tokens(rows, length, vocab_size=CONFIG["vocab_size"])


def refused(work: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        work()
    assert caught.value.exit_code == 2
    return caught.value


# ---- loading a base --------------------------------------------------------------------------------------------------


def test_a_base_is_loaded_as_it_is_stored(tmp_path: Path) -> None:
    """M02's first half: single file and shards, with and without the prefix, every tensor to the bit, dtype kept or as asked."""
    stored = base_tensors()
    plain = load_model(resolve(make_base(tmp_path / "plain")))
    assert plain.state_dict().keys() == stored.keys()
    for name, tensor in plain.state_dict().items():
        assert np.array_equal(tensor.numpy(), stored[name][2])  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in plain.parameters())
    want = plain(tokens())
    short = {name.removeprefix("model."): value for name, value in stored.items()}
    derived = {**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (5,), np.zeros(5, np.float32))}
    for number, (tensors, shards) in enumerate(((stored, 3), (short, 1), (derived, 1))):
        model = load_model(resolve(make_base(tmp_path / str(number), tensors=tensors, shards=shards)))
        assert torch.equal(model(tokens()), want)
    narrow = load_model(resolve(tmp_path / "plain"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.model.norm.weight, plain.model.norm.weight.to(torch.bfloat16))


def test_it_computes_what_transformers_computes_from_the_same_directory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", shards=2)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, want = load_model(resolve(base))(tokens()), theirs(tokens()).logits
    assert (ours - want).abs().max() <= 1e-5 * max(1, want.abs().max())


def test_a_tied_head_is_one_parameter_and_a_stored_copy_must_be_equal(tmp_path: Path) -> None:
    """A04. Mutation: without `tie` the head stays on the meta device, and the assertion in load_base speaks."""
    stored = base_tensors(tie_word_embeddings=True)
    model = load_model(resolve(make_base(tmp_path / "tied", tie_word_embeddings=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    both = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}
    copied = load_model(resolve(make_base(tmp_path / "copy", tensors=both, tie_word_embeddings=True)))
    assert torch.equal(copied(tokens()), model(tokens()))
    other = {**stored, "lm_head.weight": base_tensors(seed=5)["lm_head.weight"]}
    error = refused(lambda: load_model(resolve(make_base(tmp_path / "other", tensors=other, tie_word_embeddings=True))))
    assert "tie_word_embeddings" in str(error)
    assert error.where.endswith(names.CONFIG)


def test_every_fault_of_the_bases_tensors_is_listed(tmp_path: Path) -> None:
    """A01 for the base: missing, extra, wrong shape, renamed, no floating point; all at once. Mutation: dropping any one check."""
    tensors: dict[str, Any] = dict(base_tensors())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = ("F32", (24, 30), np.zeros((24, 30), np.float32))
    tensors["model.layers.0.input_norm.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    tensors["model.norm.weight"] = ("I64", (24,), np.zeros(24, np.int64))
    error = refused(lambda: load_model(resolve(make_base(tmp_path / "base", tensors=tensors))))
    for fault in (
        "missing: model.layers.1.mlp.up_proj.weight (36, 24)",
        "unexpected: model.layers.9.mlp.up_proj.weight (24,)",
        "wrong shape: model.layers.0.self_attn.q_proj.weight (24, 30), needed (30, 24)",
        "missing: model.layers.0.input_layernorm.weight (24,)",
        "unexpected: model.layers.0.input_norm.weight (24,)",
        "of dtype torch.int64: model.norm.weight",
    ):
        assert fault in str(error), fault
    assert "6 tensors at fault" in str(error)
    twice = {**base_tensors(), "norm.weight": base_tensors()["model.norm.weight"]}
    assert "there twice" in str(refused(lambda: load_model(resolve(make_base(tmp_path / "twice", tensors=twice)))))


def test_a_mapped_base_costs_no_memory_and_is_never_written_to(tmp_path: Path) -> None:
    """One `litlora chat` beside another shares the weights. Mutation: `.clone()` in load_base costs the model's size again."""
    base = make_base(tmp_path / "base", vocab_size=200_000)  # 19 MB each of embedding and head
    code = f"""
import re, sys, torch
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
import litlora.methods.attach
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
checkpoint = resolve({str(base)!r})
checkpoint.shards()
before = anonymous()
model = load_model(checkpoint)
loaded = anonymous() - before
with torch.no_grad():
    model(torch.arange(8)[None], logits_at=torch.tensor([7]))
    model.model.embed_tokens.weight.add_(1)
print(loaded, anonymous() - before)
"""
    fingerprint = resolve(base).fingerprint()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    loaded, written = map(float, done.stdout.split())
    assert loaded < 8, "MB of its own that loading took"
    assert written > 16, "a write makes private pages"
    assert resolve(base).fingerprint() == fingerprint


# ---- loading a step --------------------------------------------------------------------------------------------------


def test_a_step_computes_what_peft_computes_from_the_same_directory(tmp_path: Path) -> None:
    """N02: every intermediate checkpoint is a PEFT adapter, with no export; merged too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base")
    step = add_step(tmp_path / "out", 100, base)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(step)).eval()
    model = load_model(resolve(step)).eval()
    with torch.no_grad():
        ours, want, without = model(tokens()), theirs(tokens()).logits, load_base(resolve(base))(tokens())
        assert (ours - want).abs().max() <= 1e-5 * max(1, want.abs().max())
        assert (without - want).abs().max() > 0.1
        assert (merge(model)(tokens()) - want).abs().max() <= 2e-5 * max(1, want.abs().max())


def test_what_a_model_gives_back_is_what_its_step_holds(tmp_path: Path) -> None:
    """A03: the same names, every tensor to the bit, also from a 16-bit adapter; what is loaded for use does not learn."""
    base = make_base(tmp_path / "base")
    step = resolve(add_step(tmp_path / "out", 100, base))
    model = load_model(step)
    want = {name: torch.from_numpy(raw) for name, (_, _, raw) in adapter_tensors(100).items()}  # type: ignore[arg-type]
    held = tuned_state(model, step.tuning(), step.config())
    assert held.keys() == want.keys()
    assert all(torch.equal(held[name], want[name]) for name in want)
    assert not [name for name in trainable(model) if ".adapter." in name]
    narrow = make_adapter(tmp_path / "narrow", str(base))
    write_safetensors(narrow / names.ADAPTER_WEIGHTS, raw_tensors({name: tensor.bfloat16() for name, tensor in want.items()}), {})
    held = tuned_state(load_model(resolve(narrow)), step.tuning(), step.config())
    assert all(torch.equal(held[name], want[name].bfloat16().float()) for name in want)


def test_every_fault_of_an_adapters_tensors_is_listed(tmp_path: Path) -> None:
    """A01 for the adapter: missing, extra, wrong shape, renamed, wrong r, wrong kind of alpha."""
    base = make_base(tmp_path / "base")
    path = make_adapter(tmp_path / "adapter", str(base))
    tensors: dict[str, Any] = dict(adapter_tensors())
    first, second, third, fourth = list(tensors)[:4]
    del tensors[first]
    tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] = tensors[second]
    tensors[third] = ("F32", (2, 24), np.zeros((2, 24), np.float32))
    tensors[fourth.replace("lora_B", "lora_C")] = tensors.pop(fourth)
    write_safetensors(path / names.ADAPTER_WEIGHTS, tensors, {})
    model, tuning = load_base(resolve(base)), resolve(path).tuning()
    attach(model, tuning, seed=0)
    for work in (
        lambda: load_model(resolve(path)),
        lambda: load_tuned_state(model, tuning, read_adapter(resolve(path)), resolve(path).adapter_file(), resolve(base).config()),
    ):
        error = refused(work)
        for fault in (f"missing: {first}", f"unexpected: {list(tensors)[-2]}", f"wrong shape: {third}", f"missing: {fourth}", "lora_C"):
            assert fault in str(error), fault
        assert names.ADAPTER_WEIGHTS in str(error)
    for number, (changes, word) in enumerate(
        (({"r": 4}, "wrong shape"), ({"lora_alpha": "16"}, "lora_alpha"), ({"use_dora": True}, "missing"))
    ):
        wrong = make_adapter(tmp_path / str(number), str(base))
        (wrong / names.ADAPTER_CONFIG).write_text(json.dumps({**ADAPTER, "base_model_name_or_path": str(base), **changes}))
        assert word in str(refused(lambda wrong=wrong: load_model(resolve(wrong))))


@pytest.mark.parametrize(
    ("changes", "key", "why", "hint"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules", "LoRA on model.embed_tokens, which is an embedding", "merge"),
        ({"target_modules": r".*\.(q_proj|embed_tokens)"}, "target_modules", "LoRA on model.embed_tokens, which is an embedding", "merge"),
        ({"target_modules": ["W_pack"]}, "target_modules", "no module of this model is a target named W_pack", "its modules: q_proj"),
        ({"modules_to_save": ["score"]}, "modules_to_save", "the base has no module named score", "another base"),
    ],
)
def test_what_an_adapter_has_elsewhere_is_refused_by_file_and_module(
    changes: dict[str, Any], key: str, why: str, hint: str, tmp_path: Path
) -> None:
    """Caught: `target_modules: no module of this model is a target named embed_tokens`, of no file, with the base's modules for a hint."""
    base = make_base(tmp_path / "base")
    path = make_adapter(tmp_path / "adapter", str(base))
    (path / names.ADAPTER_CONFIG).write_text(json.dumps({**ADAPTER, "base_model_name_or_path": str(base), **changes}))
    error = refused(resolve(path).tuning)
    assert error.where == f"{path / names.ADAPTER_CONFIG}: {key}" and why in error.what and hint in error.hint


def test_adapters_add_up_and_only_those_of_the_same_base(tmp_path: Path) -> None:
    """A02 at run time: y + sum of w_i (adapter_i - y)."""
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=1)
    first, second = add_step(tmp_path / "out", 1, base), add_step(tmp_path / "out", 2, base)
    foreign = add_step(tmp_path / "foreign", 3, other)
    peft = make_adapter(tmp_path / "peft", "", seed=4)  # says nothing about its base
    with torch.no_grad():
        together = load_model(resolve(first), adapters=[(resolve(second), 0.5), (resolve(peft, base_dir=base), -1.0)])(tokens())
        model = load_base(resolve(base))
        for name, host in model.named_modules():
            for path, weight in ((first, 1.0), (second, 0.5), (peft, -1.0)):
                tensors = read_adapter(resolve(path, base_dir=base))
                a, b = (tensors.get(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
                if a is not None and b is not None:
                    host.weight = torch.nn.Parameter(host.weight + weight * 2 * b @ a)  # type: ignore[operator]
        assert (together - model(tokens())).abs().max() < 1e-4
    error = refused(lambda: load_model(resolve(first), adapters=[(resolve(foreign), 1.0)]))
    assert "was not trained on" in str(error)
    assert error.where == str(foreign)
    assert "only adapters can be added" in str(refused(lambda: load_model(resolve(first), adapters=[(resolve(base), 1.0)])))


def test_the_wrong_base_is_never_loaded(tmp_path: Path) -> None:
    """A02, all the way to the model."""
    step = add_step(tmp_path / "out", 1, make_base(tmp_path / "base"))
    wrong = make_base(tmp_path / "wrong", seed=1)
    assert "was not trained on" in str(refused(lambda: load_model(resolve(step, base_dir=wrong))))


def test_a_model_saved_as_a_step_loads_as_itself(tmp_path: Path) -> None:
    """Method `full`: a step that is a whole model, in any dtype, scalars and empty tensors included."""
    model = load_model(resolve(make_base(tmp_path / "base")), dtype=torch.bfloat16)
    files = {names.CONFIG: json.dumps(CONFIG).encode(), **serving_files(tmp_path / "base", "{{ messages }}")}
    step = commit_step(tmp_path, manifest_of(1, method="full"), tensors={names.WEIGHTS: raw_tensors(model.state_dict())}, files=files)
    again = GPT.from_pretrained(step)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert next(again.parameters()).dtype == torch.bfloat16
    assert (step / names.CHAT_TEMPLATE).read_text() == "{{ messages }}"
    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "column": torch.arange(6.0).view(2, 3).T, "flags": torch.tensor([True])}
    write_safetensors(tmp_path / "odd.safetensors", raw_tensors(odd), {})
    from safetensors.torch import load_file

    assert all(torch.equal(load_file(tmp_path / "odd.safetensors")[name], tensor) for name, tensor in odd.items())


def test_a_real_model_gives_the_logits_of_its_reference() -> None:
    """A published Llama, from its directory as it was downloaded: logits of the last position, by transformers."""
    path = shared_data("models/stories3m-llama")
    reference = json.loads((path / "reference.json").read_text())
    model = load_model(resolve(path)).eval()
    with torch.no_grad():
        ours = model(torch.tensor([reference["prompt_ids"]]))[0, -1]
    assert (ours - torch.tensor(reference["last_logits"])).abs().max() <= 1e-4


# ---- the optimizer's state -------------------------------------------------------------------------------------------


def tuning_on(base: Path) -> Tuning:
    return from_peft(adapter_config_from_peft(ADAPTER, "adapter_config.json"), resolve(base).config())


def trained(tmp_path: Path, steps: int) -> tuple[GPT, torch.optim.AdamW]:
    """The adapter of a tiny model after some updates, the same for the same number."""
    base = tmp_path / "base" if (tmp_path / "base").exists() else make_base(tmp_path / "base")
    model = load_base(resolve(base))
    attach(model, tuning_on(base), seed=0)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    go_on(model, optimizer, 0, steps)
    return model, optimizer


def go_on(model: GPT, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    for step in range(start, end):
        ids = random_tokens(2, 9, seed=step, vocab_size=CONFIG["vocab_size"])
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shuffled", [False, True])
def test_training_goes_on_to_the_bit_from_a_saved_state(tmp_path: Path, shuffled: bool) -> None:
    """R01's part here: weights and optimizer after 3 + 4 updates equal those after 7. Mutation: not restoring `step` is seen."""
    torch.manual_seed(0)
    whole, whole_optimizer = trained(tmp_path, 7)
    model, optimizer = trained(tmp_path, 3)
    values = {"position": {"step": 3, "best": math.inf}, "lr": 0.1 + 0.2, "names": ["é", "\u2028"]}
    base = BaseRecord(path=str(tmp_path / "base"), model_type="llama", fingerprint=resolve(tmp_path / "base").fingerprint())
    files = {names.ADAPTER_CONFIG: json.dumps({**ADAPTER, "base_model_name_or_path": base.path}).encode()}
    tensors = {names.ADAPTER_WEIGHTS: raw_tensors(tuned_state(model, tuning_on(tmp_path / "base"), model.config))}
    state = save_state(optimizer, trainable(model), values, {})
    step = commit_step(tmp_path, manifest_of(3, base), tensors=tensors, files=files, state=state)
    go_on(model, optimizer, 3, 5)  # what was saved shares no memory with what goes on
    again = load_base(resolve(tmp_path / "base"))
    attach(again, tuning_on(tmp_path / "base"), seed=1)
    load_tuned_state(again, tuning_on(tmp_path / "base"), read_adapter(resolve(step)), step, again.config)
    parameters = trainable(again)
    order = list(reversed(parameters.values())) if shuffled else list(parameters.values())
    fresh = torch.optim.AdamW(order, lr=1e-2)
    assert load_state(resolve(step), fresh, parameters, {}) == values
    assert resolve(step).training_values() == values
    go_on(again, fresh, 3, 7)
    for (name, ours), theirs in zip(parameters.items(), trainable(whole).values(), strict=True):
        assert torch.equal(ours, theirs), name
        want = whole_optimizer.state[theirs]
        assert fresh.state[ours].keys() == want.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, want[key]) and value.dtype == want[key].dtype for key, value in fresh.state[ours].items())


def test_the_state_of_another_optimizer_or_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path, 2)
    base = BaseRecord(path=str(tmp_path / "base"), model_type="llama", fingerprint=resolve(tmp_path / "base").fingerprint())
    files = {names.ADAPTER_CONFIG: json.dumps({**ADAPTER, "base_model_name_or_path": base.path}).encode()}
    tensors = {names.ADAPTER_WEIGHTS: raw_tensors(tuned_state(model, tuning_on(tmp_path / "base"), model.config))}
    step = resolve(
        commit_step(tmp_path, manifest_of(2, base), tensors=tensors, files=files, state=save_state(optimizer, trainable(model), {}, {}))
    )
    parameters = trainable(model)
    assert "was saved by AdamW" in str(refused(lambda: load_state(step, torch.optim.SGD(parameters.values(), lr=1), parameters, {})))
    fewer = dict(list(parameters.items())[1:])
    assert "parameters" in str(refused(lambda: load_state(step, torch.optim.AdamW(fewer.values()), fewer, {})))
    wider = {**parameters, next(iter(parameters)): torch.nn.Parameter(torch.zeros(9, 24))}
    optimizer = torch.optim.AdamW(wider.values())
    assert "does not fit the model" in str(refused(lambda: load_state(step, optimizer, wider, {})))
    assert not optimizer.state
    (step.path / names.TRAINING_STATE).write_bytes(b"x" + (step.path / names.TRAINING_STATE).read_bytes()[1:])
    assert names.TRAINING_STATE in str(refused(lambda: load_state(step, torch.optim.AdamW(parameters.values()), parameters, {})))
    for name in (names.TRAINING_STATE, names.TRAINING_STATE_META):
        (step.path / name).unlink()
    assert "has no training state" in str(refused(lambda: load_state(step, torch.optim.AdamW(parameters.values()), parameters, {})))


def test_what_a_step_holds_rounded_comes_back_to_the_bit(tmp_path: Path) -> None:
    """R01: a 16-bit model's fp32 masters, PiSSA's start. Mutations: not copying them back; not noticing that the step has others."""
    model, optimizer = trained(tmp_path, 2)
    parameters = trainable(model)
    generator = torch.Generator().manual_seed(1)
    exact = {name: torch.randn(shape, generator=generator) for name, shape in (("w", (3, 5)), ("a.start_A", (2,)), ("tiny", ()))}
    record = BaseRecord(path=str(tmp_path / "base"), model_type="llama", fingerprint=resolve(tmp_path / "base").fingerprint())
    state = save_state(optimizer, parameters, {"a": 1}, exact)
    files = {names.ADAPTER_CONFIG: json.dumps(ADAPTER).encode()}
    step = resolve(commit_step(tmp_path, manifest_of(2, record), tensors={names.ADAPTER_WEIGHTS: {}}, files=files, state=state))
    found = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    fresh = torch.optim.AdamW(parameters.values(), lr=1e-2)
    assert load_state(step, fresh, parameters, found) == {"a": 1}
    assert all(torch.equal(found[name], tensor) for name, tensor in exact.items())
    assert all(torch.equal(fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in parameters.values())
    for wrong in ({}, {**found, "more": torch.zeros(1)}, {**found, "w": torch.zeros(5, 3)}):
        untouched = torch.optim.AdamW(parameters.values(), lr=1e-2)
        error = refused(lambda wrong=wrong, untouched=untouched: load_state(step, untouched, parameters, wrong))
        assert "other tensors" in str(error)
        assert names.TRAINING_STATE in str(error)
        assert not untouched.state


def test_an_optimizer_that_has_not_stepped_has_a_state_too(tmp_path: Path) -> None:
    model, optimizer = trained(tmp_path, 0)
    state = save_state(optimizer, trainable(model), {"a": 1}, {})
    assert not state.tensors
    assert state.values[VALUES] == {"a": 1}


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    base = BaseRecord(path="/models/ü b", model_type="llama", fingerprint="xxh3:" + "a" * 32, relative="../base")
    manifest = manifest_of(7, base, val_loss=0.1 + 0.2, train_loss=None, parent="/out/step-3", epoch=1 / 3)
    step = commit_step(tmp_path, manifest, tensors={}, files={"a.txt": b"a"})
    found = read_manifest(step)
    assert replace(found, files={}) == manifest
    assert list(found.files) == ["a.txt"]
    assert found.files["a.txt"].size == 1
    with pytest.raises(AssertionError):
        manifest_of(7, val_loss=math.nan).encode()


WORD = st.text(max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORD
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(WORD, LEAF, max_size=3)
FIELDS = st.sampled_from([*Manifest.__dataclass_fields__, "sha256", "x"])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(WORD, JSON, max_size=5))
def test_whatever_is_sealed_is_unsealed_the_same(values: dict[str, Any]) -> None:
    """Z01: any JSON; lone surrogates are no text and are left to the next test."""
    values = {**json.loads(json.dumps(values)), "format_version": 1}
    values.pop("sha256", None)
    try:
        raw = seal(values)
    except UnicodeEncodeError:
        return
    assert unseal(raw, Path("x")) == values


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | st.dictionaries(FIELDS, JSON, max_size=8).map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_the_manifest_reader_fail_otherwise_than_by_refusing(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """Z01: manifests, sealed and not."""
    step = tmp_path_factory.getbasetemp() / "fuzzed"
    step.mkdir(exist_ok=True)
    for contents in (raw, resealed(raw)):
        (step / names.MANIFEST).write_bytes(contents)
        with pytest.raises(UserError):
            read_manifest(step)
        assert read_step(step).faults


def resealed(raw: bytes) -> bytes:
    """The same with a right seal: what somebody else would have to write to get past it."""
    try:
        values = json.loads(raw)
        return seal({**{key: value for key, value in values.items() if key != "sha256"}, "format_version": 1, "step": "x"})
    except (ValueError, TypeError, AttributeError):
        return raw


def test_json_of_any_depth_or_doubled_keys_is_refused(tmp_path: Path) -> None:
    """Z01."""
    for raw in (b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"\xff\xfe", b"", b"null", b"[]", b"1e999999"):
        (tmp_path / names.MANIFEST).write_bytes(raw)
        refused(lambda: read_manifest(tmp_path))


# ---- the model card --------------------------------------------------------------------------------------------------


def card(here: str = "out/step-100", **changes: Any) -> str:
    base = BaseRecord(path="/models/my base", model_type="llama", fingerprint="xxh3:" + "a" * 32)
    return model_card(manifest_of(100, **{"base": base, "val_loss": 0.5, **changes}), here)


def commands_in(text: str, language: str) -> list[str]:
    blocks = text.split(f"```{language}\n")[1:]
    return [line for block in blocks for line in block.split("```")[0].splitlines()]


def test_a_card_does_not_name_peft_where_peft_computes_something_else() -> None:
    """A04, families with experts: PEFT 0.21 takes a plain MLP's matrices for the experts'. Caught: attention alone refused as well."""
    for family, targets, is_misread in (
        ("deepseek_v3", ["all-linear"], True),
        ("deepseek_v3", ["kv_b_proj", "o_proj"], False),
        ("qwen3_moe", ["all-linear"], True),
        ("mixtral", ["all-linear", "w1", "w2", "w3"], False),
        ("llama", ["all-linear"], False),
    ):
        config = tiny_config(family)
        why = why_misread(tuning_of(LoRAOptions(r=4, target_modules=targets), config), config)
        assert bool(why) is is_misread, (family, targets, why)
    text = model_card(
        manifest_of(100, base=BaseRecord(path="/models/my base", model_type="llama", fingerprint="xxh3:" + "a" * 32)), misread="so"
    )
    assert "PEFT reads it, and computes something else: so." in text and "PeftModel" not in text and "vllm" not in text


def test_a_card_names_only_loaders_that_work() -> None:
    """DESIGN decision 4: vLLM has no DoRA, and takes certain ranks only; a whole model needs no PEFT."""
    assert "## vLLM" in card()
    assert "--max-lora-rank 8 " in card()
    assert "## PEFT" in card()
    for options, rank in (
        ({"r": 8}, "8 "),
        ({"r": 9}, "16 "),
        ({"r": 512}, "512 "),
        ({"r": 513}, None),
        ({"r": 8, "use_dora": True}, None),
    ):
        text = card(options=options)
        assert ("## vLLM" in text) == (rank is not None)
        assert rank is None or f"--max-lora-rank {rank}" in text
        assert "## PEFT" in text
        assert "litlora merge_lora" in text
    whole = card(base=None, method="full")
    assert "## transformers" in whole
    assert "PEFT" not in whole
    assert "vLLM" not in whole
    assert "merge" not in whole
    assert "xxh3:aaaa" in card()
    assert "validation loss 0.5000" in card()
    assert "toy" not in card()
    assert "toy model" in card(base=BaseRecord(path="demo", model_type="llama", fingerprint="xxh3:"))


@pytest.mark.parametrize("here", ["out/step-100", "a b/step-1", "-rf", "$(touch x);'\"`", "out\\step"])
def test_a_cards_commands_are_whole_words_of_a_shell_and_its_python_is_python(here: str) -> None:
    """S06: a path is one word, whatever is in it."""
    text = card(here)
    lines = commands_in(text, "sh")
    words = [shlex.split(line) for line in lines]
    assert all(any(Path(word) == Path(here) or word.endswith(f"={here}") for word in line) for line in words), words
    compile("\n".join(commands_in(text, "python")), "card", "exec")
    from litlora import options, parsing

    for line in words:
        if line[0] == "litlora":
            kind = {"chat": options.Chat, "generate": options.Generate, "merge_lora": options.MergeLoRA}[line[1]]
            assert Path(parsing.parse(kind, line[2:], command=line[1]).checkpoint_dir) == Path(here)


def test_a_cards_python_loads_the_step(tmp_path: Path) -> None:
    """The PEFT block as it stands, run (the tokenizer's line needs a real tokenizer and is left out)."""
    base = make_base(tmp_path / "base")
    step = add_step(tmp_path / "out", 100, base)
    lines = commands_in(model_card(read_manifest(step), str(step)), "python")
    scope: dict[str, Any] = {}
    source = "\n".join(line for line in lines if not line.startswith("tokenizer"))
    exec(compile(source, "card", "exec"), scope)  # our own text
    with torch.no_grad():
        want = load_model(resolve(step)).eval()(tokens())
        assert (scope["model"].eval()(tokens()).logits - want).abs().max() <= 1e-5 * max(1, want.abs().max())


def test_serving_files_come_from_the_directory_itself(tmp_path: Path) -> None:
    """S04: a link out of a downloaded directory is not copied into a step."""
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / names.TOKENIZER_CONFIG).symlink_to(tmp_path / "secret")
    assert "is a link out of its directory" in str(refused(lambda: serving_files(base, "")))
    (base / names.TOKENIZER_CONFIG).unlink()
    assert serving_files(base, "x").keys() == {names.TOKENIZER, names.CHAT_TEMPLATE}


def test_the_samples_of_these_tests_are_what_they_say(tmp_path: Path) -> None:
    """The whole chain once: base, step, copy, load."""
    step = add_step(tmp_path / "out", 1, make_base(tmp_path / "base"))
    assert read_step(copy(step, tmp_path / "copied")).is_whole
    typed: Tensors = adapter_tensors()
    assert len(typed) == 12
