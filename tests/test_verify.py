"""`litlora verify`: what was altered, lost or put on another base is named, with exit code 1."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from talkers import make_talker
from test_merge import exact, read
from test_merge import merged as merge_of
from test_merge_methods import CASES, case

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import tensor_digests
from litlora.checkpoint.manifest import SEAL, seal
from litlora.checkpoint.reading import file_in, sha256
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.shards import find_shards
from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile, from_float32, write_safetensors
from litlora.verify.weights import compare_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and out/ with the two steps of a real run, the second one merged."""
    place = tmp_path_factory.mktemp("verify")
    base = make_talker(place / "base")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    (place / "rows.json").write_text(json.dumps(rows))
    words = f"--checkpoint_dir {base} --data {place / 'rows.json'} --out_dir {place / 'out'} --train.max_steps 2 --train.save_interval 1"
    assert main(["finetune", "lora", *words.split(), "--eval.fraction", "0", "--train.lr", "1e-3", "--threads", "1"]) == 0
    assert main(["merge_lora", str(place / "out" / "step-2")]) == 0
    return place


@pytest.fixture
def place(trained: Path) -> Iterator[Path]:
    """The same to damage; what it was is put back afterwards, under the paths that its manifests name."""
    aside = trained.with_name("aside")
    shutil.copytree(trained, aside)
    yield trained
    shutil.rmtree(trained)
    aside.rename(trained)


def verified(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = main(["verify", str(path), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def faults(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What failed, in one text; the exit code must be 1."""
    code, found = verified(path, capsys, *more)
    assert code == 1
    return "\n".join(fault for finding in found for fault in finding["faults"])


def test_what_is_whole_passes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (place / "base", place / "out", place / "out" / "step-1", place / "out" / "step-2" / names.MERGED):
        code, found = verified(path, capsys)
        assert (code, [fault for finding in found for fault in finding["faults"]]) == (0, []) and found


def test_the_best_of_a_run_is_looked_at_as_the_step_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hashes and its training state too, as under its own name."""
    assert verified(place / "out" / names.LAST, capsys) == verified(place / "out" / "step-2", capsys)


def test_without_a_path_the_run_in_out_is_looked_at_else_the_demo_base(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As every command that reads a checkpoint; of the run all its steps."""
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--json"]) == 0
    said = capsys.readouterr()
    assert {one["path"] for one in json.loads(said.out)} == {str(names.DEMO_BASE)} and "no run in out" in said.err
    monkeypatch.chdir(place)
    assert main(["verify", "--json"]) == 0
    assert {one["path"] for one in json.loads(capsys.readouterr().out)} == {"out/step-1", "out/step-2"}


def test_a_run_without_a_step_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / names.RUN_YAML).write_text("")
    assert main(["verify", str(tmp_path)]) == 2
    assert "without a checkpoint" in capsys.readouterr().err


def test_one_flipped_bit_of_a_step_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK F03: also in a run, where the other step passes."""
    path = place / "out" / "step-1" / names.ADAPTER_WEIGHTS
    flip(path)
    assert names.ADAPTER_WEIGHTS in faults(place / "out", capsys)
    assert verified(place / "out" / "step-2", capsys)[0] == 0


def test_another_base_under_the_same_name_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK A02: every byte is read again, whatever was remembered of the file."""
    flip(place / "base" / names.WEIGHTS)
    found = faults(place / "out" / "step-1", capsys)
    assert "its weights are others" in found or "holds other weights" in found
    shutil.rmtree(place / "base")
    assert "its base is not there" in faults(place / "out" / "step-1", capsys)


def test_a_base_that_moved_is_said_once_and_where_to_name_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once for a step, whatever else could be looked at with its base. Caught: the tensors looked at without it; the hint dropped."""
    (place / "base").rename(place / "moved")
    step = place / "out" / "step-1"
    capsys.readouterr()
    assert main(["verify", str(step), "--data", str(place / "rows.json")]) == 1
    said = capsys.readouterr()
    assert said.out.count("FAILED") == said.out.count("its base is not there") == 1
    assert "1 of 3 checks failed" in said.err and "hint: if the base moved, give its directory as --base_dir" in said.err
    code, found = verified(step, capsys)
    assert code == 1 and [finding["hint"] for finding in found if finding["faults"]] == [
        "if the base moved, give its directory as --base_dir"
    ]
    assert main(["verify", str(step), "--base_dir", str(place / "moved")]) == 0


def test_a_merged_model_that_was_altered_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = place / "out" / "step-2" / names.MERGED
    flip(merged / names.WEIGHTS)
    assert "was altered" in faults(merged, capsys)


def test_a_merge_of_something_else_is_found_by_its_logits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its report and its hashes agree with each other; only computing shows it. Caught: verifying against the report alone."""
    merged, other = place / "out" / "step-2" / names.MERGED, place / "out" / "step-1" / names.MERGED
    assert main(["merge_lora", str(place / "out" / "step-1")]) == 0
    report = json.loads((other / names.MERGE_REPORT).read_text())
    report["adapter"] = json.loads((merged / names.MERGE_REPORT).read_text())["adapter"]
    (other / names.MERGE_REPORT).write_bytes(sealed(report))
    assert "computes something else" in faults(other, capsys)


def test_a_base_with_a_number_that_is_none_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "base" / names.WEIGHTS
    with SafetensorsFile(path) as file:
        info = file.tensors["model.norm.weight"]
    assert info.dtype == "F32"
    raw = bytearray(path.read_bytes())
    raw[info.start : info.start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    assert "model.norm.weight" in faults(place / "base", capsys)


# ---- a merge whose report and hashes agree with what is wrong in it ---------------------------------------------------


Numbers = dict[str, tuple[str, np.ndarray, bytes]]


def sealed(report: Mapping[str, Any]) -> bytes:
    """With the hash of what it says now: a lie that is not told by the hash."""
    return seal({key: value for key, value in report.items() if key != SEAL})


def rewrite(merged: Path, change: Callable[[Numbers], Mapping[str, tuple[str, tuple[int, ...], Any]]]) -> None:
    """Other weights in a merged model, and the hashes of its report made to fit them."""
    changed = change(read(merged))
    kept = {name: (dtype, values.shape, raw) for name, (dtype, values, raw) in read(merged).items()}
    write_safetensors(merged / names.WEIGHTS, {**kept, **changed}, {"format": "pt"})
    report = json.loads((merged / names.MERGE_REPORT).read_text())
    report["weights"] = tensor_digests(find_shards(merged), use_cache=False)
    (merged / names.MERGE_REPORT).write_bytes(sealed(report))


def stored(values: np.ndarray, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, values.shape, from_float32(values.astype(np.float32), dtype)


def updates(place: Path) -> dict[str, np.ndarray]:
    """Module's weight -> W' - W in fp64, of step-2."""
    exactly = exact(place / "out" / "step-2", place / "base")
    before = read(place / "base")
    return {name: value - before[name][1] for name, (value, _) in exactly.items()}


def one_bit(place: Path, found: Numbers) -> dict[str, Any]:
    dtype, values, raw = found["model.layers.1.mlp.up_proj.weight"]
    flipped = bytearray(raw)
    flipped[-4 if dtype == "F32" else -2] ^= 0x01
    flipped[-3 if dtype == "F32" else -2] ^= 0x01 if dtype == "F32" else 0
    return {"model.layers.1.mlp.up_proj.weight": (dtype, values.shape, bytes(flipped))}


def layers_swapped(place: Path, found: Numbers) -> dict[str, Any]:
    base, of, one, other = (
        read(place / "base"),
        updates(place),
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    )
    pairs = ((one, other), (other, one))
    return {mine: stored(base[mine][1] + of[its], found[mine][0]) for mine, its in pairs}


def scale_off(place: Path, found: Numbers) -> dict[str, Any]:
    base, of = read(place / "base"), updates(place)
    return {name: stored(base[name][1] + 1.01 * update, found[name][0]) for name, update in of.items()}


def rounded_twice(place: Path, found: Numbers) -> dict[str, Any]:
    base, of = read(place / "base"), updates(place)
    once = {name: (base[name][1] + update).astype(np.float16).astype(np.float32) for name, update in of.items()}
    return {name: stored(values, found[name][0]) for name, values in once.items()}


def not_trained_and_changed(place: Path, found: Numbers) -> dict[str, Any]:
    dtype, values, raw = found["model.norm.weight"]
    return {"model.norm.weight": (dtype, values.shape, bytes([raw[0] ^ 1]) + raw[1:])}


def truncated(place: Path, found: Numbers) -> dict[str, Any]:
    """Cut off instead of rounded to the nearest."""
    base, of = read(place / "base"), updates(place)
    whole = {name: (base[name][1] + update).astype(np.float32) for name, update in of.items()}
    return {name: stored((values.view(np.uint32) & 0xFFFF0000).view(np.float32), found[name][0]) for name, values in whole.items()}


@pytest.mark.parametrize("wrong", [one_bit, layers_swapped, scale_off, rounded_twice, not_trained_and_changed, truncated])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_number_is_found_though_every_hash_fits(
    place: Path, capsys: pytest.CaptureFixture[str], dtype: str, wrong: Callable[[Path, Numbers], dict[str, Any]]
) -> None:
    """N04: by its tensor, without computing a logit. (Seen to fail: a bound eight times as wide;
    untouched tensors taken for equal.)"""
    merged = place / "out" / "step-2" / names.MERGED
    assert main(["merge_lora", str(merged.parent), "--dtype", dtype, "--overwrite"]) == 0
    assert verified(merged, capsys, "--level", "quick") == (0, ANY)
    rewrite(merged, lambda found: wrong(place, found))
    code, found = verified(merged, capsys, "--level", "quick")
    [told] = [finding for finding in found if finding["faults"]]
    assert code == 1 and told["what"].endswith("against base + adapter")
    tensors = {fault.split()[0] for fault in told["faults"]} - {names.MERGE_REPORT}
    assert tensors <= wrong(place, read(merged)).keys() and tensors


def test_a_report_that_claims_more_than_there_is_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = place / "out" / "step-2" / names.MERGED
    report = json.loads((merged / names.MERGE_REPORT).read_text())
    (merged / names.MERGE_REPORT).write_bytes(sealed(report | {"update_relative_norm": 2 * report["update_relative_norm"]}))
    assert "update_relative_norm" in faults(merged, capsys)


def test_a_config_of_another_model_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same tensors, same hashes, another norm: it would be served as it says."""
    merged = place / "out" / "step-2" / names.MERGED
    path, report = merged / names.CONFIG, json.loads((merged / names.MERGE_REPORT).read_text())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    report["files"][names.CONFIG] = sha256(path)
    (merged / names.MERGE_REPORT).write_bytes(sealed(report))
    assert "rms_norm_eps" in faults(merged, capsys)


@pytest.mark.parametrize("name", list(CASES))
def test_every_method_that_merges_is_compared(tmp_path: Path, name: str) -> None:
    """N04, A04, A05: what is right passes, and one number that is two units off does not, in whichever tensor it is."""
    base, step = case(tmp_path, name, "BF16")
    out = merge_of(step)
    proof = compare_weights(resolve(step), resolve(out))
    assert not proof.faults and proof.changed and proof.changed + proof.identical == proof.tensors == len(read(out))
    before = {raw for _, _, raw in read(base).values()}
    changed = [tensor for tensor, (_, values, raw) in read(out).items() if raw not in before and values.any()]
    for tensor in changed[:: max(1, len(changed) // 3)]:
        found = read(out)
        dtype, values, raw = found[tensor]
        bits = np.frombuffer(raw, np.uint16).copy()
        bits[int(np.abs(values).argmax())] ^= 2
        kept = {name: (dtype, values.shape, raw) for name, (dtype, values, raw) in found.items()}
        write_safetensors(out / names.WEIGHTS, {**kept, tensor: (dtype, values.shape, bits)}, {"format": "pt"})
        [fault, *_] = compare_weights(resolve(step), resolve(out)).faults  # the report's figures may not fit any more either
        assert fault.startswith(tensor) and "1 of" in fault
        write_safetensors(out / names.WEIGHTS, kept, {"format": "pt"})


# ---- what is gone, moved, or made of others ---------------------------------------------------------------------------


def test_an_adapter_that_is_gone_is_a_warning(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(place / "out" / "step-2" / names.MERGED, tmp_path / "alone")
    shutil.rmtree(place / "out")
    code, found = verified(tmp_path / "alone", capsys)
    assert code == 0 and "not there any more" in "".join(told for finding in found for told in finding["warnings"])


def test_a_run_that_moved_is_compared_with_the_step_above(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report says where the adapter was."""
    (place / "out").rename(place / "elsewhere")
    code, found = verified(place / "elsewhere" / "step-2" / names.MERGED, capsys)
    assert code == 0 and not any(finding["warnings"] for finding in found) and "logits" in found[-1]["what"]


def test_losses_before_and_after_are_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base, adapter and merged on given rows; the merged one's must be the adapter's."""
    merged = place / "out" / "step-2" / names.MERGED
    code, found = verified(merged, capsys, "--data", str(place / "rows.json"))
    figures = found[-1]["figures"]
    assert code == 0 and figures["samples"] == 3 and figures["apart"] <= figures["bound"]
    assert abs(figures["base"] - figures["adapter"]) > 1e-3
    rewrite(merged, lambda found: scale_off(place, found) | {"lm_head.weight": stored(1.2 * found["lm_head.weight"][1], "F32")})
    assert "merged, the loss is" in faults(merged, capsys, "--data", str(place / "rows.json"))


def test_what_a_checkpoint_was_combined_from_is_looked_at(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gone is a warning, altered a failure."""
    first, second = (resolve(place / "out" / f"step-{number}") for number in (1, 2))
    parents = [{"path": str(one.path.resolve()), "sha256": sha256(one.adapter_file()), "weight": 0.5} for one in (first, second)]
    manifest = replace(first.manifest, lineage=({"event": "combined", "parents": parents},))
    for file in (*manifest.files, names.MANIFEST):
        (place / "combined").mkdir(exist_ok=True)
        shutil.copy(first.path / file, place / "combined" / file)
    (place / "combined" / names.MANIFEST).write_bytes(manifest.encode())
    code, found = verified(place / "combined", capsys)
    assert code == 0 and sum("combined from" in finding["what"] for finding in found) == 2
    shutil.rmtree(second.path)
    code, found = verified(place / "combined", capsys)
    assert code == 0 and any("not there any more" in told for finding in found for told in finding["warnings"])
    flip(first.path / names.ADAPTER_WEIGHTS)
    assert "altered" in faults(place / "combined", capsys)


def test_a_larger_vocabulary_is_compared_with_its_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "text.txt").write_text("the thermometer theorem of the theatre\n" * 50)
    words = f"extend_vocab {place / 'base'} --data {place / 'text.txt'} --out_dir {place / 'larger'} --vocab_size 280"
    assert main(words.split()) == 0
    code, found = verified(place / "larger", capsys)
    assert code == 0 and "byte for byte" in found[-1]["what"] and not found[-1]["warnings"]
    file, report = place / "larger" / names.WEIGHTS, json.loads((place / "larger" / names.EXTEND_REPORT).read_text())
    with SafetensorsFile(file) as opened:
        start = opened.tensors["model.embed_tokens.weight"].start
    flip(file, start)
    report["weights"] = tensor_digests(find_shards(place / "larger"), use_cache=False)
    (place / "larger" / names.EXTEND_REPORT).write_text(json.dumps(report))
    assert "model.embed_tokens.weight is not the base's in its first" in faults(place / "larger", capsys)


def test_a_step_that_its_run_takes_away_meanwhile_is_no_fault(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that trains with --train.keep. Caught: `there is no such directory`, exit code 2, and the steps behind it not looked at."""
    run = next(path for path in place.rglob("step-*") if path.is_dir() and (path / names.MANIFEST).exists()).parent
    steps = sorted(path for path in run.iterdir() if path.name.startswith("step-"))
    monkeypatch.setattr("litlora.commands.verify.list_step_paths", lambda path: [run / "step-999", *steps])
    code, found = verified(run, capsys)
    assert code == 0 and found[0]["what"] == "it is gone" and "--train.keep" in found[0]["warnings"][0]
    assert len(found) > len(steps)
    with pytest.raises(UserError, match="is gone since it was looked up") as gone:
        file_in(run / "step-999", names.ADAPTER_CONFIG)
    assert gone.value.where == str(run / "step-999") and "once more" in gone.value.hint
    with pytest.raises(UserError, match="is missing"):  # caught: a directory that never was, gone with a run that trains
        file_in(run / "nowhere", names.TOKENIZER)


def test_what_may_not_be_looked_at_is_refused_as_by_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Caught: `Permission denied`, with a hint that --debug shows where, and exit code 1 as if a check had failed."""

    def closed(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path / names.MANIFEST))

    monkeypatch.setattr("litlora.commands.verify.kind_of", closed)
    assert main(["verify", str(tmp_path)]) == 2
    assert "cannot be looked at: Permission denied\nhint: check the path and who may read it" in capsys.readouterr().err


def flip(path: Path, at: int = -3) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x04
    path.write_bytes(raw)
