"""What a path means, what is refused before it is opened, and whose base an adapter is on (YARDSTICK A02, F13, S01, S04)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import CONFIG, add_step, base_tensors, copy, flip, make_adapter, make_base, manifest_of

from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_step
from litlora.checkpoint.fingerprint import TensorHash, cache_path, combine, fingerprint
from litlora.checkpoint.resolve import best_of, demo_base, kind_of, list_step_paths, list_steps, resolve, whole_steps, why_best
from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile, write_safetensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def make_full(run: Path, step: int, seed: int = 0) -> Path:
    """A step of method `full`: a whole model with our manifest."""
    run.mkdir(parents=True, exist_ok=True)
    files = {names.CONFIG: json.dumps(CONFIG).encode(), names.TOKENIZER: b"{}"}
    return commit_step(run, manifest_of(step, method="full", val_loss=1.0), tensors={names.WEIGHTS: base_tensors(seed)}, files=files)


# ---- what a path means -----------------------------------------------------------------------------------------------


def test_each_kind_of_directory_is_recognised(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    sharded = make_base(tmp_path / "sharded", shards=3)
    step = add_step(tmp_path / "out", 100, base)
    adapter = make_adapter(tmp_path / "adapter", str(base))
    full = make_full(tmp_path / "pretrained", 5)
    merged = copy(base, step / names.MERGED)
    (merged / names.MERGE_REPORT).write_text("{}")
    for path, kind, is_model in (
        (base, "base", True), (sharded, "base", True), (step, "step", False), (adapter, "adapter", False), (full, "step", True),
        (merged, "base", True),
    ):  # fmt: skip
        found = resolve(path)
        assert (found.path, found.kind, found.is_model, found.why) == (path, kind, is_model, "")
        assert (found.manifest is not None) == (kind == "step")
        assert found.config().hidden_size == 24
        assert found.shards().keys() == base_tensors().keys()
        assert found.tokenizer_dir() == (base if kind == "adapter" else path)
    assert resolve(adapter).adapter_config().r == 3
    with pytest.raises(UserError, match="whole model, not an adapter"):
        resolve(base).tuning()


def test_a_run_is_its_best_step_by_validation_loss_else_its_newest(tmp_path: Path) -> None:
    run = tmp_path / "out"
    for step, loss in ((9, 0.9), (10, 0.5), (200, 0.7), (300, None)):
        add_step(run, step, val_loss=loss)
    found = resolve(run)
    assert found.path == run / "step-10"
    assert found.why == f"lowest validation loss (0.5000) of 3 in {run}"
    newest = tmp_path / "newest"
    for step in (9, 10):
        add_step(newest, step)
    assert resolve(newest).path == newest / "step-10"
    assert resolve(newest).why == f"newest of 2 in {newest}"
    assert [step.number for step in list_steps(run)] == [9, 10, 200, 300]
    flip(run / "step-9" / names.README, 3)
    assert [step.number for step in whole_steps(run)] == [10, 200, 300]


def test_only_steps_that_were_compared_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`of N` is how many losses there were: without torn steps, and those that were never validated. Caught: every directory counted."""
    run = tmp_path / "out"
    for step, loss in ((9, 0.9), (10, 0.5), (20, 0.4), (200, 0.7), (300, None)):
        add_step(run, step, val_loss=loss)
    flip(run / "step-20" / names.ADAPTER_WEIGHTS, 900)
    (run / "step-9" / names.MANIFEST).unlink()
    told = f"lowest validation loss (0.5000) of 2 in {run}"
    assert resolve(run).why == told
    steps = list_steps(run)
    best = best_of(steps)
    assert best is not None and why_best(best, run, steps) == told
    assert resolve(run / "last").why == f"newest of 5 in {run}"
    flip(run / "step-300" / names.ADAPTER_WEIGHTS, 900)
    assert resolve(run / "last").why == f"newest of 4 in {run}"


def test_the_best_and_the_last_step_of_a_run_have_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN/best and RUN/last, chosen as RUN is: torn ones passed over, and named. What really has such a name is itself."""
    run = tmp_path / "out"
    for step, loss in ((9, 0.9), (10, 0.5), (200, 0.7), (300, None)):
        add_step(run, step, val_loss=loss)
    assert resolve(run / "best").path == resolve(run).path == run / "step-10"
    assert resolve(run / "best").why == f"lowest validation loss (0.5000) of 3 in {run}"
    assert (resolve(run / "last").path, resolve(run / "last").why) == (run / "step-300", f"newest of 4 in {run}")
    flip(run / "step-300" / names.ADAPTER_WEIGHTS, 900)
    flip(run / "step-10" / names.ADAPTER_WEIGHTS, 900)
    assert resolve(run / "last").path == resolve(run / "best").path == run / "step-200"
    assert resolve(run / "last").why == f"newest of 3 in {run}"
    told = capsys.readouterr().err
    assert "step-300 is torn" in told and "step-10 is torn" in told
    add_step(tmp_path / "unmeasured", 3)
    assert "no step of it has a validation loss" in refusal(tmp_path / "unmeasured" / "best")
    assert resolve(tmp_path / "unmeasured" / "last").path == tmp_path / "unmeasured" / "step-3"
    (add_step(tmp_path / "unmeasured", 4) / names.MANIFEST).unlink()
    assert "no step of it has a validation loss" in refusal(tmp_path / "unmeasured" / "best")
    (tmp_path / "unmeasured" / "step-3" / names.MANIFEST).unlink()
    assert "none of its 2 checkpoints is whole" in refusal(tmp_path / "unmeasured" / "best")
    base = make_base(run / "best")
    assert resolve(run / "best").path == base
    assert "there is no such directory" in refusal(base / "last")  # of no run


def test_what_other_programs_write_is_known_by_name_and_has_a_command(tmp_path: Path) -> None:
    """S01: nothing of it is opened. A trainer's own state is no model."""
    for name, files, what, target in (
        ("litgpt", ["lit_model.pth", "model_config.yaml", "tokenizer.json"], "a LitGPT checkpoint", "hf"),
        ("lora", ["lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"], "an adapter of LitGPT", "peft"),
        ("peft", ["adapter_config.json", "adapter_model.bin"], "a PEFT adapter whose weights are pickled", "peft"),
        ("live", ["adapter_config.json", "adapter_model.pt"], "a PEFT adapter whose weights are pickled", "peft"),
        ("bin", ["config.json", "pytorch_model.bin"], "a directory of pickled weights", "hf"),
    ):
        place = tmp_path / name
        place.mkdir()
        for file in files:
            (place / file).write_bytes(b"")
        text = refusal(place)
        assert what in text and f"litlora convert {place} --to {target} --out_dir DIR" in text and "can run code" in text
    assert "pickled weights" in refusal(tmp_path / "litgpt" / "lit_model.pth")
    for name, files, needed in (  # what convert does not read either: no command that only says the same again
        ("half", ["lit_model.pth"], "reads lit_model.pth where model_config.yaml lies beside it"),
        ("lonely", ["pytorch_model.bin"], "reads pytorch_model.bin where config.json lies beside it"),
        ("meta", ["consolidated.00.pth", "params.json"], "use a copy in safetensors format"),
        ("bottlenecks", ["lit_model.pth.adapter", "model_config.yaml"], "use a copy in safetensors format"),
    ):
        place = tmp_path / name
        place.mkdir()
        for file in files:
            (place / file).write_bytes(b"")
        for path in (place, place / files[0]):
            text = refusal(path)
            assert needed in text and f"litlora convert {place}" not in text and "can run code" in text
    trainer = tmp_path / "trainer"
    trainer.mkdir()
    (trainer / "training_args.bin").write_bytes(b"")
    assert "is neither a model, nor a checkpoint, nor a run" in refusal(trainer)
    torn = tmp_path / "out" / "step-3.torn"
    torn.mkdir(parents=True)
    assert "a torn step that was set aside" in refusal(torn)
    left = tmp_path / "out" / ".tmp-step-4-99999999"
    left.mkdir()
    assert "half-written: process 99999999 died" in refusal(left)


def test_what_was_chosen_is_said_wherever_a_path_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, by the one function that every command asks; a path that names a step itself needs no words."""
    for step, loss in ((9, 0.9), (10, 0.5)):
        add_step(tmp_path / "out", step, val_loss=loss)
    for path in ("out", "out/best"):
        resolve(tmp_path / path)
        assert capsys.readouterr().err == f"{tmp_path}/out/step-10: lowest validation loss (0.5000) of 2 in {tmp_path}/out\n"
    resolve(tmp_path / "out" / "step-9")
    assert capsys.readouterr().err == ""


def test_other_names_in_a_run_are_no_steps(tmp_path: Path) -> None:
    """F09: step-9 comes before step-10, and foreign names are left alone."""
    for name in ("step-10", "step-9", "step-010", "step-", "step-1x", "step--1", "Step-3", ".tmp-step-4-1", "step-5.torn", "step-\u0663"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "step-7").write_text("a file")
    assert [path.name for path in list_step_paths(tmp_path / "out")] == ["step-9", "step-10"]
    assert names.step_number("a/b/step-0") == 0


def test_no_path_is_the_run_in_out_else_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = make_base(tmp_path / "toy")
    monkeypatch.setattr(names, "DEMO_BASE", base)
    assert resolve().path == base
    assert resolve().is_demo
    assert "no path was given" in resolve().why
    Path("out").mkdir()
    assert resolve().is_demo
    add_step(Path("out"), 3)
    assert resolve().path == Path("out/step-3")
    assert resolve().why == "newest in out"
    assert resolve("demo").path == base
    assert resolve("demo").why == ""
    copy(base, Path("demo"))
    assert resolve("demo").path == Path("demo")
    assert not resolve("demo").is_demo
    monkeypatch.setattr(names, "DEMO_BASE", tmp_path / "gone")
    with pytest.raises(UserError, match="missing from this installation"):
        demo_base()


def refusal(path: str | Path) -> str:
    with pytest.raises(UserError) as refused:
        resolve(path)
    assert refused.value.exit_code == 2
    return refused.value.report()


def test_a_path_that_is_nothing_says_what_is_there_what_is_missing_and_what_is_near(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "out"
    add_step(run, 100)
    add_step(run, 200)
    base = make_base(tmp_path / "models" / "llama-small")
    assert f"did you mean {run / 'step-200'}?" in refusal(run / "step-250")
    assert f"did you mean {run}?" in refusal(tmp_path / "runs" / "ouut")
    assert f"did you mean {base}?" in refusal(tmp_path / "models" / "lama-small")
    assert f"did you mean {run}?" in refusal(tmp_path / "runs")
    assert "is a file" in refusal(base / names.WEIGHTS)
    assert f"give its directory: {base}" in refusal(base / names.WEIGHTS)
    assert "litlora download org/name" in refusal("org/name")
    assert "litlora download ORG/name" in refusal("models/name")  # where a download would have put it
    assert "download" not in refusal("nowhere/step-3")  # Caught: a step that is not there looked for on a hub
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "found: nothing" in refusal(empty)
    assert "missing: config.json and model.safetensors" in refusal(empty)
    half = copy(base, tmp_path / "half")
    (half / names.WEIGHTS).unlink()
    text = refusal(half)
    assert "found: config.json, tokenizer.json" in text
    assert "missing: model.safetensors or model.safetensors.index.json" in text
    copy(base, tmp_path / "no-config")
    (tmp_path / "no-config" / names.CONFIG).unlink()
    assert "missing: config.json, for a model" in refusal(tmp_path / "no-config")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    (adapter / names.ADAPTER_WEIGHTS).unlink()
    assert "missing: adapter_model.safetensors, for an adapter" in refusal(adapter)
    (run / "step-300").mkdir()
    assert "step-200" in refusal(run / "step-300")
    started = tmp_path / "started"
    started.mkdir()
    (started / names.RUN_YAML).write_text("a: 1")
    assert "a run without a checkpoint yet" in refusal(started)
    for odd in ("\0", "a" * 300, "a/" * 3000, "-rf", "$(touch exploded)", "a\nb"):
        assert "there is no such directory" in refusal(odd) or "cannot be looked at" in refusal(odd)


def test_a_path_that_is_not_there_always_says_what_could_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: nothing said where nothing is near; a run's step, the models' folder and the demo not thought of; a hub's name sent to
    whatever run lies here."""
    monkeypatch.chdir(tmp_path)
    needed = "hint: give the directory of a model, a run or a step, or demo; litlora download ORG/NAME fetches a model"
    for path in ("nowhere", "a/b/nowhere", str(tmp_path / "nowhere")):
        assert refusal(path).endswith(needed)
    assert refusal("out").endswith("hint: litlora finetune lora begins a run there")
    assert refusal("nowhere/step-3").endswith("hint: litlora list RUN names the steps of a run")
    assert refusal("demi").endswith("hint: did you mean demo?")
    make_base(tmp_path / "models" / "llama-small")
    for path in ("llama-small", "lama-smal"):
        assert refusal(path).endswith("hint: did you mean models/llama-small?")
    add_step(Path("out"), 100)
    for path in ("step-100", "nowhere/step-100"):
        assert refusal(path).endswith("hint: did you mean out/step-100?")
    assert refusal("nowhere").endswith("hint: the nearest checkpoint is out")
    assert refusal("org/name").endswith("litlora download org/name")
    assert refusal("org/demo").endswith("litlora download org/demo")


def test_a_model_and_an_adapter_in_one_directory_are_refused(tmp_path: Path) -> None:
    """transformers would ignore the one or apply the other: it cannot be told what is meant."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", str(base))
    for name in (names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS):
        (base / name).write_bytes((adapter / name).read_bytes())
    assert "holds a model and an adapter at once" in refusal(base)


def test_a_step_without_its_manifest_is_torn_and_not_a_plain_adapter(tmp_path: Path) -> None:
    """F03: as a PEFT adapter it would be accepted on any base."""
    step = add_step(tmp_path / "out", 100)
    (step / names.MANIFEST).unlink()
    assert "litlora.json is missing" in refusal(step)
    moved = step.rename(tmp_path / "mine")
    assert kind_of(moved) == "step"
    assert "litlora.json is missing" in refusal(moved)


def test_weights_that_were_put_beside_a_step_are_never_used(tmp_path: Path) -> None:
    """F03: what the manifest does not cover is not part of the checkpoint."""
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=3)
    step, full = add_step(tmp_path / "out", 100, base), make_full(tmp_path / "pretrained", 5)
    for name in (names.CONFIG, names.WEIGHTS):
        (step / name).write_bytes((other / name).read_bytes())
    assert not resolve(step).is_model
    assert resolve(step).base().path == base
    sharded = make_full(tmp_path / "sharded", 5)
    assert resolve(full).shards()
    assert resolve(sharded).shards()
    manifest = manifest_of(6, method="full")
    files = {path.name: path.read_bytes() for path in make_base(tmp_path / "parts", shards=2).iterdir()}
    split = commit_step(tmp_path / "sharded", manifest, tensors={}, files=files)
    assert len(set(resolve(split).shards().values())) == 2
    (split / names.WEIGHTS).write_bytes((other / names.WEIGHTS).read_bytes())
    with pytest.raises(UserError, match="was not committed with this checkpoint"):
        resolve(split).shards()


def test_a_whole_step_under_another_name_is_still_a_step(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    moved = add_step(tmp_path / "out", 100, base).rename(tmp_path / "best")
    assert resolve(moved).kind == "step"
    assert resolve(moved).base().path == base


# ---- the base of an adapter ------------------------------------------------------------------------------------------


def test_other_weights_of_the_same_shape_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    """A02. Mutation: with `check_fingerprint` gone, or comparing shapes only, the wrong base is accepted."""
    base, wrong = make_base(tmp_path / "base", seed=1), make_base(tmp_path / "wrong", seed=2)
    step = add_step(tmp_path / "out", 100, base)
    right = resolve(base).fingerprint()
    assert resolve(step).base().path == base
    assert resolve(step).fingerprint() == right
    with pytest.raises(UserError, match="was not trained on") as refused:
        resolve(step, base_dir=wrong).base()
    assert right in refused.value.report()
    assert resolve(wrong).fingerprint() in refused.value.report()
    flip(base / names.WEIGHTS, 8 * ((base / names.WEIGHTS).stat().st_size - 5))  # one bit of one weight
    with pytest.raises(UserError, match="was not trained on"):
        resolve(step).base()


def test_a_renamed_or_resharded_base_is_accepted(tmp_path: Path) -> None:
    """A02, and a moved base: --base_dir, or base and run moved together."""
    base = make_base(tmp_path / "project" / "base")
    step = add_step(tmp_path / "project" / "out", 100, base)
    for shards in (2, 5):
        other = make_base(tmp_path / f"shards{shards}", shards=shards)
        assert resolve(step, base_dir=other).base().path == other
    (tmp_path / "project").rename(tmp_path / "moved")
    step = tmp_path / "moved" / "out" / "step-100"
    assert resolve(step).base().path.resolve() == tmp_path / "moved" / "base"
    (tmp_path / "moved" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"its base is not there: .*An adapter holds no base weights") as refused:
        resolve(step).base()
    assert str(base) in str(refused.value)
    assert "--base_dir" in refused.value.hint
    assert resolve(step, base_dir=tmp_path / "elsewhere").base().path == tmp_path / "elsewhere"


def test_where_the_recorded_path_holds_another_model_now_the_one_beside_the_run_is_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "project" / "base", seed=1)
    step = add_step(tmp_path / "project" / "out", 100, base)
    (tmp_path / "project").rename(tmp_path / "moved")
    make_base(base, seed=2)
    assert resolve(tmp_path / "moved" / "out" / step.name).base().path.resolve() == tmp_path / "moved" / "base"


def test_an_adapter_is_never_a_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    step = add_step(tmp_path / "out", 100, base)
    with pytest.raises(UserError, match="the base of an adapter is a whole model"):
        resolve(step, base_dir=step).base()
    with pytest.raises(UserError, match="no such directory"):
        resolve(step, base_dir=tmp_path / "nowhere").base()
    adapter = make_adapter(tmp_path / "own", ".")  # names itself
    with pytest.raises(UserError, match="its base is not there"):
        resolve(adapter).base()


def test_a_full_step_is_its_own_base_and_can_be_one(tmp_path: Path) -> None:
    full = make_full(tmp_path / "pretrained", 5)
    assert resolve(full).base().path == full
    step = add_step(tmp_path / "out", 100, full)
    assert resolve(step).base().path == full
    assert resolve(step, base_dir=tmp_path / "pretrained").base().path == full  # a run of whole models will do


def test_a_peft_adapter_finds_its_base_absolute_relative_or_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for name, recorded in (("absolute", str(base)), ("relative", "../base")):
        found = resolve(make_adapter(tmp_path / name, recorded))
        assert found.base().path.resolve() == base
    hub = resolve(make_adapter(tmp_path / "hub", "org/llama"))
    with pytest.raises(UserError, match="its base is not there: org/llama") as refused:
        hub.base()
    assert "download org/llama" in refused.value.hint
    assert resolve(tmp_path / "hub", base_dir=base).base().path == base
    nameless = make_adapter(tmp_path / "nameless", "")
    with pytest.raises(UserError, match="does not say which base"):
        resolve(nameless).base()


def test_the_demo_base_is_recorded_by_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation elsewhere has it elsewhere."""
    monkeypatch.setattr(names, "DEMO_BASE", make_base(tmp_path / "here"))
    step = add_step(tmp_path / "out", 100, names.DEMO_BASE)
    assert resolve(step).manifest.base.path == "demo"  # type: ignore[union-attr]
    monkeypatch.setattr(names, "DEMO_BASE", make_base(tmp_path / "there"))
    assert resolve(step).base().path == tmp_path / "there"
    assert resolve(step).base().is_demo
    monkeypatch.chdir(tmp_path)
    for make in (lambda: Path("demo").mkdir(), lambda: make_base(Path("demo"), seed=8)):  # a folder of that name is not meant
        shutil.rmtree("demo", ignore_errors=True)
        make()
        assert resolve(step).base().path == tmp_path / "there"
    monkeypatch.setattr(names, "DEMO_BASE", make_base(tmp_path / "changed", seed=9))
    with pytest.raises(UserError, match="was not trained on"):
        resolve(step).base()


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_covers_name_dtype_shape_and_every_byte(tmp_path: Path) -> None:
    """A02: each of them, and nothing else."""
    one = {"a": ("F32", (2, 3), bytes(range(24))), "b": ("BF16", (2,), b"abcd")}
    variants = [
        one,
        {"c": one["a"], "b": one["b"]},
        {"aa": one["a"], "b": one["b"]},  # the same order
        {"a": ("I32", (2, 3), bytes(range(24))), "b": one["b"]},
        {"a": ("F32", (3, 2), bytes(range(24))), "b": one["b"]},
        {"a": ("F32", (2, 3), bytes([*range(23), 24])), "b": one["b"]},
        {"a": one["a"]},
        {**one, "empty": ("F32", (0,), b"")},
    ]
    prints = []
    for number, tensors in enumerate(variants):
        write_safetensors(tmp_path / f"{number}.safetensors", tensors, {"made": str(number)})
        prints.append(fingerprint(dict.fromkeys(tensors, tmp_path / f"{number}.safetensors")))
    assert len(set(prints)) == len(variants)
    write_safetensors(tmp_path / "again.safetensors", one, {"made": "later"})
    assert fingerprint(dict.fromkeys(one, tmp_path / "again.safetensors")) == prints[0]
    assert prints[0].startswith("xxh3:")
    assert len(prints[0]) == 5 + 32


def test_a_fingerprint_can_be_made_while_bytes_stream_by(tmp_path: Path) -> None:
    """What merging does, in whatever pieces."""
    base = make_base(tmp_path / "base", shards=2)
    shards = resolve(base).shards()
    digests = {}
    for name, path in shards.items():
        with SafetensorsFile(path) as file:
            info, data = file.tensors[name], bytes(file.bytes(name))
        state = TensorHash(name, info.dtype, info.shape)
        for start in range(0, len(data), 7):
            state.update(data[start : start + 7])
        digests[name] = state.digest()
    assert combine(digests) == combine(dict(reversed(digests.items()))) == fingerprint(shards)


def test_a_remembered_fingerprint_is_used_only_for_the_file_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: with size and mtime alone as the key, the rewritten file with its old time passes."""
    from litlora.checkpoint import fingerprint as module

    base = make_base(tmp_path / "base")
    shards = resolve(base).shards()
    first = fingerprint(shards)
    assert not cache_path().exists()  # the file is too young to be trusted to show its next change
    monkeypatch.setattr(sys.modules["litlora.checkpoint.fingerprint"], "_is_settled", lambda path: True)
    assert fingerprint(shards) == first
    assert cache_path().exists()
    monkeypatch.setattr(module, "_hash_file", lambda path: pytest.fail("it was to be remembered"))
    assert fingerprint(shards) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = base / names.WEIGHTS
    status = weights.stat()
    flip(weights, 8 * (status.st_size - 5))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_mtime_ns == status.st_mtime_ns
    assert weights.stat().st_size == status.st_size
    assert fingerprint(shards) != first
    flip(weights, 8 * (status.st_size - 5))
    for garbage in (b"", b"[]", b'{"x": {"a": "zz"}}', b"\xff", b'{"x": 1}', b"{" * 100_000):
        cache_path().write_bytes(garbage)
        assert fingerprint(shards) == first
    cache_path().unlink()
    cache_path().parent.rmdir()
    cache_path().parent.write_text("a file where the cache should be")
    assert fingerprint(shards) == first


# ---- F13 -------------------------------------------------------------------------------------------------------------


def test_a_half_downloaded_base_is_refused_and_the_file_named(tmp_path: Path) -> None:
    """F13. Mutation: trusting the index lets all four through to the model."""
    good = make_base(tmp_path / "good", shards=3)
    second = "model-00002-of-00003.safetensors"
    missing = copy(good, tmp_path / "missing")
    (missing / second).unlink()
    assert_shards_refused(missing, second, "is missing")
    (missing / ".cache/huggingface/download").mkdir(parents=True)
    (missing / ".cache/huggingface/download/abc.incomplete").write_text("")
    with pytest.raises(UserError) as refused:
        resolve(missing).shards()
    assert "not finished" in refused.value.hint
    for cut in (0, 4, 100, -1):
        torn = copy(good, tmp_path / f"torn{cut}")
        (torn / second).write_bytes((good / second).read_bytes()[:cut])
        assert_shards_refused(torn, second, "safetensors")
    absent = copy(good, tmp_path / "absent")
    index = json.loads((absent / names.WEIGHTS_INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00004-of-00003.safetensors"
    (absent / names.WEIGHTS_INDEX).write_text(json.dumps(index))
    assert_shards_refused(absent, "model-00004-of-00003.safetensors", "is missing")
    wrong = copy(good, tmp_path / "wrong")
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    (wrong / names.WEIGHTS_INDEX).write_text(json.dumps(index))
    assert_shards_refused(wrong, "model-00001-of-00003.safetensors", "lacks the tensor")
    single = make_base(tmp_path / "single")
    (single / names.WEIGHTS).write_bytes((single / names.WEIGHTS).read_bytes()[:-1])
    assert_shards_refused(single, names.WEIGHTS, "safetensors")


def assert_shards_refused(base: Path, name: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as refused:
        resolve(base).shards()
    assert name in str(refused.value)


# ---- S04 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/hostname.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "C:x.safetensors",
        "\0.safetensors", "a\n.safetensors", "x" * 300 + ".safetensors", "model.bin", "tokenizer.json", 7, None, ["x"], {"a": 1},
    ],
)  # fmt: skip
def test_an_index_cannot_name_anything_but_a_file_of_its_directory(tmp_path: Path, name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """S04: refused before anything is opened. Mutation: without `is_plain_name` the file outside is read."""
    base = make_base(tmp_path / "base", shards=2)
    write_safetensors(tmp_path / "secret.safetensors", base_tensors(), {})
    index = json.loads((base / names.WEIGHTS_INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / names.WEIGHTS_INDEX).write_text(json.dumps(index))
    monkeypatch.setattr("litlora.checkpoint.shards.SafetensorsFile", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(UserError) as refused:
        resolve(base).shards()
    assert names.WEIGHTS_INDEX in refused.value.where


def test_links_pipes_and_devices_are_refused_before_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S04: a FIFO would wait for ever, /dev/zero never ends. (`SafetensorsFile` refuses to read them, too.)"""
    second = "model-00002-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, base_tensors(), {})

    def link(target: str) -> Callable[[Path], None]:
        return lambda path: path.symlink_to(target)

    makers = [link(str(outside)), link("../outside.safetensors"), link("/dev/zero"), link(second), os.mkfifo, Path.mkdir]
    with monkeypatch.context() as patched:
        patched.setattr("litlora.checkpoint.shards.SafetensorsFile", lambda path: pytest.fail(f"opened {path}"))
        for number, make in enumerate(makers):
            for name, shards in ((second, 2), (names.WEIGHTS, 1)):
                base = make_base(tmp_path / f"base{number}-{shards}", shards=shards)
                (base / name).unlink()
                make(base / name)
                with pytest.raises(UserError, match=r"is a link out|is no regular file|leads to itself|cannot be read|is neither a model"):
                    resolve(base).shards()
    base = make_base(tmp_path / "inside", shards=2)
    (base / second).rename(base / "blob.safetensors")
    (base / second).symlink_to("blob.safetensors")
    assert resolve(base).shards()  # a link inside the directory leads nowhere else
    for name in (names.CONFIG, names.WEIGHTS_INDEX):
        base = make_base(tmp_path / f"piped-{name}", shards=2)
        (base / name).unlink()
        os.mkfifo(base / name)
        with pytest.raises(UserError, match="is no regular file"):
            resolve(base).config() if name == names.CONFIG else resolve(base).shards()


def test_the_links_of_hugging_faces_cache_are_followed_inside_the_cache_only(tmp_path: Path) -> None:
    """S04: models--org--name/snapshots/HASH/file -> ../../blobs/HASH."""
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "abc123"
    plain = make_base(tmp_path / "plain", shards=2)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(plain.iterdir())):
        copied = cache / "blobs" / str(number)
        copied.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    found = resolve(snapshot)
    assert found.config().hidden_size == 24
    assert f"the model is in {snapshot}" in refusal(cache)
    assert found.fingerprint() == resolve(plain).fingerprint()
    (tmp_path / "handle").symlink_to(snapshot)
    assert resolve(tmp_path / "handle").shards()
    cache.rename(tmp_path / "hub" / "org--name")  # the same places, but no cache
    assert_shards_refused(tmp_path / "hub" / "org--name" / "snapshots" / "abc123", names.WEIGHTS_INDEX, "is a link out of its directory")
    (tmp_path / "hub" / "org--name").rename(cache)
    other = tmp_path / "hub" / "models--evil--name" / "blobs"
    other.mkdir(parents=True)
    second = "model-00002-of-00002.safetensors"
    (other / "x").write_bytes((plain / second).read_bytes())
    (snapshot / second).unlink()
    (snapshot / second).symlink_to("../../../models--evil--name/blobs/x")
    assert_shards_refused(snapshot, second, "is a link out of its directory")


def test_names_that_differ_in_case_only_and_doubled_keys_are_refused(tmp_path: Path) -> None:
    """S04: one file to some file systems, two to others."""
    base = make_base(tmp_path / "base", shards=2)
    index = json.loads((base / names.WEIGHTS_INDEX).read_text())
    for changed, what in (
        ({**index["weight_map"], "model.norm.weight": "MODEL-00001-of-00002.safetensors"}, "differ in case only"),
        ({**index["weight_map"], "Model.norm.weight": "model-00001-of-00002.safetensors"}, "differ in case only"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        (base / names.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": changed}))
        assert_shards_refused(base, names.WEIGHTS_INDEX, what)
    (base / names.WEIGHTS_INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    assert_shards_refused(base, names.WEIGHTS_INDEX, "names 'a' twice")


# ---- S01 -------------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


NAMES = [
    names.CONFIG, names.WEIGHTS, names.WEIGHTS_INDEX, names.ADAPTER_CONFIG, names.ADAPTER_WEIGHTS, names.MANIFEST, names.TRAINING_STATE,
    names.TRAINING_STATE_META, "model-00001-of-00002.safetensors",
]  # fmt: skip


def read_everything(directory: Path) -> None:
    found = resolve(directory)
    found.config(), found.shards(), found.adapter_config()
    SafetensorsFile(found.adapter_file()).close()
    found.training_values()


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_under_any_accepted_name_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    """S01."""
    base = make_base(tmp_path / "base", shards=2 if name in (names.WEIGHTS_INDEX, "model-00001-of-00002.safetensors") else 1)
    step = add_step(tmp_path / "out", 100, base)
    adapter = make_adapter(tmp_path / "adapter", str(base))
    for directory in (base, step, adapter):
        if (directory / name).exists():
            (directory / name).write_bytes(pickle.dumps(Bomb()))
            with pytest.raises(UserError) as refused:
                read_everything(directory)
            assert name in refused.value.report()
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_directory_of_pickles_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """S01: with what to do instead."""
    base = make_base(tmp_path / "base")
    (base / names.WEIGHTS).unlink()
    (base / name).write_bytes(pickle.dumps(Bomb()))
    text = refusal(base)
    assert f"{name} can run code when it is read, and is not" in text
    assert (f"litlora convert {base} --to hf" in text) == (name == "pytorch_model.bin") and "litlora convert" in text
    assert not Path("exploded").exists()


def test_code_in_a_models_directory_is_never_run(tmp_path: Path) -> None:
    """S01: modeling_*.py, auto_map, model_file. No process, no exec, no import from there: an audit hook listens."""
    base = make_base(tmp_path / "base", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_file="modeling_evil.py")
    (base / "modeling_evil.py").write_text("raise SystemExit('run')")
    (base / "__init__.py").write_text("raise SystemExit('run')")
    code = f"""
import sys
from litlora.checkpoint import resolve
import litlora.families, litlora.peft, concurrent.futures.thread
heard = []
def listen(event, args):
    if event.startswith(("os.system", "subprocess", "os.exec", "os.fork", "os.posix_spawn", "socket.", "marshal.", "pickle.")):
        heard.append(event)
    if event in ("exec", "import", "open") and any("modeling_evil" in str(arg) or str(arg).endswith("base/__init__.py") for arg in args):
        heard.append((event, args))
sys.addaudithook(listen)
found = resolve({str(base)!r})
found.config(), found.shards(), found.fingerprint()
assert not heard, heard
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_looking_at_checkpoints_imports_no_torch() -> None:
    """DESIGN section 2: only weights and state need it, and nothing else in the room imports those."""
    code = "import sys; import litlora.checkpoint; assert not {'torch', 'lightning_fabric', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
