"""What a method cannot do with a base is refused before anything is trained, and what it can do is not changed by how it is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_tokens, tiny_config, tiny_gpt
from safetensors.torch import load_file
from talkers import make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.errors import UserError
from litlora.methods import from_manifest, from_peft, tuning_of
from litlora.methods.attach import add, attach
from litlora.methods.tuning import Tuning
from litlora.options import AdapterOptions, FreezeOptions, LoRAOptions
from litlora.peft import AdapterConfig, to_peft_name

REFUSED: dict[str, tuple[Any, str]] = {
    "pissa with more components than a module has": (LoRAOptions(init="pissa", r=32), "than model.layers.0.self_attn.k_proj has: 24"),
    "an alpha of zero for some modules": (LoRAOptions(alpha_pattern=["down_proj=0"]), "a number above 0"),
    "a negative alpha for some modules": (LoRAOptions(alpha_pattern=["down_proj=-1"]), "a number above 0"),
    "targets outside the layers": (
        AdapterOptions(kind="scale_shift", layers=["0"], target_modules=["model.layers.1.self_attn.q_proj"], norms=False),
        "nothing is left to learn",
    ),
    "an option of another kind": (AdapterOptions(kind="series", length=7), "an option of kind prompt"),
    "a word that means nothing beside all": (FreezeOptions(modules=["all", "bogus"]), "no module of this model is named bogus"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_options_that_cannot_be_meant_are_refused(case: tuple[Any, str]) -> None:
    options, said = case
    with pytest.raises(UserError, match=said):
        tuning_of(options, tiny_config())


def test_dora_on_rows_of_zeros_is_refused_by_name() -> None:
    """Their direction is 0 / 0. Every new block of an expanded model has such rows."""
    model = tiny_gpt()
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.o_proj.weight").zero_()
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj"):
        attach(model, tuning_of(LoRAOptions(use_dora=True), model.config), seed=0)


def test_the_copy_of_the_base_in_a_file_is_compared_with_the_base_in_any_order() -> None:
    """A head that another adapter trained whole is not the base any more; the base that was is still known."""
    model = tiny_gpt()
    config = model.config
    lora = from_peft(AdapterConfig(r=2, alpha=2, target_modules=["lm_head"]), config)
    tensors = {name: torch.randn(shape) for name, shape in lora.file_shapes(config).items()}
    tensors[to_peft_name("lm_head.base_layer.weight")] = model.lm_head.weight.detach().clone()
    whole = Tuning(whole=("lm_head.weight",))
    changed = {"lm_head.weight": model.lm_head.weight.detach() + 1}
    add(model, whole, changed)
    add(model, lora, tensors)
    first = model(random_tokens(1, 5))
    other = tiny_gpt()
    add(other, lora, tensors)
    add(other, whole, changed)
    assert torch.equal(first, other(random_tokens(1, 5)))


# ---- by the real commands --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """`run("finetune full --train.lr 0.1")` on a tiny base and rows, in a directory of its own."""
    base = make_talker(tmp_path / "base")
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def typed(words: str, out: str = "out") -> int:
        more = f"--checkpoint_dir {base} --data {tmp_path / 'rows.json'} --out_dir {tmp_path / out}"
        if not words.startswith("extend_vocab"):
            more += " --train.max_steps 2 --eval.fraction 0 --threads 1"
        return main([*words.split(), *more.split()])

    return typed


@pytest.mark.parametrize("words", ["full", "freeze --freeze.layers last:1", "lora --lora.modules_to_save lm_head"])
def test_what_is_trained_starts_from_the_stored_numbers_whatever_is_computed_in(run: Any, tmp_path: Path, words: str) -> None:
    """A rate that moves nothing: what is saved differs from the base by no rounding to bf16. Caught: fp32 copies of bf16 numbers."""
    assert run(f"finetune {words} --precision bf16 --train.lr 1e-9") == 0
    base = load_file(tmp_path / "base" / names.WEIGHTS)
    step = tmp_path / "out" / "step-2"
    saved = next(path for path in step.glob("*.safetensors") if path.name != names.TRAINING_STATE)
    for name, tensor in load_file(saved).items():
        plain = name.removeprefix("base_model.model.")
        if plain in base:
            assert (tensor - base[plain]).abs().max() <= 1e-7, name


def test_a_run_of_full_is_not_resumed_with_another_config(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK R04: the weights are the same, what is computed with them is not."""
    assert run("finetune full --train.lr 1e-3") == 0
    path = tmp_path / "base" / names.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500.0}))
    assert main(["finetune", "full", "--resume", "--out_dir", str(tmp_path / "out"), "--train.max_steps", "3"]) == 2
    assert "shape" in capsys.readouterr().err


def test_inspect_follows_a_resumed_run_back_to_what_it_began_with(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("finetune full --train.lr 1e-2") == 0
    assert main(["finetune", "full", "--resume", "--out_dir", str(tmp_path / "out"), "--train.max_steps", "3"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out" / "step-3"), "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)["moved"]["lm_head.weight"]
    base, now = (load_file(place / names.WEIGHTS)["lm_head.weight"] for place in (tmp_path / "base", tmp_path / "out" / "step-3"))
    assert moved == pytest.approx(((now - base).norm() / base.norm()).item(), rel=1e-4)


@pytest.mark.parametrize(
    "words",
    ["pretrain --model.hidden_size 16", "pretrain --dtype float32", "pretrain --chat_template nofile", "extend_vocab --vocab_size 400"],
)
def test_what_does_not_go_with_a_given_model_is_refused(run: Any, tmp_path: Path, words: str) -> None:
    """Exit code 2, and nothing is written, least of all into the base."""
    assert run(words, out="base/inner" if words.startswith("extend") else "out") == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "base" / "inner").exists()


def test_a_record_with_a_value_of_another_kind_is_refused_by_its_name() -> None:
    """A manifest is sealed, but whoever sealed it may have been another version."""
    with pytest.raises(UserError, match="scale is None"):
        from_manifest("adapter", {"kind": "series", "scale": None}, tiny_config(), "litlora.json")
    with pytest.raises(UserError, match="not those of pro"):
        from_manifest("pro", {"unknown": 1}, tiny_config(), "litlora.json")
