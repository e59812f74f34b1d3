"""`litlora verify`: what was altered, lost or put on another base is named, with exit code 1."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from talkers import make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.safetensors_file import SafetensorsFile


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and out/ with the two steps of a real run, the second one merged."""
    place = tmp_path_factory.mktemp("verify")
    base = make_talker(place / "base")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    (place / "rows.json").write_text(json.dumps(rows))
    words = f"--checkpoint_dir {base} --data {place / 'rows.json'} --out_dir {place / 'out'} --train.max_steps 2 --train.save_interval 1"
    assert main(["finetune", "lora", *words.split(), "--eval.fraction", "0", "--train.lr", "1e-2", "--threads", "1"]) == 0
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


def verified(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = main(["verify", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def faults(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What failed, in one text; the exit code must be 1."""
    code, found = verified(path, capsys)
    assert code == 1
    return "\n".join(fault for finding in found for fault in finding["faults"])


def test_what_is_whole_passes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (place / "base", place / "out", place / "out" / "step-1", place / "out" / "step-2" / names.MERGED):
        code, found = verified(path, capsys)
        assert (code, [fault for finding in found for fault in finding["faults"]]) == (0, []) and found


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
    (other / names.MERGE_REPORT).write_text(json.dumps(report))
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


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x04
    path.write_bytes(raw)
