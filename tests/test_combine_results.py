"""What a combined checkpoint is to others: PEFT, merging, training, lineage; what is refused; the greedy soup; the command."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_samples import flip, make_adapter
from conftest import ROOT, random_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talkers import TEMPLATE, in_two_files, make_talker
from talkers import make_step as make_talking_step
from test_combine import PLAIN, any_tensors, assert_close, made, noisy, pair, steps_on, weights_of
from test_merge import make_base, make_step, merged
from test_merge_methods import base_of, step_of

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.manifest import read_manifest, seal
from litlora.checkpoint.reading import sha256
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
from litlora.combine.soup import greedy
from litlora.errors import UserError, WorkError
from litlora.options import AdapterOptions, FreezeOptions, LoRAOptions, ProOptions
from litlora.safetensors_file import SafetensorsFile, write_safetensors

# ---- PEFT ------------------------------------------------------------------------------------------------------------


def in_peft(base: Path, steps: Sequence[Path]) -> Any:
    """PEFT's model with each step on it, as `0`, `1` ..."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(steps[0]), adapter_name="0")
    for number, step in enumerate(steps[1:], 1):
        model.load_adapter(str(step), adapter_name=str(number))
    return model


def peft_updates(model: Any, adapter: str) -> dict[str, np.ndarray]:
    """Module -> scale B A of one of its adapters."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            found[name] = module.get_delta_weight(adapter).detach().double().numpy()
    return found


def our_updates(path: Path, base: Path) -> dict[str, np.ndarray]:
    start, found = weights_of(base, base), weights_of(path, base)
    return {
        name.removesuffix(".weight"): found[name] - start[name]
        for name in found
        if name in start and not np.array_equal(found[name], start[name])
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "options"),
    [
        ("cat", "weighted_sum", {}),
        ("svd", "weighted_sum", {"rank": 4}),
        ("ties_svd", "ties", {"rank": 4, "density": 0.35}),  # with equal weights; PEFT divides by the number of parents, not by weights
        ("dare_linear_svd", "dare", {"rank": 4, "density": 1.0}),  # what is dropped is drawn by each for itself
        ("dare_ties_svd", "dare_ties", {"rank": 4, "density": 1.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1.0")  # PEFT's, on density 1
def test_the_result_is_pefts_where_its_definition_is_ours(tmp_path: Path, theirs: str, ours: str, options: dict[str, Any]) -> None:
    """`add_weighted_adapter`. Of PEFT's others, `linear`, `ties` and the like work on A and B apart, which is no combination of updates."""
    base = base_of(tmp_path / "base", "llama3")
    steps = steps_on(tmp_path, base, [PLAIN, LoRAOptions(r=2, alpha=8, target_modules=["q_proj", "o_proj"])])
    weights = [1.0, 1.0] if "ties" in theirs else [0.7, -0.4]
    model = in_peft(base, steps)
    more = {"svd_rank": options["rank"]} if "rank" in options else {}
    more |= {"density": options["density"]} if "density" in options else {}
    model.add_weighted_adapter(["0", "1"], weights, "both", combination_type=theirs, **more)
    wanted = peft_updates(model, "both")
    found = our_updates(made(tmp_path / "result", steps, ours, weights=weights, **options), base)
    assert found.keys() == wanted.keys()
    for module, update in wanted.items():
        assert np.linalg.norm(found[module] - update) <= 2e-4 * np.linalg.norm(update), module


TOKENS = random_tokens(2, 9)


@torch.no_grad()
def logits_of(path: Path, **more: Any) -> torch.Tensor:
    logits: torch.Tensor = load_model(resolve(path), **more).eval()(TOKENS)
    return logits


@pytest.mark.parametrize("name", ["patterns", "rsLoRA and LoRA", "a shared head in both", "a separate head in one", "three"])
def test_peft_loads_the_result_and_computes_the_same(tmp_path: Path, name: str) -> None:
    base, steps = pair(tmp_path, name)
    result = made(tmp_path / "result", steps)
    with torch.no_grad():
        theirs = in_peft(base, [result]).eval()(TOKENS).logits
    ours, plain = logits_of(result), logits_of(base)
    assert torch.allclose(ours, theirs, atol=2e-4)
    assert not torch.allclose(ours, plain, atol=1e-2)


@pytest.mark.parametrize("name", ["patterns", "a separate head in one"])
def test_the_result_merges_and_computes_what_its_parents_do_together(tmp_path: Path, name: str) -> None:
    """Composed at run time (`--adapter A:0.5 --adapter B:0.5`), the parents give the same logits where they train no tensor whole."""
    base, steps = pair(tmp_path, name)
    result = made(tmp_path / "result", steps)
    ours = logits_of(result)
    assert torch.allclose(ours, logits_of(merged(result, tmp_path / "merged")), atol=2e-4)
    if name == "patterns":
        assert torch.allclose(ours, logits_of(base, adapters=[(resolve(step), 0.5) for step in steps]), atol=2e-4)


def test_an_adapter_of_peft_is_a_parent_like_any_other(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    step, other = make_step(tmp_path / "run", base), make_adapter(tmp_path / "peft", str(base), seed=3, r=5)
    result = made(tmp_path / "result", [step, other], "weighted_sum", weights=[0.5, 2.0])
    updates = [our_updates(path, base) for path in (step, other, result)]
    for module, update in updates[2].items():
        assert np.allclose(update, 0.5 * updates[0][module] + 2.0 * updates[1][module], atol=1e-5)
    record = json.loads((result / names.COMBINE_REPORT).read_text())["parents"][1]
    assert record == {"path": str(other), "sha256": sha256(other / names.ADAPTER_WEIGHTS), "step": None, "weight": 2.0}


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_the_lineage_names_the_parents_with_their_hashes_and_weights(tmp_path: Path) -> None:
    """(Mutation: the weights of those that take part stand beside the first ones.)"""
    base, steps = pair(tmp_path, "other targets")
    first = made(tmp_path / "first", steps, "weighted_sum", weights=[0.0, 0.5])
    record = read_manifest(first)
    (event,) = record.lineage
    assert (event["event"], event["how"], event["options"]) == ("combined", "weighted_sum", {})
    wanted = [
        (str(step.resolve()), sha256(step / names.ADAPTER_WEIGHTS), 100, weight) for step, weight in zip(steps, (0.0, 0.5), strict=True)
    ]
    assert [(parent["path"], parent["sha256"], parent["step"], parent["weight"]) for parent in event["parents"]] == wanted
    assert record.base is not None and record.base.fingerprint == resolve(base).fingerprint()
    assert record.val_loss is None and record.parent is None and not (first / names.TRAINING_STATE_META).exists()
    again = made(tmp_path / "again", [first, steps[0]], "ties", rank=3, density=0.5)
    (event,) = read_manifest(again).lineage
    assert event["options"] == {"density": 0.5, "scale": 1.0, "rank": 3}
    assert event["parents"][0]["lineage"] == list(record.lineage)


@pytest.mark.parametrize(
    ("field", "value"),
    [("path", None), ("sha256", 7), ("fingerprint", 7), ("weight", "much"), ("weight", float("nan")), ("weight", True), ("lineage", [7])],
)
def test_a_sealed_lineage_that_lacks_what_is_read_of_it_is_refused_by_the_field(tmp_path: Path, field: str, value: Any) -> None:
    """Whoever sealed it: no command fails on it as if that were our fault. Events of other names may say what they like."""
    parent = {"path": "somewhere", "sha256": "0", "weight": 0.5, "step": None, "lineage": [{"event": "from the future", "parents": 7}]}
    for values, place in (
        ({**parent, field: value}, rf"lineage\[1\]\.parents\[0\]\.{field}"),
        ({**parent, "lineage": [{"event": "combined", "parents": [{**parent, field: value}]}]}, rf"lineage\[0\]\.parents\[0\]\.{field}"),
    ):
        events = [{"event": "resumed"}, {"event": "combined", "parents": [values]}]
        for lineage, refusal in (([*events[:1], {"event": "combined", "parents": [parent]}], None), (events, place)):
            base = {"method": "lora", "options": {}, "step": 1, "epoch": 0.0, "tokens": 0, "format_version": 2, "lineage": lineage}
            (tmp_path / names.MANIFEST).write_bytes(seal(base))
            if refusal is None:
                assert read_manifest(tmp_path).lineage == tuple(lineage)
                continue
            with pytest.raises(UserError, match=refusal):
                read_manifest(tmp_path)


def test_every_command_knows_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    steps = [make_talking_step(tmp_path / "run", step, base) for step in (10, 20)]
    result = tmp_path / "result"
    assert main(["combine", *map(str, steps), "--out_dir", str(result)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{result}\n" and f"0.5 x {steps[1]}" in err and "exact" in err
    for words in (["inspect"], ["verify"], ["generate", "--prompt", "Hi", "--max_new_tokens", "2"], ["merge_lora"]):
        assert main([words[0], str(result), *words[1:]]) == 0, capsys.readouterr().err
    assert f"combined of {steps[0].resolve()}" in capsys.readouterr().out
    assert "# result" in (result / names.README).read_text() and str(steps[1]) in (result / names.README).read_text()
    assert (result / names.CHAT_TEMPLATE).read_text() == TEMPLATE


def test_training_goes_on_from_the_result_where_its_shapes_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    steps = [make_talking_step(tmp_path / "run", step, base) for step in (10, 20)]
    assert main(["combine", *map(str, steps), "--out_dir", str(tmp_path / "both")]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": str(n)}) + "\n" for n in range(8)))
    words = ["finetune", "lora", str(tmp_path / "both"), "--data", str(rows), "--out_dir", str(tmp_path / "more")]
    words += [
        "--train.max_steps",
        "2",
        "--train.global_batch_size",
        "2",
        "--eval.fraction",
        "0",
        "--threads",
        "1",
        "--lora.target_modules",
        "q_proj",
        "v_proj",
        "down_proj",
    ]
    assert main([*words, "--lora.r", "3", "--lora.alpha", "3"]) == 2
    assert "holds another adapter" in capsys.readouterr().err
    assert main([*words, "--lora.r", "6", "--lora.alpha", "6"]) == 0
    assert read_manifest(tmp_path / "more" / "step-2").parent == str((tmp_path / "both").resolve())


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, paths: Sequence[Path], how: str = "average", out_dir: Path | None = None, **options: Any) -> UserError:
    """The error; nothing was written."""
    out_dir = out_dir or tmp_path / "result"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        made(out_dir, paths, how, **options)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


def test_adapters_on_different_bases_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    bases = [make_base(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1)]
    steps = [make_step(tmp_path / f"run{number}", base) for number, base in enumerate(bases)]
    error = refused(tmp_path, steps)
    for base in bases:
        assert resolve(base).fingerprint() in error.report()
    again = shutil.copytree(bases[0], tmp_path / "copy")  # the same weights elsewhere are the same base
    made(tmp_path / "result", [steps[0], make_step(tmp_path / "run3", Path(again))])


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (PLAIN, FreezeOptions(layers=["0"]), "was trained by freeze"),
        (FreezeOptions(layers=["0"]), FreezeOptions(layers=["1"]), "is built otherwise"),
        (ProOptions(positions=["0"]), ProOptions(positions=["1"]), "is built otherwise"),
        (PLAIN, LoRAOptions(r=3, alpha=5, use_dora=True), "is built otherwise"),
        (AdapterOptions(kind="series", width=4), AdapterOptions(kind="series", width=8), "is built otherwise"),
        (PLAIN, LoRAOptions(r=2, target_modules=["o_proj"], modules_to_save=["q_proj"]), "which another checkpoint trains whole"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_way_through_merged_models(tmp_path: Path, first: Any, second: Any, why: str) -> None:
    base = base_of(tmp_path / "base", "llama")
    steps = [step_of(tmp_path / f"run{n}", base, options, any_tensors(options, base, n)) for n, options in enumerate((first, second))]
    error = refused(tmp_path, steps)
    assert why in error.what and "merge_lora" in error.hint


def test_a_shared_and_a_separate_head_are_not_mixed(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "smollm")
    both = [LoRAOptions(r=2, modules_to_save=["embed_tokens"]), LoRAOptions(r=2, modules_to_save=["lm_head"], untie=True)]
    assert "another checkpoint has separated them" in refused(tmp_path, steps_on(tmp_path, base, both)).what


def test_what_cannot_be_merged_is_no_whole_model(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    options = AdapterOptions(kind="series", width=4)
    steps = [step_of(tmp_path / f"run{n}", base, options, any_tensors(options, base, n)) for n in (0, 1)]
    assert "a bottleneck with an activation" in refused(tmp_path, steps, whole=True).what


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    base, (step, other) = pair(tmp_path, "the same twice")
    tensors = dict(noisy(PLAIN, base, 5))
    name, (dtype, shape, values) = next(iter(tensors.items()))
    broken = np.array(values)
    broken.flat[3] = np.nan
    spoilt = step_of(tmp_path / "spoilt", base, PLAIN, {**tensors, name: (dtype, shape, broken)})
    error = refused(tmp_path, [step, spoilt])
    assert "not finite" in error.what and name in error.what
    with pytest.raises(WorkError, match="is not finite"):
        made(tmp_path / "result", [step, other], "weighted_sum", weights=[1e39, 1.0])
    assert not (tmp_path / "result").exists()


def test_a_model_with_a_number_that_is_not_finite_leaves_nothing_behind(tmp_path: Path) -> None:
    models = [make_base(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1)]
    with SafetensorsFile(models[1] / names.WEIGHTS) as file:
        tensors = {name: (info.dtype, info.shape, np.array(file.float32(name))) for name, info in file.tensors.items()}
    tensors["model.norm.weight"][2][0] = np.inf
    write_safetensors(models[1] / names.WEIGHTS, tensors)
    with pytest.raises(WorkError, match=r"model\.norm\.weight is not finite"):
        made(tmp_path / "result", models)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model0", "model1"]


def test_models_of_other_shapes_or_arithmetic_are_refused(tmp_path: Path) -> None:
    first = make_base(tmp_path / "first")
    assert "of another shape" in refused(tmp_path, [first, make_base(tmp_path / "second", num_hidden_layers=3)]).what
    error = refused(tmp_path, [first, make_base(tmp_path / "third", rope_theta=5.0)])
    assert "rope" in error.report()
    assert "is a whole model" in refused(tmp_path, [make_step(tmp_path / "run", first), first]).what
    result = made(tmp_path / "result", [tmp_path / "run" / "step-100", first], whole=True)
    wanted = {
        name: (values + weights_of(first, first)[name]) / 2 for name, values in weights_of(tmp_path / "run" / "step-100", first).items()
    }
    assert_close(weights_of(result, first), wanted)


@pytest.mark.parametrize("place", ["there", "base/inside", "run0/step-100/inside", "step-7", "a file"])
def test_a_result_goes_nowhere_where_something_is(tmp_path: Path, place: str) -> None:
    _, steps = pair(tmp_path, "the same twice")
    (tmp_path / "there").mkdir()
    refused(tmp_path, steps, out_dir=tmp_path / place if place != "a file" else steps[0] / names.MANIFEST)


def test_other_tokenizers_are_refused_and_other_templates_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    other = shutil.copytree(base, tmp_path / "other")
    raw = json.loads((other / names.TOKENIZER).read_text())
    raw["added_tokens"][2]["content"] = "<|other|>"
    (other / names.TOKENIZER).write_text(json.dumps(raw))
    assert "another tokenizer" in refused(tmp_path, [base, Path(other)]).what
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    config = json.loads((copy / names.TOKENIZER_CONFIG).read_text())
    (copy / names.TOKENIZER_CONFIG).write_text(json.dumps({**config, "chat_template": "{{ messages[0].content }}"}))
    made(tmp_path / "result", [base, copy])
    assert f"{copy}: another chat template than {base}" in capsys.readouterr().err
    assert (tmp_path / "result" / names.CHAT_TEMPLATE).read_text() == TEMPLATE


def test_a_vocabulary_in_other_files_is_compared_and_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vocab.json with merges.txt: other ids are refused, the same ids in whichever form are not, and the result can be talked to."""
    base = make_talker(tmp_path / "base")
    two, swapped = (Path(shutil.copytree(base, tmp_path / name)) for name in ("two", "swapped"))
    in_two_files(two)
    in_two_files(swapped, ("a", "b"))
    assert "another tokenizer" in refused(tmp_path, [two, swapped]).what
    assert "another tokenizer" in refused(tmp_path, [base, swapped]).what
    ends = Path(shutil.copytree(base, tmp_path / "ends"))
    (ends / names.GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [257, 258]}))
    made(tmp_path / "both", [base, ends])
    result = made(tmp_path / "result", [two, base])
    assert main(["generate", str(result), "--prompt", "x", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--how", "average", "--t", "0.5"], "is an option of interpolate"),
        (["--how", "weighted_sum", "--density", "0.5"], "is an option of ties"),
        (["--how", "interpolate"], "lies between two"),
        (["--how", "average", "--data", "rows.jsonl"], "greedy_soup"),
        (["--whole", "--rank", "4"], "is for a result that is an adapter"),
        (["--dtype", "float32"], "is for a result that is a whole model"),
        (["--rank", "0"], "--rank"),
        (["--how", "soup"], "--how must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, steps = pair(tmp_path, "three")
    assert main(["combine", *map(str, steps), "--out_dir", str(tmp_path / "result"), *words]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("paths", "words", "why"),
    [
        ([], [], "nothing is given"),
        (["A", "A"], [], "is given twice"),
        (["A:0", "B:0"], [], "every weight is 0"),
        (["A:-1", "B"], [], "a weight is a share"),
        (["A:0.5", "B"], ["--how", "ema"], "gives the weights itself"),
        (["A:-1", "B"], ["--how", "ties"], "a weight is a share"),
        (["A:x", "B"], [], "is no weight"),
        (["A", "nowhere"], [], "there is no such directory"),
    ],
)
def test_weights_and_paths_that_mean_nothing_are_refused(
    tmp_path: Path, paths: list[str], words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, steps = pair(tmp_path, "the same twice")
    given = [re.sub("^[AB](?=:|$)", lambda found: str(steps[found[0] == "B"]), path) for path in paths]
    assert main(["combine", *given, "--out_dir", str(tmp_path / "result"), *words]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "result").exists()


def test_a_run_means_its_whole_steps_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """step-9 before step-10, and a torn one not at all."""
    base = make_talker(tmp_path / "base")
    for step in (10, 9, 11):
        make_talking_step(tmp_path / "run", step, base)
    flip(tmp_path / "run" / "step-11" / names.ADAPTER_WEIGHTS, 5000)
    assert main(["combine", str(tmp_path / "run"), "--how", "ema", "--decay", "0.75", "--out_dir", str(tmp_path / "result")]) == 0
    assert "2 whole steps, step-9, step-10" in capsys.readouterr().err
    parents = read_manifest(tmp_path / "result").lineage[0]["parents"]
    assert [(parent["step"], parent["weight"]) for parent in parents] == [(9, 0.75), (10, 0.25)]
    assert read_manifest(tmp_path / "result").step == 10


# ---- the greedy soup -------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=6), salt=st.integers(0, 99))
def test_a_greedy_soup_is_never_worse_than_its_best_candidate(losses: list[float], salt: int) -> None:
    """Whatever the averages cost. (Mutations: a candidate is kept where the loss rises; candidates tried in the order they were given.)"""
    asked: list[tuple[int, ...]] = []

    def measure(members: tuple[int, ...]) -> float:
        asked.append(members)
        return math.modf(sum((number + 1) * 0.37 for number in members) + salt * 0.11)[0] * 10

    attempts = greedy(losses, measure)
    kept = [attempt for attempt in attempts if attempt.kept]
    assert attempts[0].loss == min(losses) and losses[attempts[0].candidate] == min(losses)
    assert [losses[attempt.candidate] for attempt in attempts] == sorted(losses)
    assert [attempt.loss for attempt in kept] == sorted((attempt.loss for attempt in kept), reverse=True)
    assert kept[-1].loss <= min(losses) and kept[-1].members == tuple(sorted(attempt.candidate for attempt in kept))
    assert asked == [attempt.members for attempt in attempts[1:]]


def test_a_soup_is_measured_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss that the manifest records is what `litlora evaluate` finds on the same rows, and not above any candidate's."""
    base = make_talker(tmp_path / "base")
    steps = [make_talking_step(tmp_path / "run", step, base) for step in (10, 20, 30)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": f"{n} times"}) + "\n" for n in range(6)))
    result = tmp_path / "result"
    words = ["combine", str(tmp_path / "run"), "--how", "greedy_soup", "--data", str(rows), "--threads", "1", "--out_dir", str(result)]
    code = "import os, sys; os.rename = lambda *_: os.kill(os.getpid(), 9); from litlora.__main__ import main; main(sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True, cwd=ROOT).returncode == -9
    assert len(list(tmp_path.glob(".tmp-*/.tmp-*/" + names.ADAPTER_WEIGHTS))) == 1  # what a dying process leaves; the next start removes it
    assert main(words) == 0
    said = capsys.readouterr().err
    found = []
    for path in (*steps, result):
        words = ["--data", str(rows), "--exact_match", "false", "--json", "--threads", "1"]
        assert main(["evaluate", str(path), *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    record = read_manifest(result)
    assert record.val_loss == pytest.approx(found[-1], rel=1e-6) and found[-1] <= min(found[:-1]) + 1e-9
    event = record.lineage[0]
    assert event["losses"] == pytest.approx(found[:-1], abs=1e-6) and len(event["attempts"]) == 3
    assert sum(parent["weight"] for parent in event["parents"]) == pytest.approx(1)
    assert all(f"{loss:.4f}" in said for loss in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "result", "rows.jsonl", "run"]


def test_a_soup_without_rows_takes_those_that_its_run_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_talker(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": str(n)}) + "\n" for n in range(20)))
    words = f"finetune lora {base} --data {rows} --out_dir {tmp_path / 'run'} --train.max_steps 4 --train.save_interval 2 --lora.r 2"
    words += " --train.global_batch_size 2 --eval.fraction 0.2 --eval.interval 2 --threads 1 --train.lr 1e-2 --train.lr_warmup_steps 0"
    assert main(words.split()) == 0
    capsys.readouterr()
    assert main(["combine", str(tmp_path / "run"), "--how", "greedy_soup", "--out_dir", str(tmp_path / "soup"), "--threads", "1"]) == 0
    said = capsys.readouterr().err
    assert "measured on the 4 validation rows" in said
    for step in (2, 4):
        recorded = read_manifest(tmp_path / "run" / f"step-{step}").val_loss
        measured = re.search(rf"step-{step}: loss ([\d.]+) \(recorded ([\d.]+)\)", said)
        assert recorded is not None and measured is not None
        assert float(measured[1]) == pytest.approx(recorded, abs=2e-4) and float(measured[2]) == pytest.approx(recorded, abs=1e-4)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "step-4"), "--exact_match", "false", "--json", "--threads", "1"]) == 0
    found = capsys.readouterr()  # so does evaluate: rows of the demo would say nothing of this run. Caught: the demo's rows, as it was
    assert f"4 samples that the run {tmp_path / 'run'} held out of {rows}" in found.err
    recorded = read_manifest(tmp_path / "run" / "step-4").val_loss
    assert json.loads(found.out)["loss"] == pytest.approx(recorded, abs=2e-4)
    run_yaml = tmp_path / "run" / names.RUN_YAML
    run_yaml.write_text(run_yaml.read_text().replace("litlora finetune lora", "litlora nonsense", 1))  # caught: KeyError
    assert main(["evaluate", str(tmp_path / "run" / "step-4"), "--exact_match", "false", "--max_samples", "2", "--threads", "1"]) == 0
    assert "held out of" not in capsys.readouterr().err
    alone = make_talking_step(tmp_path / "other", 10, base)
    steps = [str(tmp_path / "run" / "step-2"), str(alone)]
    assert main(["combine", *steps, "--how", "greedy_soup", "--out_dir", str(tmp_path / "no"), "--threads", "1"]) == 2
    assert "not steps of one run" in capsys.readouterr().err
