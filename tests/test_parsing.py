"""From words to options: what is understood, what is refused, and with which hint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.__main__ import main
from litlora.errors import UserError
from litlora.options import Chat, FinetuneLoRA, Generate, MergeLoRA
from litlora.parsing import leaves, parse, to_yaml


def finetune(*words: str) -> FinetuneLoRA:
    return parse(FinetuneLoRA, words, command="finetune lora")


def test_no_words_give_the_defaults() -> None:
    options = finetune()
    assert options == FinetuneLoRA()
    assert (options.lora.r, options.lora.alpha, options.train.lr, options.data) == (16, 32.0, None, ["demo"])


def test_the_first_bare_word_is_the_checkpoint() -> None:
    """DESIGN section 7: `litlora chat out/step-200`."""
    assert parse(Chat, ["out/step-200"], command="chat").checkpoint_dir == "out/step-200"
    assert parse(MergeLoRA, ["42", "--dtype", "float16"], command="merge_lora").checkpoint_dir == "42"


def test_lists_are_gathered_from_repeats_and_from_several_values() -> None:
    assert finetune("--data", "a.json", "--data", "b.json:2").data == ["a.json", "b.json:2"]
    assert finetune("--lora.target_modules", "q_proj", "v_proj").lora.target_modules == ["q_proj", "v_proj"]


def test_switches_need_no_value_and_take_one() -> None:
    assert finetune("--resume").resume
    assert not finetune("--train.packing", "false").train.packing
    assert finetune("--lora.use_dora", "--train.lr", "1e-3").train.lr == 1e-3


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--learning_rate", "1"], "no option --learning_rate", "here it is --train.lr"),
        (["--lora_r", "8"], "no option --lora_r", "here it is --lora.r"),
        (["--train.lrr", "1"], "no option --train.lrr", "train.lr"),
        (["--train.epo", "1"], "no option --train.epo", "epochs"),
        (["--train.lr", "fast"], "--train.lr must be a number, not fast", "--help"),
        (["--train.max_steps", "3.5"], "--train.max_steps must be a whole number", "--help"),
        (["--train.lr", "nan"], "--train.lr must be", ""),
        (["--train.lr", "-1"], "--train.lr must be at least 0", ""),
        (["--lora.r", "0"], "--lora.r must be at least 1", ""),
        (["--train.lr_schedule", "step"], "{cosine,linear,constant}", "--help"),
        (["--data"], "--data needs a value", ""),
        (["--train.lr"], "--train.lr needs a value", ""),
        (["base", "stray"], "'stray' belongs to no option", "--name value"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_hint(words: list[str], message: str, hint: str) -> None:
    """DESIGN section 7: did you mean, with the names that peers use."""
    with pytest.raises(UserError) as refusal:
        finetune(*words)
    assert message in str(refusal.value)
    assert hint in refusal.value.hint


def test_options_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  lr: 1e-3\n  epochs: 5\nlora: {r: 4}\n")
    (tmp_path / "b.yaml").write_text("train: {lr: 2e-3, max_steps: null}\ndata: [x.json]\n")
    options = finetune("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"), "--lora.r", "2")
    assert (options.train.lr, options.train.epochs, options.lora.r, options.data) == (2e-3, 5.0, 2, ["x.json"])


def test_written_options_read_back_equal(tmp_path: Path) -> None:
    """run.yaml replays a run."""
    options = finetune("--data", "a b.json", "--train.lr", "1e-3", "--lora.target_modules", "q_proj", "--out_dir", "123", "--resume")
    (tmp_path / "run.yaml").write_text(to_yaml(options))
    assert finetune("--config", str(tmp_path / "run.yaml")) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lrr: 1", "no option train.lrr"),
        ("train: {lr: fast}", "--train.lr must be a number"),
        ("a: [1", "not valid YAML"),
        ("- 1\n", "holds no options"),
        ('a: !!python/object/apply:os.system ["true"]', "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    """YARDSTICK S06: YAML is data, never code."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        finetune("--config", str(path))
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("value", ["-rf", "a b", "x;$(touch y)", "line\nbreak", "n" * 255, "--like-an-option=1", "'quoted\"", "naïve/路径"])
def test_any_text_is_only_a_value(value: str) -> None:
    """YARDSTICK S06: no shell is ever used, and a path may look like anything."""
    assert finetune(f"--out_dir={value}").out_dir == value
    assert finetune("--data", *([value] if not value.startswith("--") else ["x"])).data


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["--train.lr", "--data", "--config", "1", "true", "--lora.r=", "--resume"]), max_size=5)
)
def test_any_words_are_parsed_or_refused(words: list[str]) -> None:
    """YARDSTICK Z01: only the documented exception."""
    words = [word for word in words if word not in ("-h", "--help", "--print_config")]
    try:
        finetune(*words)
    except UserError:
        pass


def test_exit_codes_and_messages_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """DESIGN section 7: 0 done, 2 refused."""
    assert main(["--help"]) == 0
    assert "litlora finetune lora" in capsys.readouterr().out
    assert main(["finetune", "lora", "--learning_rate", "1"]) == 2
    shown = capsys.readouterr().err
    assert shown == "error: no option --learning_rate\nhint: here it is --train.lr\n"
    assert main(["finetune_lora"]) == 2
    assert "litlora finetune lora" in capsys.readouterr().err
    assert main(["chta"]) == 2
    assert "did you mean chat?" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_help_shows_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Generate, ["--help"], command="generate")
    shown = capsys.readouterr().out
    for leaf in leaves(Generate):
        assert f"--{leaf.name}" in shown


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`litlora --help | head -1` ends quietly."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    line = f"{sys.executable} -m litlora --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
