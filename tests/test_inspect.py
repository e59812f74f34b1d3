"""`litlora inspect`: what a path is, where it comes from, and how far its training moved each module, against the weights themselves."""

import json
import math
import os
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import ADAPTER, adapter_tensors, flip, make_adapter, manifest_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talkers import in_two_files, make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.commit import commit_step
from litlora.checkpoint.history import how_it_ended
from litlora.checkpoint.manifest import seal, unseal
from litlora.checkpoint.movement import movement
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
from litlora.commands.inspect import report, weights
from litlora.commands.inspect.page import by_kind, by_layer
from litlora.commands.inspect.report import Report
from litlora.methods.attach import merge

ROWS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "three", "four", "five", "six")]
METHODS = {
    "lora": "lora --lora.modules_to_save norm",
    "dora": "lora --lora.use_dora true",
    "pissa": "lora --lora.init pissa --lora.r 4",
    "scale_shift": "adapter --adapter.kind scale_shift",
    "prompt": "adapter --adapter.kind prompt",
    "series": "adapter --adapter.kind series",
    "pro": "pro --pro.n_insert 1",
    "freeze": "freeze --freeze.layers last:1",
    "full": "full",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method on one tiny base, with its directory."""
    place = tmp_path_factory.mktemp("inspect")
    base = make_talker(place / "base")
    rows = place / "rows.json"
    rows.write_text(json.dumps(ROWS))
    made = {"base": base, "peft": make_adapter(place / "peft", str(base))}
    for name, words in METHODS.items():
        out = place / name
        options = f"--checkpoint_dir {base} --data {rows} --out_dir {out} --train.max_steps 3 --train.global_batch_size 2 --train.lr 1e-2"
        options += " --train.lr_warmup_steps 0 --eval.fraction 0 --threads 1 --train.save_interval 2"
        assert main(["finetune", *words.split(), *options.split()]) == 0
        made[name] = out / "step-3"
    return made


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", *words]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found.keys() == {field.name for field in fields(Report)}
    return found


def commands(found: dict[str, Any]) -> dict[str, str]:
    return {one["to"]: one["command"] for one in found["can"]}


def reasons(found: dict[str, Any]) -> dict[str, str]:
    return {one["to"]: one["why"] for one in found["cannot"]}


# ---- steps of every method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_step_says_what_it_is_and_that_everything_moved(runs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK N08, A03: every module that was to be trained lies elsewhere than before, in every intermediate step as in the last."""
    for number in (2, 3):
        found = inspected(runs[name].with_name(f"step-{number}"), capsys)
        assert (found["kind"], found["method"], found["training"]["step"]) == ("step", METHODS[name].split()[0], number)
        assert found["hashed"] and not found["faults"] and found["training"]["resumable"]
        assert found["training"]["settings"]["train.lr"] == 1e-2
        assert found["moved"] and all(far > 0 for far in found["moved"].values())
        assert found["sizes"]["all"] == sum(found["files"].values())
        assert found["tokenizer"] == {"tokenizer": "own", "template": "own"}
        assert found["model"]["context"] == 256 and found["model"]["parameters"] > 0
        assert found["lineage"][-1]["path"] == str(runs["base"].resolve())
        assert ("train longer" in commands(found)) == (number == 3)
        if number == 2:
            assert reasons(found)["resume"] == "--resume goes on from the newest, step-3"
    if name == "full":
        assert found["base"] is None and found["adapter"] is None
        return
    assert (found["base"]["state"], found["base"]["path"]) == ("same", str(runs["base"].resolve()))
    assert ("merge" in commands(found)) == (name not in ("prompt", "series")) == ("merge" not in reasons(found))
    tensors = resolve(runs[name]).tuning().file_shapes(resolve(runs[name]).config())
    assert found["adapter"]["tensors"] == len(tensors)
    assert (
        found["adapter"]["in_peft"] == ("PEFT" in commands(found)) == (name in ("lora", "dora", "pissa"))
    )  # PEFT's prompts need square heads
    assert ("vLLM" in commands(found)) == (name == "pissa")  # the LoRA here trains a norm as well
    assert found["adapter"]["new_after"] == ([1] if name == "pro" else [])


@pytest.mark.parametrize("name", ["lora", "full"])
def test_every_command_that_is_named_works_as_it_stands(
    runs: dict[str, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YARDSTICK A08: an intermediate step is as good as the last one. Caught: a train-on without the run's own options."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    given = {"TEXT": "Hello", "FILE": str(rows), "DIR": str(tmp_path / "more"), "N": "4"}
    for number in (2, 3):
        found = inspected(runs[name].with_name(f"step-{number}"), capsys)
        for purpose, command in commands(found).items():
            words = [given.get(word, word) for word in shlex.split(command)]
            if words[0] != "litlora" or purpose in ("chat", "train longer"):
                continue
            short = ["--max_new_tokens", "2", "--threads", "1"] if words[1] in ("generate", "evaluate") else []
            assert main([*words[1:], *short]) == 0, command
            shutil.rmtree(tmp_path / "more", ignore_errors=True)
    merged = runs[name] / names.MERGED
    if name == "lora":
        found = inspected(merged, capsys)
        assert (found["kind"], found["lineage"][0]["how"], found["lineage"][0]["step"]) == ("merged", "merged from", 3)
        assert found["moved"].keys() == {key.removesuffix(".adapter").removesuffix(".weight") for key in moved_by(runs[name], runs["base"])}
        assert found["lineage"][1]["path"] == str(runs["base"].resolve())
        shutil.rmtree(merged)
        shutil.rmtree(runs[name].with_name("step-2") / names.MERGED)


def moved_by(step: Path, base: Path) -> dict[str, float]:
    return movement(resolve(step), resolve(base))


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "freeze", "pro", "full"])
def test_what_is_said_to_have_moved_is_what_the_weights_say(runs: dict[str, Path], name: str) -> None:
    """Against the difference of the folded weights, computed in fp64. Caught: LoRA's norm without its scale; PiSSA's with rank r."""
    base, step = load_model(resolve(runs["base"])), merge(load_model(resolve(runs[name])))
    moved = movement(resolve(runs[name]), resolve(runs["base"]))
    before, after = dict(base.double().named_parameters()), dict(step.double().named_parameters())
    last = base.config.num_hidden_layers
    for key, far in moved.items():
        weight = key.removesuffix(".adapter") + (".weight" if key.endswith(".adapter") else "")
        old, new = before[weight.replace(".inserted", "")], weight.replace(f".{last - 1}.inserted.", f".{last}.")
        start = torch.zeros_like(old) if "inserted" in weight and weight.split(".")[-2] in ("o_proj", "down_proj") else old
        assert far == pytest.approx(((after[new] - start).norm() / old.norm()).item(), rel=2e-3, abs=1e-7), key


# ---- the base of an adapter ------------------------------------------------------------------------------------------


def test_whether_the_base_is_there_and_the_same_is_said(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK A02: other weights of the same shape are told apart, a renamed or resharded base is the same; nothing fails."""
    lora = runs["lora"]
    other = make_talker(tmp_path / "other", seed=5)
    found = inspected(lora, capsys, "--base_dir", str(other))
    assert found["base"]["state"] == "other" and found["moved"] is None and found["model"] is None
    assert found["base"]["fingerprint"] in found["base"]["why"] and resolve(other).fingerprint() in found["base"]["why"]
    assert "use it" in reasons(found) and "chat" not in commands(found)
    moved = runs["base"].with_name("moved")
    runs["base"].rename(moved)
    try:
        found = inspected(lora, capsys)
        assert (found["base"]["state"], found["moved"]) == ("missing", None)
        assert str(runs["base"]) in found["base"]["why"] and "--base_dir" in commands(found)["give its base"]
        assert found["adapter"]["tensors"] and found["training"]["val_loss"] is None and not found["lineage"][0]["exists"]
        found = inspected(lora, capsys, "--base_dir", str(moved))
        assert found["base"]["state"] == "same" and found["moved"]
        assert commands(found)["chat"] == f"litlora chat {lora} --base_dir {moved}"
        (moved / names.WEIGHTS).rename(moved / "kept")
        (moved / names.WEIGHTS).write_bytes(b"half of it")
        found = inspected(lora, capsys, "--base_dir", str(moved))
        assert found["base"]["state"] == "unusable" and names.WEIGHTS in found["base"]["why"]
        (moved / "kept").rename(moved / names.WEIGHTS)
    finally:
        moved.rename(runs["base"])


def test_an_adapter_that_does_not_fit_its_own_description_is_good_for_nothing(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YARDSTICK A01: the rank it names is not the rank that is stored. Nothing is offered that would be refused."""
    adapter = shutil.copytree(runs["peft"], tmp_path / "adapter")
    config = json.loads((adapter / names.ADAPTER_CONFIG).read_text())
    assert "vLLM" in commands(inspected(adapter, capsys))
    (adapter / names.ADAPTER_CONFIG).write_text(json.dumps({**config, "r": 4}))
    found = inspected(adapter, capsys)
    assert found["faults"] and not found["can"] and "use it" in reasons(found) and found["moved"] is None


def test_what_is_large_is_read_only_where_that_is_asked_for(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base of many gigabytes is not read for a look at a step of some megabytes: what was not checked is said not to be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "READ_UNASKED", 10)
    with monkeypatch.context() as closed:
        closed.setattr("litlora.checkpoint.fingerprint._hash_file", lambda path: pytest.fail(f"{path} was read"))
        found = inspected(runs["lora"], capsys)
    assert (found["base"]["state"], found["moved"], found["model"]["fingerprint"]) == ("unchecked", None, None)
    assert "--check" in found["moved_unknown"] and "chat" in commands(found)
    found = inspected(runs["lora"], capsys, "--check", "true")
    assert (found["base"]["state"], found["hashed"]) == ("same", True) and found["moved"] and found["model"]["fingerprint"]
    monkeypatch.setattr(report, "READ_UNASKED", 10)
    flip(runs["full"] / names.WEIGHTS, 8 * 5000)
    try:
        found = inspected(runs["full"], capsys)
        assert (found["kind"], found["hashed"], found["faults"]) == ("step", False, [])
        found = inspected(runs["full"], capsys, "--check", "true")
        assert found["kind"] == "torn" and "was altered" in found["faults"][0]
    finally:
        flip(runs["full"] / names.WEIGHTS, 8 * 5000)


# ---- other things ----------------------------------------------------------------------------------------------------


def test_what_a_model_was_converted_or_expanded_from_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    for words, kind, how in (
        (["convert", str(base), "--to", "hf", "--dtype", "bfloat16"], "converted", "converted from"),
        (["expand", str(base)], "expanded", "expanded from"),
    ):
        out = tmp_path / kind
        assert main([*words, "--out_dir", str(out)]) == 0
        found = inspected(out, capsys)
        assert found["kind"] == kind and [(one["how"], one["path"]) for one in found["lineage"]] == [(how, str(base))]


def test_no_step_is_spoken_of_where_none_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that others trained and `convert` made a step of: neither in inspect, of it or what comes of it, nor in its README, in
    diff, nor in the README of a merge."""
    base, step = make_talker(tmp_path / "base"), tmp_path / "taken"
    adapter = make_adapter(tmp_path / "adapter", str(base))
    assert main(["convert", str(adapter), "--to", "litlora", "--out_dir", str(step)]) == 0
    assert main(["merge_lora", str(step)]) == 0
    found = inspected(step, capsys)
    assert [found["training"][name] for name in ("step", "epoch", "tokens")] == [None, None, None]
    assert inspected(step / names.MERGED, capsys)["lineage"][0]["step"] is None
    pages = [(path / names.README).read_text() for path in (step, step / names.MERGED)]
    for words in (["inspect", str(step)], ["inspect", str(step / names.MERGED)], ["diff", str(adapter), str(step)]):
        assert main(words) == 0
        pages.append(capsys.readouterr().out)
    for page in pages:
        assert "step 0" not in page and "step-0" not in page and "0 steps" not in page and "epoch" not in page and "0 tokens" not in page


@pytest.mark.parametrize("lost", ["vocab.json", "merges.txt"])
def test_a_vocabulary_in_two_files_is_a_tokenizer(tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both of them: one alone is none."""
    base = in_two_files(make_talker(tmp_path / "base"))
    found = inspected(base, capsys)
    assert found["tokenizer"] == {"tokenizer": "own", "template": "own"} and "chat" in commands(found)
    (base / lost).unlink()
    found = inspected(base, capsys)
    assert found["tokenizer"]["tokenizer"] is None and reasons(found)["talk to it"] == "it has no tokenizer"


def test_every_kind_of_path_is_named(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S01: of what others pickled nothing is opened. What is nothing known has exit code 2, and says what is there."""
    for name, files, kind, command in (
        ("litgpt", "lit_model.pth model_config.yaml", "litgpt", "litlora convert {} --to hf --out_dir DIR"),
        (
            "lora",
            "lit_model.pth.lora model_config.yaml hyperparameters.yaml",
            "litgpt adapter",
            "litlora convert {} --to peft --out_dir DIR",
        ),
        ("pickled", "pytorch_model.bin.index.json pytorch_model-1.bin config.json", "pickled", "litlora convert {} --to hf --out_dir DIR"),
        ("gguf", "model-f16.gguf", "gguf", "llama-cli -m {}/model-f16.gguf"),
    ):
        place = tmp_path / name
        place.mkdir()
        for file in files.split():
            (place / file).write_bytes(b"")
        found = inspected(place, capsys)
        assert (found["kind"], commands(found)["go on"]) == (kind, command.format(place)) and reasons(found)
    base = runs["base"]
    assert (inspected(base, capsys)["kind"], inspected(runs["peft"], capsys)["base"]["state"]) == ("base", "unrecorded")
    expanded, extended = tmp_path / "expanded", tmp_path / "extended"
    assert main(["expand", str(base), "--out_dir", str(expanded)]) == 0
    found = inspected(expanded, capsys)
    assert (found["kind"], found["model"]["new_layers"]) == ("expanded", [2]) and "finetune pro" in commands(found)["train it"]
    shutil.copytree(base, extended)
    (extended / names.EXTEND_REPORT).write_text(json.dumps({"base": {"path": str(base)}}))
    assert (inspected(extended, capsys)["kind"], inspected(extended, capsys)["lineage"][0]["path"]) == ("extended", str(base))
    found = inspected(base / names.WEIGHTS, capsys)
    assert (found["kind"], found["tensors"]["tensors"], commands(found)["go on"]) == ("file", 21, f"litlora inspect {base}")
    run = shutil.copytree(runs["lora"].parent, tmp_path / "run")
    (run / "step-2" / names.ADAPTER_WEIGHTS).write_bytes(b"x")
    found = inspected(run / "step-2", capsys)
    assert (found["kind"], commands(found)["go on"]) == ("torn", f"litlora inspect {run / 'step-3'}")
    assert found["training"]["step"] == 2 and names.ADAPTER_WEIGHTS in found["faults"][0]
    (run / "step-2").rename(run / "step-2.torn")
    (run / names.temporary_name("step-4", 99999999)).mkdir()
    assert inspected(run / "step-2.torn", capsys)["kind"] == "aside"
    assert inspected(run / names.temporary_name("step-4", 99999999), capsys)["kind"] == "temporary"
    (tmp_path / "text").write_text("hello")
    for nothing in (tmp_path, tmp_path / "text", Path("/dev/null")):
        assert inspected(nothing, capsys, code=2)["kind"] == "unknown"
    assert main(["inspect", str(tmp_path / "nowhere")]) == main(["inspect", "a\0b"]) == main(["inspect", "x" * 5000]) == 2
    (extended / names.CONFIG).write_text('{"model_type": "mamba"}')
    found = inspected(extended, capsys)
    assert "mamba" in found["faults"][0] and not found["can"]


def test_a_run_says_what_it_is_how_far_it_came_and_how_it_ended(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["lora"].parent, tmp_path / "run")
    found = inspected(run, capsys)
    assert (found["kind"], found["method"], found["run"]["command"]) == ("run", "lora", "finetune lora")
    assert (found["run"]["steps"], found["run"]["whole"], found["run"]["resumable"], found["run"]["torn"]) == (2, 2, 2, 0)
    assert (found["run"]["best"], found["run"]["last"]) == (str(run / "step-3"), str(run / "step-3"))
    assert (found["run"]["ended"], found["run"]["how"]) == ("finished", "all 3 steps")
    assert found["run"]["data"] == [str(runs["base"].parent / "rows.json")]
    shutil.rmtree(run / "step-3")
    found = inspected(run, capsys)
    assert (found["run"]["ended"], found["run"]["how"]) == ("stopped", "after 2 of 3 steps")
    assert commands(found)["resume"] == f"litlora finetune lora --resume --out_dir {run}"
    (run / names.LOCK).write_text(f"{os.getppid()}\n")
    assert inspected(run, capsys)["run"]["ended"] == "running" and "resume" not in commands(inspected(run, capsys))
    (run / names.LOCK).write_text("99999999\n")
    assert inspected(run, capsys)["run"]["ended"] == "stopped"
    with (run / names.METRICS).open("a") as metrics:
        metrics.write("3,1,nan\n")
    assert inspected(run, capsys)["run"]["ended"] == "failed"
    (run / names.METRICS).write_text("step,val_loss\n0,1.0\n1,3.0\n2,2.0\n3,2.5\n4,2.0\n5,\n")
    (run / names.RUN_YAML).write_text("train:\n  max_steps: 9\n  patience: 2\n")
    assert inspected(run, capsys)["run"]["how"] == "after 2 steps: 2 validations brought no new lowest loss"
    (run / names.RUN_YAML).write_text("train: [\n")
    (run / names.METRICS).unlink()
    found = inspected(run, capsys)
    assert (found["run"]["ended"], found["run"]["command"]) == ("unknown", None) and reasons(found)["resume"] == "there is no run.yaml"


def test_the_line_of_parents_is_followed_as_far_as_it_goes(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it leads in a circle, and where a part of it was deleted; what else made a step is listed too."""
    run = tmp_path / "out"
    run.mkdir()
    record = resolve(runs["base"]).record(run)
    events = (
        {"event": "combined", "how": "average", "parents": [{"path": "a", "sha256": "0", "weight": 0.5}]},
        {"event": "resumed", "changed": {"lr": 1}},
    )
    for step, parent in ((1, str(run / "step-3")), (2, str(run / "step-1")), (3, str(run / "step-2")), (4, str(tmp_path / "gone"))):
        manifest = manifest_of(step, record, parent=parent, lineage=events)
        files = {names.ADAPTER_CONFIG: json.dumps({**ADAPTER, "base_model_name_or_path": record.path}).encode()}
        commit_step(run, manifest, tensors={names.ADAPTER_WEIGHTS: adapter_tensors(step, vocab_size=288)}, files=files)
    found = inspected(run / "step-1", capsys)
    assert [one["step"] for one in found["lineage"]] == [3, 2, 1] and found["events"] == json.loads(json.dumps(events))
    found = inspected(run / "step-4", capsys)
    assert [(one["how"], one["exists"]) for one in found["lineage"]] == [("trained on from", False)]
    assert main(["inspect", str(run / "step-4")]) == 0
    text = capsys.readouterr().out
    assert "combined of a (0.5): how average" in text and "(not there any more)" in text


# ---- for a person ----------------------------------------------------------------------------------------------------


def test_a_person_reads_one_line_per_kind_of_module_and_per_layer(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(runs["lora"])]) == 0
    text = capsys.readouterr().out
    assert text.count("self_attn.q_proj") == 1 and text.count("layer 1 ") == 1 and " x " in text
    assert f"litlora merge_lora {runs['lora']}" in text and "the one it was trained on" in text


def test_many_layers_share_lines() -> None:
    moved = {f"model.layers.{layer}.mlp.up_proj.adapter": layer / 100 for layer in range(32)} | {"model.norm.weight": 0.5}
    groups = by_layer(moved)
    assert list(groups) == [f"layers {first}-{first + 3}" for first in range(0, 32, 4)]
    assert sum(map(len, groups.values())) == 32 and max(groups["layers 28-31"]) == 0.31
    assert list(by_kind(moved)) == ["mlp.up_proj", "norm"]


def test_a_directory_of_somebody_else_cannot_command_the_terminal(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = shutil.copytree(runs["peft"], tmp_path / "evil")
    config = json.loads((evil / names.ADAPTER_CONFIG).read_text())
    (evil / names.ADAPTER_CONFIG).write_text(json.dumps({**config, "revision": "\x1b[2Jgone\u202e"}))
    assert main(["inspect", str(evil)]) == 0
    shown = capsys.readouterr()
    assert "gone" in shown.out and not {"\x1b", "\u202e"} & set(shown.out + shown.err)


# ---- anything that a manifest or an adapter_config may hold ----------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.sampled_from([math.nan, math.inf])
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["lora", "pro", "LORA", "q_proj", "/", "0-9"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["r", "event", "path"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SEALED = (
    "method",
    "options",
    "step",
    "epoch",
    "tokens",
    "train_loss",
    "val_loss",
    "base",
    "parent",
    "lineage",
    "versions",
    "files",
    "data",
)
OPTIONS = ("r", "alpha", "dropout", "target_modules", "layers", "rank_pattern", "init", "modules_to_save", "untie", "kind", "positions")
WRITTEN = (
    *ADAPTER,
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "exclude_modules",
    "base_model_name_or_path",
)


def said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither command says anything but what it documents: a result, or a refusal."""
    for words in (
        ["inspect", str(path)],
        ["inspect", str(path), "--json"],
        ["list", str(path.parent)],
        ["list", str(path.parent), "--json"],
    ):
        assert main([*words, "--debug"]) == 0
    capsys.readouterr()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(SEALED), JSON, max_size=4), options=st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=3)
)
def test_no_manifest_makes_inspect_or_list_fail(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], changes: Any, options: Any
) -> None:
    """YARDSTICK Z01: sealed by somebody who means no good."""
    run = tmp_path_factory.mktemp("fuzz")
    step = shutil.copytree(runs["series"], run / "step-3")
    values = unseal((step / names.MANIFEST).read_bytes(), step)
    values |= {"options": {**values["options"], **options}} | changes
    try:
        (step / names.MANIFEST).write_bytes(seal(values))
    except UnicodeEncodeError:
        return
    said(step, capsys)
    shutil.rmtree(run)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    settings_text=st.text(max_size=40)
    | JSON.map(json.dumps)
    | st.builds("train:\n  {}: {}\n".format, st.sampled_from(["max_steps", "patience"]), JSON),
    metrics=st.text(max_size=40) | st.builds("step,loss,val_loss\n{},{},{}\n".format, JSON, JSON, JSON) | st.just("step\n" + "x" * 200_000),
    lock=st.text(max_size=5) | st.integers().map(str),
)
def test_nothing_that_lies_in_a_run_makes_inspect_or_list_fail(
    runs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    settings_text: str,
    metrics: str,
    lock: str,
) -> None:
    """YARDSTICK Z01."""
    run = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(runs["series"], run / "step-3")
    for name, text in ((names.RUN_YAML, settings_text), (names.METRICS, metrics), (names.LOCK, lock)):
        (run / name).write_text(text, encoding="utf-8", errors="replace")
    for word in ("inspect", "list"):
        assert main([word, str(run), "--json", "--debug"]) == main([word, str(run), "--debug"]) == 0
    capsys.readouterr()
    shutil.rmtree(run)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(WRITTEN), JSON, max_size=4))
def test_no_adapter_config_makes_inspect_fail(
    runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], changes: Any
) -> None:
    """YARDSTICK Z01."""
    place = tmp_path_factory.mktemp("fuzz")
    adapter = shutil.copytree(runs["peft"], place / "adapter")
    values = json.loads((adapter / names.ADAPTER_CONFIG).read_text()) | changes
    (adapter / names.ADAPTER_CONFIG).write_text(json.dumps(values))
    for words in (["inspect", str(adapter)], ["inspect", str(adapter), "--json"]):
        assert main([*words, "--debug"]) == 0
    capsys.readouterr()
    shutil.rmtree(place)


def test_steps_of_a_long_run_have_their_commas_on_both_sides(tmp_path: Path) -> None:
    """Caught: `after 1200 of 3,000 steps`."""
    (tmp_path / names.RUN_YAML).write_text("train: {max_steps: 3000}\n")
    assert how_it_ended(tmp_path, 1200, 0.5) == ("stopped", "after 1,200 of 3,000 steps")
