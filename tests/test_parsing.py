"""From words to options: what is understood, what is refused, and with which hint."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_output import leaves as commands_of

from litlora import __main__ as door
from litlora import options as declared
from litlora.__main__ import PEER_COMMANDS, main
from litlora.commands import COMMANDS
from litlora.errors import Interrupted, UserError
from litlora.options import Chat, FinetuneLoRA, Generate, MergeLoRA, Pretrain, TrainOptions, WriteNote
from litlora.parsing import leaves, parse, to_yaml


def finetune(*words: str) -> FinetuneLoRA:
    return parse(FinetuneLoRA, words, command="finetune lora")


def test_no_words_give_the_defaults() -> None:
    """Of every command. Caught: a group's own defaults lost where they differ from its class's."""
    for name, command in commands_of(COMMANDS).items():
        kind = getattr(declared, command.options)
        assert parse(kind, [], command=name) == kind(), name
    options = finetune()
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
        (["--train.lrr", "1"], "no option --train.lrr", "did you mean --train.lr?"),
        (["--train.epo", "1"], "no option --train.epo", "epochs"),
        (["--train.lr", "fast"], "--train.lr must be a number, not fast", "litlora finetune lora --help lists the options"),
        (["--train.max_steps", "3.5"], "--train.max_steps must be a whole number", "--help"),
        (["--train.lr", "nan"], "--train.lr must be", ""),
        (["--train.lr", "-1"], "--train.lr must be at least 0", ""),
        (["--train.beta2", "1"], "--train.beta2 must be at least 0 and below 1", ""),
        (["--strategy", "fsdp"], "--strategy must be {auto,ddp}", "--help"),
        (["--accelerator", "gpu"], "--accelerator must be {auto,cpu,cuda,mps}", "--help"),
        (["--lora.r", "0"], "--lora.r must be at least 1", ""),
        (["--quantize", "int4"], "--quantize must be {auto,none,bf16,int8,nf4,nf4-dq}, not int4", "nf4 (4 bits, QLoRA's)"),
        (["--load_in_4bit", "true"], "no option --load_in_4bit", "here it is --quantize"),
        (["--train.lr_schedule", "step"], "{cosine,linear,constant}", "--help"),
        (["--data"], "--data needs a value", ""),
        (["--train.lr"], "--train.lr needs a value", ""),
        (["base", "stray"], "'stray' belongs to no option", "--name value"),
        (["--resume", "out/run"], "'out/run' belongs to no option", "--resume takes no value but true or false"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_hint(words: list[str], message: str, hint: str) -> None:
    """DESIGN section 7: did you mean, with the names that peers use."""
    with pytest.raises(UserError) as refusal:
        finetune(*words)
    assert message in str(refusal.value)
    assert hint in refusal.value.hint


@pytest.mark.parametrize("kind", [MergeLoRA, Pretrain, declared.Verify, declared.Convert])
def test_a_command_that_holds_no_weights_in_few_bits_says_which_do(kind: type) -> None:
    with pytest.raises(UserError, match="no option --quantize") as refusal:
        parse(kind, ["--quantize", "nf4"], command="x")
    assert "finetune, estimate, generate, chat and evaluate have it" in refusal.value.hint


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


TEXTS = [
    "null", "~", "", "Null", "true", "1e-3", "007", "1.10", "[a",
    "{a: b}", "- a", "a: b", " padded ", "#1", "🙂", "two\nlines", "<<", "=",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_verbatim_and_survives_the_file(tmp_path: Path, text: str) -> None:
    """YAML's null, numbers and dates are words on the command line, also for `str | None`. Caught: jsonargparse for text."""
    options = parse(Generate, [f"--prompt={text}", f"--stop={text}", f"--system={text}"], command="generate")
    assert (options.prompt, options.stop, options.system) == (text, [text], text)
    (tmp_path / "run.yaml").write_text(to_yaml(options), encoding="utf-8")
    assert parse(Generate, ["--config", str(tmp_path / "run.yaml")], command="generate") == options


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.none() | st.integers(1))
def test_any_options_survive_the_file(tmp_path_factory: pytest.TempPathFactory, text: str, number: int | None) -> None:
    """YARDSTICK Z01: what is written reads back, whatever a text looks like."""
    options = Generate(prompt=text, stop=[text, "null"], max_new_tokens=number)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(to_yaml(options).encode())
    assert parse(Generate, ["--config", str(path)], command="generate") == options


def test_null_in_a_file_unsets_and_other_values_stay_what_was_typed(tmp_path: Path) -> None:
    """`out_dir: 0123` is no octal number. Caught: safe_load."""
    (tmp_path / "a.yaml").write_text("checkpoint_dir: base\nbase_dir: b\ntrain: {max_steps: 5}\n")
    (tmp_path / "b.yaml").write_text(
        "checkpoint_dir: null\nbase_dir: 'null'\nout_dir: 0123\ntrain: {max_steps: ~, packing: no, lr: 1e-3}\neval: {data: 2024-01-01}\n"
    )
    options = finetune("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (options.checkpoint_dir, options.base_dir, options.out_dir, options.eval.data) == (None, "null", "0123", "2024-01-01")
    assert (options.train.max_steps, options.train.packing, options.train.lr) == (None, False, 1e-3)


def test_one_word_in_a_file_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: rows.jsonl\nlora: {target_modules: all-linear}\nrows: {map: [prompt=q, output=1]}\n")
    options = finetune("--config", str(path))
    assert (options.data, options.lora.target_modules, options.rows.map) == (["rows.jsonl"], ["all-linear"], ["prompt=q", "output=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: null", "--data must be texts, not null"),
        ("data: [a, [b]]", "--data must be texts"),
        ("out_dir: null", "--out_dir must be a text, not null"),
        ("out_dir: [a]", "--out_dir must be a text"),
        ("seed: null", "--seed must be a whole number, not null"),
        ("seed: {a: 1}", "--seed must be a whole number"),
        ("train: {epochs: [1]}", "--train.epochs must be a number"),
        ("train: &a {b: *a}", "nested too deep"),
        ("seed: !!set {a}", "not valid YAML"),
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
    assert main(["finetune", "qlora"]) == 2
    assert "here it is litlora finetune lora --quantize nf4" in capsys.readouterr().err
    assert main(["estimate", "qlora"]) == 2
    assert "here it is litlora estimate lora --quantize nf4" in capsys.readouterr().err
    assert main(["data"]) == 0
    assert "litlora data inspect rows.jsonl" in capsys.readouterr().out


def test_a_config_that_is_not_there_has_a_hint(tmp_path: Path) -> None:
    """A path that is not there always has one: the close name beside it, else to look again."""
    (tmp_path / "lora.yaml").write_text("seed: 1\n")
    for name, hint in (("lora.yml", "did you mean lora.yaml?"), ("a/b", "look at the path, from the directory you are in")):
        with pytest.raises(UserError, match="there is no such file") as caught:
            finetune("--config", str(tmp_path / name))
        assert (caught.value.where, caught.value.hint) == (str(tmp_path / name), hint)
    with pytest.raises(UserError, match="cannot be read") as caught:
        finetune("--config", str(tmp_path))
    assert caught.value.hint == "--config takes a YAML file of options"


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (
            "finetune --data my.jsonl",
            "litlora finetune needs lora, adapter, pro, freeze or full before",
            "finetune lora --data my.jsonl",
        ),
        ("finetune models/Base", "full before models/Base", "finetune lora models/Base"),
        ("data rows.jsonl", "litlora data needs inspect or validate before rows.jsonl", "litlora data inspect rows.jsonl"),
        ("finetune LoRA", "no command 'litlora finetune LoRA'", "did you mean lora?"),
        ("finetune nosuch", "no command 'litlora finetune nosuch'", "litlora finetune --help lists the commands"),
        ("out/step-100", "litlora needs a command before out/step-100", "litlora inspect out/step-100"),
        ("--out_dir x", "no command 'litlora --out_dir'", "litlora --help lists the commands"),
    ],
)
def test_a_word_that_is_missing_is_asked_for(words: str, what: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Caught: `no command 'litlora finetune --data'` and where the commands are listed, but not that a method is needed."""
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert what in said and hint in said


@pytest.mark.parametrize("word", ["finetune", "estimate", "data"])
def test_a_command_of_several_says_what_each_does_and_what_to_type(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What it shows as an example is understood."""
    assert main([word]) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS[word].items():  # type: ignore[union-attr]
        assert f"  {name} " in said and command.help in said  # type: ignore[union-attr]
    shown = [line.split()[1:] for line in said.splitlines() if line.startswith("  litlora ")]
    assert shown
    for words in shown:
        table: Any = COMMANDS[words[0]]
        parse(getattr(declared, table[words[1]].options), words[2:], command=word)


def test_what_peers_call_a_command_leads_to_one_that_is_understood() -> None:
    """DESIGN section 7: what is refused says what to type."""
    for meant in PEER_COMMANDS.values():
        command, method, *words = meant.split()
        inside = COMMANDS[command]
        assert isinstance(inside, dict)
        assert method in inside
        finetune(*words)  # UserError where an option is not known
    assert main(["--version"]) == 0


@pytest.mark.parametrize("kind", [Generate, FinetuneLoRA])
def test_help_shows_every_option_and_its_default(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a default of 0; a switch is off where nothing is said. Caught: no defaults; none that is 0; the last option left out."""
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], command="x")
    entries = [" ".join(entry.split()) for entry in capsys.readouterr().out.split("\n  --")[1:]]
    for leaf in leaves(kind):
        (entry,) = [entry for entry in entries if entry.partition(" ")[0] == leaf.name]
        said = re.search(r" \[([^\[\]]*)\]$", entry)
        if isinstance(leaf.default, int | float) and leaf.default is not False:
            assert said and said[1] == str(leaf.default), entry
        elif leaf.default:
            words = leaf.default if leaf.is_list else [leaf.default]
            assert said and said[1].split() == list(map(str, words)), entry
        else:
            assert not said, entry


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`litlora --help | head -1` ends quietly."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    line = f"{sys.executable} -m litlora --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, env=environment)
    assert done.stderr == ""


# ---- a run that is resumed -------------------------------------------------------------------------------------------


def resumed(tmp_path: Path, *words: str) -> FinetuneLoRA:
    """What `finetune lora` is given for words that resume the run in `out`."""
    run = tmp_path / "out"
    run.mkdir(exist_ok=True)
    before = ("--lora.r=3", "--lora.alpha=5", "--train.epochs=7", "--out_dir=where/it/was", "--checkpoint_dir=base")
    (run / "run.yaml").write_text(to_yaml(finetune(*before)))
    (tmp_path / "mine.yaml").write_text(f"resume: true\nout_dir: {run}\nlora: {{alpha: 6}}\ntrain: {{epochs: 8}}\n")
    made: FinetuneLoRA = door.parsed_options(FinetuneLoRA, words, "finetune lora")
    return made


def test_a_resumed_run_has_its_options_and_what_is_given_now_wins(tmp_path: Path) -> None:
    """run.yaml comes before the user's own files; `resume` may stand in one of them. Caught: run.yaml behind them."""
    options = resumed(tmp_path, "--config", str(tmp_path / "mine.yaml"), "--train.epochs", "9")
    assert (options.lora.r, options.lora.alpha, options.train.epochs, options.checkpoint_dir) == (3, 6.0, 9.0, "base")
    assert (options.resume, options.out_dir) == (True, str(tmp_path / "out"))


def test_a_resumed_run_takes_the_first_bare_word_as_its_checkpoint(tmp_path: Path) -> None:
    options = resumed(tmp_path, "moved/base", "--resume", "--out_dir", str(tmp_path / "out"))
    assert (options.checkpoint_dir, options.lora.r, options.out_dir) == ("moved/base", 3, str(tmp_path / "out"))


def test_a_run_that_moved_is_resumed_where_it_is_and_shown_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run.yaml names where it was made; the default `out` is where it is."""
    monkeypatch.chdir(tmp_path)
    assert resumed(tmp_path, "--resume").out_dir == "out"
    with pytest.raises(SystemExit):
        resumed(tmp_path, "--resume", "--print_config")
    assert "  r: 3\n" in capsys.readouterr().out


def test_what_has_no_options_of_a_run_is_not_resumed_with_those_of_the_demo(tmp_path: Path) -> None:
    """Refused at once, unless a file gives them. Caught: the demo's taken, which its checkpoints then refuse one by one."""
    out = tmp_path / "out"
    for make, what, hint in (
        (lambda: None, "holds no run to go on with", "leave --resume out to begin one"),
        (lambda: out.mkdir(), "holds no run to go on with", "leave --resume out to begin one"),
        (
            lambda: (out / "step-9").mkdir(),
            "holds checkpoints, and no run.yaml that says how they were trained",
            f"put its run.yaml back, or begin a new run from its weights: --checkpoint_dir {out}/last --out_dir another",
        ),
    ):
        make()
        with pytest.raises(UserError) as refused:
            door.parsed_options(FinetuneLoRA, ["--resume", "--out_dir", str(out), "--lora.r", "4"], "finetune lora")
        assert (refused.value.what, refused.value.where, refused.value.hint) == (what, str(out), hint)
    kept = tmp_path / "kept.yaml"
    kept.write_text(to_yaml(finetune("--lora.r=3")))
    words = ["--config", str(kept), "--resume", "--out_dir", str(out)]
    assert door.parsed_options(FinetuneLoRA, words, "finetune lora").lora.r == 3


# ---- the door --------------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


SMALLER = "in training, a smaller --train.micro_batch_tokens keeps the same result"


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (Interrupted(2, "committed step-7\nlitlora finetune lora --resume"), 130, "committed step-7\nlitlora finetune lora --resume\n"),
        (Interrupted(15), 143, ""),
        (ValueError("no such\nlong story"), 1, "error: ValueError: no such\nhint: --debug shows where\n"),
        (RuntimeError(), 1, "error: RuntimeError\nhint: --debug shows where\n"),
        (AssertionError("us"), 1, "error: AssertionError: us\nhint: this is a bug, please report it; --debug shows where\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'\nhint: this is a bug, please report it; --debug shows where\n"),
        (
            OutOfMemoryError("CUDA"),
            1,
            f"error: out of memory\nhint: {SMALLER}\n",
        ),
    ],
)
def test_whatever_happens_inside_is_told_in_two_lines(
    error: Exception, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DESIGN section 7: a traceback only with --debug. Caught: `except ValueError` alone at the door."""

    def broken(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(door, "run", broken)
    assert main([]) == code
    assert capsys.readouterr().err == shown
    with pytest.raises(type(error)):
        main(["--debug"])


# ---- help ------------------------------------------------------------------------------------------------------------


def help_of(kind: type, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], command="x")
    return " ".join(capsys.readouterr().out.split())


def test_the_help_of_an_estimate_speaks_of_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    """Caught: "Fine-tune a model with LoRA.", as its options say."""
    for command, first in (
        ("estimate", "The memory and the time that litlora finetune lora would take with the same options."),
        ("finetune", "Fine-tune a model with LoRA."),
    ):
        with pytest.raises(SystemExit):
            main([command, "lora", "--help"])
        assert capsys.readouterr().out.splitlines()[2] == first


def test_the_help_is_true_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The learning rate's default is the method's; what None stands for is said only where the default is None."""
    rates = "lora 2e-4, adapter 1e-3, pro 5e-5, freeze 2e-5, full 1e-5, a new model 3e-3; more for the demo base"
    default = f"highest learning rate (default: {rates}) --"
    assert default in help_of(FinetuneLoRA, capsys)
    shown = help_of(Pretrain, capsys)
    assert default in shown
    assert "tokens computed at once (default: 1024, on a GPU 8192; never changes the result)" in shown
    for kind in (FinetuneLoRA, Pretrain):
        assert parse(kind, [], command="x") == kind()
    assert TrainOptions().micro_batch_tokens is None


def test_a_command_may_take_several_bare_words() -> None:
    """`litlora note out/step-200 "sounds right"`; a command without them takes one, the checkpoint."""
    taken = parse(WriteNote, ["out/step-200", "sounds right", "--append"], command="note")
    assert (taken.checkpoint_dir, taken.text, taken.append) == ("out/step-200", "sounds right", True)
    with pytest.raises(UserError, match="'b' belongs to no option"):
        parse(Pretrain, ["a", "b"], command="pretrain")


def test_every_group_and_command_says_what_it_is() -> None:
    """Without a docstring a dataclass's help begins with its own signature."""
    kinds: list[Any] = [kind for kind in vars(declared).values() if dataclasses.is_dataclass(kind)]
    assert len(kinds) > 10
    assert not [kind.__name__ for kind in kinds if kind.__doc__.startswith(f"{kind.__name__}(")]


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize(
    "command",
    ["finetune lora", "pretrain --data demo", "estimate lora", "generate demo --prompt x", "chat demo", "evaluate demo", "verify demo"],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    command: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 is for what was refused before work began. Caught: commands that answer or measure had no such option, and where a GPU
    was found no way around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert main([*command.split(), "--accelerator", device]) == 2
    out, err = capsys.readouterr()
    assert f"--accelerator {device}: torch" in err and "--accelerator auto takes what is there" in err
    assert not out and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", ["generate demo --prompt x --max_new_tokens 3", "evaluate demo --max_samples 1", "verify demo --data demo"]
)
def test_a_gpu_that_is_there_can_be_left_alone(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU without room, or one that another process has: --accelerator cpu answers and measures beside it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main([*command.split(), "--accelerator", "cpu", *(["--max_samples", "1"] if "verify" in command else [])]) == 0
    assert capsys.readouterr().out
