"""`litlora inspect`: what a path is, where it comes from, and how far its training moved each module, against the weights themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from talkers import make_talker

from litlora.__main__ import main
from litlora.checkpoint.movement import movement
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.weights import load_model
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
    made = {"base": Path(base)}
    for name, words in METHODS.items():
        out = place / name
        options = f"--checkpoint_dir {base} --data {rows} --out_dir {out} --train.max_steps 3 --train.global_batch_size 2 --train.lr 1e-2"
        options += " --train.lr_warmup_steps 0 --eval.fraction 0 --threads 1"
        assert main(["finetune", *words.split(), *options.split()]) == 0
        made[name] = out / "step-3"
    return made


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_says_what_it_is_and_that_everything_moved(runs: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK N08, A03: every module that was to be trained lies elsewhere than before."""
    found = inspected(runs[name], capsys)
    assert (found["kind"], found["method"], found["step"]) == ("a step of a run", METHODS[name].split()[0], 3)
    assert found["moved"] and all(far > 0 for far in found["moved"].values())
    if name == "full":
        assert found["parent"] == str(runs["base"].resolve())
    else:
        assert str(runs["base"]) in found["base"] and "the one it was trained on" in found["base"]
        assert (found["merges"] is True) == (name not in ("prompt", "series"))


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


def test_a_base_a_run_and_a_lost_base_are_described(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that cannot be used any more is still described."""
    assert inspected(runs["base"], capsys)["kind"] == "a whole model"
    assert inspected(runs["lora"].parent, capsys)["path"] == str(runs["lora"])
    moved = runs["base"].with_name("moved")
    runs["base"].rename(moved)
    try:
        found = inspected(runs["lora"], capsys)
        assert "not usable" in found["base"] and "moved" not in found
    finally:
        moved.rename(runs["base"])


def test_a_person_reads_one_line_per_kind_of_module(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(runs["lora"])]) == 0
    text = capsys.readouterr().out
    assert "self_attn.q_proj" in text and " x, " in text and text.count("q_proj") == 1
