"""What a user types: every command of README, tutorials and config_hub runs as written (small sizes), and bad input is refused.

Most run in this process, for speed; what is about processes (kill -9, signals, two ranks) runs the real command.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import make_base
from conftest import ROOT, shared_data
from talkers import byte_tokenizer, make_talker

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.commands import COMMANDS, Command
from litlora.data import demo
from litlora.methods import METHODS

TRAINED = "--train.global_batch_size 1 --train.max_steps 2 --eval.max_samples 2 --threads 1 --overwrite"
SMALL = {  # what is added to a documented command of this name, so that it is done in a moment
    "finetune": TRAINED,
    "pretrain": TRAINED.replace("batch_size 1", "batch_size 2"),
    "generate": "--max_new_tokens 4 --threads 1",
    "chat": "--max_new_tokens 4 --threads 1",
    "evaluate": "--max_samples 2 --max_new_tokens 4 --threads 1",
    "merge_lora": "--overwrite",
    "combine": "",
    "convert": "",
    "inspect": "",
    "data": "",
    "list": "",
    "note": "",
    "verify": "",
    "diff": "",
}
ROWS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]


def documented() -> dict[str, list[str]]:
    """file -> its litlora commands in their order: the shell blocks of README and tutorials, and the first lines of config_hub."""
    found: dict[str, list[str]] = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.splitlines():
                line = re.sub(r"(^|\s)#\s.*", "", line).strip()  # a tag inside quotes is no comment
                for part in line.split("&&"):
                    part = part.strip().removeprefix(".venv/bin/")
                    if part.startswith("litlora "):
                        found.setdefault(path.name, []).append(part)
    for path in sorted((ROOT / "config_hub").rglob("*.yaml")):
        found[str(path.relative_to(ROOT))] = [path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")]
    return found


def typed(command: str, source: str) -> list[str]:
    """The words of a documented command, made small; a run that names no directory goes into one of its own."""
    words = shlex.split(command)[1:]
    words += SMALL.get(words[0], "").split()
    if "--resume" in words:
        return [word for word in words if word != "--overwrite"] + ["--train.max_steps", "301"]
    if words[0] == "finetune" and "--out_dir" not in words:
        words += ["--out_dir", "out/" + re.sub(r"\W", "-", source)]
    return [word for word in words if word != "--overwrite"] if "--dry_run" in words else words


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run of the demo stands, `rows.jsonl` and `models/...` beside it."""
    place = tmp_path_factory.mktemp("workplace")
    here = Path.cwd()
    os.chdir(place)
    try:
        for name in ("tutorials", "config_hub"):
            shutil.copytree(ROOT / name, place / name)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        for name in sorted(set(re.findall(r"models/([\w.-]+)", "\n".join(command for each in documented().values() for command in each)))):
            (place / "models").mkdir(exist_ok=True)
            make_base(place / "models" / name, vocab_size=288, max_position_embeddings=256, num_hidden_layers=6)
            byte_tokenizer(place / "models" / name)
        assert main(["finetune", "lora", *TRAINED.split(), "--train.max_steps", "300"]) == 0
    finally:
        os.chdir(here)
    return place


@pytest.mark.parametrize("source", documented())
def test_every_documented_command_runs(workplace: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """README, tutorials and the first line of each recipe; those of one file in their order, for one takes what another made."""
    monkeypatch.chdir(workplace)
    for name in ("text", "chats"):  # what the demo's base was trained on: a tenth of it will do
        part, count, makers = demo.FILES[name]
        monkeypatch.setitem(demo.FILES, name, (part, count // 10, makers))
    for command in documented()[source]:
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert main(typed(command, source)) == 0, command


def test_a_recipe_stands_for_each_method() -> None:
    """config_hub/finetune/MODEL/METHOD.yaml begins with the command of that method; the demo has them all."""
    for path in (ROOT / "config_hub" / "finetune").rglob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f"# litlora finetune {path.stem} --config {path.relative_to(ROOT)}"), path
    assert {path.stem for path in (ROOT / "config_hub" / "finetune" / "demo").iterdir()} == set(METHODS)


def test_the_readme_names_the_three_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("litlora finetune lora", "litlora merge_lora --checkpoint_dir out/step-200", "litlora chat"):
        assert f"    {command}\n" in text


def test_the_readme_lists_every_command() -> None:
    """Caught: a command's row taken out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for word, inside in COMMANDS.items():
        of_method = word == "estimate"  # its row names one method whole, and the others after it
        names = [word] if isinstance(inside, Command) else [f"{word} {name}" for name in inside][: 1 if of_method else None]
        assert [name for name in names if f"`litlora {name}`" not in text] == []


# ---- the three commands on another base, and what others make of their results ----------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, run) of a real pretrained Llama and real Alpaca rows."""
    base = shared_data("models/stories3m-llama")
    rows = shared_data("instruct/alpaca_en_demo.json")
    run = tmp_path_factory.mktemp("real") / "out"
    words = f"--checkpoint_dir {base} --data {rows} --out_dir {run} --train.max_steps 4 --train.save_interval 2 --train.max_seq_length 96"
    words += " --train.global_batch_size 4 --train.lr 1e-2 --train.lr_warmup_steps 0 --eval.max_samples 2 --threads 1"
    assert main(["finetune", "lora", *words.split()]) == 0
    return base, run


def test_peft_loads_an_intermediate_step_with_equal_logits(trained: tuple[Path, Path]) -> None:
    """YARDSTICK N02, promise 4: a step directory is a PEFT adapter, and not a fresh one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from litlora import GPT

    base, run = trained
    tokens = torch.tensor([[1, 400, 500, 600, 700]])
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = plain(tokens).logits
        theirs = PeftModel.from_pretrained(plain, str(run / "step-2")).eval()(tokens).logits
        ours = GPT.from_pretrained(run / "step-2").eval()(tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert (before - theirs).abs().max() > 1e-3


def test_transformers_loads_the_merged_step_with_equal_logits(trained: tuple[Path, Path]) -> None:
    """YARDSTICK N05, A07."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from litlora import GPT

    _, run = trained
    assert main(["merge_lora", "--checkpoint_dir", str(run / "step-2"), "--overwrite"]) == 0
    merged = run / "step-2" / names.MERGED
    tokens = torch.tensor([[1, 400, 500, 600, 700]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(merged).eval()(tokens).logits
        ours = GPT.from_pretrained(run / "step-2").eval()(tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert AutoTokenizer.from_pretrained(merged).eos_token == "</s>"


def test_the_set_that_was_trained_is_the_set_that_is_saved(trained: tuple[Path, Path]) -> None:
    """YARDSTICK A03: and an intermediate step has the final one's format."""
    from safetensors import safe_open

    _, run = trained
    kept = []
    for step in ("step-2", "step-4"):
        with safe_open(run / step / names.ADAPTER_WEIGHTS, framework="pt") as file:
            kept.append(sorted(file.keys()))
    assert kept[0] == kept[1]
    assert len(kept[0]) == 6 * 7 * 2
    assert sorted(path.name for path in (run / "step-2").iterdir() if path.is_file()) == sorted(
        path.name for path in (run / "step-4").iterdir()
    )


def test_a_step_begins_another_run_from_its_weights(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """DESIGN section 5: the same method and shapes go on, the parent recorded; another rank is refused."""
    _, run = trained
    rows = shared_data("instruct/alpaca_en_demo.json")
    words = f"finetune lora {run}/step-4 --data {rows} --out_dir {tmp_path}/more --train.max_steps 1 --train.global_batch_size 2"
    words += " --eval.max_samples 1"
    assert main([*words.split(), "--train.max_seq_length", "64", "--lora.r", "8"]) == 2
    assert main([*words.split(), "--train.max_seq_length", "64"]) == 0
    manifest = json.loads((tmp_path / "more" / "step-1" / names.MANIFEST).read_text())
    assert manifest["parent"] == str(run / "step-4")


# ---- crashes, signals, processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, rows): a tiny base whose every command works, and rows for it."""
    place = tmp_path_factory.mktemp("talker")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    return make_talker(place / "base"), rows


def finetune_words(talker: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    base, rows = talker
    words = f"finetune lora --checkpoint_dir {base} --data {rows} --out_dir {out} --train.global_batch_size 2 --train.lr 1e-3"
    words += " --train.save_interval 5 --eval.interval 5 --eval.fraction 0.2 --lora.dropout 0.1 --threads 1 --accelerator cpu"
    return [*words.split(), *more]


def start(words: list[str], **more: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "litlora", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more)


def wait_until(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert process.poll() is None and time.monotonic() < end, "it ended, or hangs, before that"
        time.sleep(0.01)


def logged(out: Path) -> int:
    """The last step in the metrics of a run that another process writes."""
    path = out / names.METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 and lines[-1].split(",")[0].isdecimal() else -1


def final_bytes(out: Path, step: int) -> list[bytes]:
    where = out / names.step_name(step)
    rows = [line.split(",")[:8] for line in (out / names.METRICS).read_text().splitlines()]
    return [(where / name).read_bytes() for name in (names.ADAPTER_WEIGHTS, names.TRAINING_STATE)] + [json.dumps(rows).encode()]


@pytest.mark.parametrize("after", [1, 17, 31])
def test_a_run_killed_anywhere_resumes_to_the_same_bits(talker: tuple[Path, Path], tmp_path: Path, after: int) -> None:
    """YARDSTICK R01, F04, promise 3: kill -9 the real command, `--resume`, and compare weights, optimizer and metrics.

    Killed in the first steps, between commits and epochs later. Caught: resuming the optimizer without the weights.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = ("--train.max_steps", "60", "--train.log_interval", "3")
    assert main(finetune_words(talker, whole, *steps)) == 0
    process = start(finetune_words(talker, broken, *steps))
    wait_until(process, lambda: logged(broken) >= after)
    process.kill()
    process.wait()
    assert not (broken / "step-60").exists(), "it ended before it was killed"
    assert main(["finetune", "lora", "--resume", "--out_dir", str(broken)]) == 0
    assert final_bytes(broken, 60) == final_bytes(whole, 60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("after", [3, 15])
def test_a_signal_commits_and_says_so_in_the_exit_code(
    talker: tuple[Path, Path], tmp_path: Path, number: int, code: int, after: int
) -> None:
    """YARDSTICK F10, R01: what a signal leaves resumes to the uninterrupted run's weights, optimizer and metrics.

    Caught: skipping a validation that is due in the very step that a signal ends.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = ("--train.max_steps", "60", "--train.log_interval", "3", "--eval.interval", "2")
    process = start(finetune_words(talker, broken, *steps))
    wait_until(process, lambda: logged(broken) >= after)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert f"--resume --out_dir {broken}" in said
    assert not (broken / "step-60").exists(), "it ended before the signal came"
    assert main(["finetune", "lora", "--resume", "--out_dir", str(broken)]) == 0
    assert main(finetune_words(talker, whole, *steps)) == 0
    assert final_bytes(broken, 60) == final_bytes(whole, 60)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_give_the_result_of_one(talker: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    """YARDSTICK N14: gloo, unequal token counts, an odd number of samples, saving and validating in between."""
    from safetensors.torch import load_file

    steps = ["--train.max_steps", "12", "--train.lr", "1e-3"]
    alone, both = tmp_path / "alone", tmp_path / "both"

    def words(out: Path, *more: str) -> list[str]:
        found = [*finetune_words(talker, out, *steps), *more]
        lora = found.index("--lora.dropout")  # what is dropped depends on who computes it
        return ["finetune", method, *found[2:lora], *found[lora + 2 :]]

    assert main(words(alone)) == 0
    process = start(words(both, "--devices", "2", "--strategy", "ddp"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    file = names.WEIGHTS if method == "full" else names.ADAPTER_WEIGHTS
    one, two = (load_file(out / "step-12" / file) for out in (alone, both))
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-2 * 1e-3 * 12, name
    assert (alone / names.METRICS).read_text().count("\n") == (both / names.METRICS).read_text().count("\n")


# ---- bad input -------------------------------------------------------------------------------------------------------


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert shown.count("error:") == 1 and "Traceback" not in shown
    return shown[shown.index("error:") :]


def test_bad_input_gets_one_clear_error_and_nothing_is_written(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The issue's list: each with exit code 2, what and where, and no output directory afterwards."""
    base, rows = talker
    out = tmp_path / "out"

    def words(checkpoint: Path, data: Path) -> list[str]:
        return ["finetune", "lora", "--checkpoint_dir", str(checkpoint), "--data", str(data), "--out_dir", str(out)]

    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    assert "no such" in refused(words(tmp_path / "nowhere", rows), capsys).lower()
    without = spoilt("without-tokenizer")
    (without / names.TOKENIZER).unlink()
    assert "tokenizer" in refused(words(without, rows), capsys)
    torn = spoilt("torn")
    (torn / names.WEIGHTS).write_bytes((torn / names.WEIGHTS).read_bytes()[:-100])
    assert names.WEIGHTS in refused(words(torn, rows), capsys)
    gone = spoilt("gone")
    (gone / names.WEIGHTS).unlink()
    assert str(gone) in refused(words(gone, rows), capsys)
    strange = spoilt("strange")
    config = json.loads((strange / names.CONFIG).read_text())
    (strange / names.CONFIG).write_text(json.dumps({**config, "model_type": "mamba"}))
    shown = refused(words(strange, rows), capsys)
    assert "mamba" in shown and "llama" in shown and "qwen3" in shown
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in refused(words(base, empty), capsys)
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"instruction": "x" * 400, "output": "y"}) + "\n" for _ in range(4)))
    assert "graded token" in refused([*words(base, long), "--train.max_seq_length", "16"], capsys)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a" "output": "b"}\n')
    assert "broken.jsonl:2:" in refused(words(base, broken), capsys)
    in_the_way = tmp_path / "in-the-way"
    in_the_way.write_text("")
    assert "in-the-way" in refused([*words(base, rows)[:-1], str(in_the_way)], capsys)
    assert not out.exists()


def test_overwrite_deletes_nothing_before_everything_is_known_to_be_good(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost by a mistyped option. Caught: making the directory ready before the rows are read."""
    out = tmp_path / "out"
    assert main(finetune_words(talker, out, "--train.max_steps", "1")) == 0
    again = finetune_words(talker, out, "--overwrite")
    refused([*again, "--data", str(tmp_path / "typo.jsonl")], capsys)
    refused([*again, "--lora.target_modules", "typo"], capsys)
    assert (out / "step-1" / names.ADAPTER_WEIGHTS).exists()


def test_a_resumed_run_keeps_its_rows(talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YARDSTICK R04: another share held out would validate on rows that were trained on."""
    out = tmp_path / "out"
    assert main(finetune_words(talker, out, "--train.max_steps", "2")) == 0
    shown = refused(["finetune", "lora", "--resume", "--out_dir", str(out), "--eval.fraction", "0.5", "--train.max_steps", "3"], capsys)
    assert "training rows" in shown


def test_a_run_that_is_resumed_at_its_end_says_that_nothing_is_left(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Caught: never said; said of a run that goes on."""
    out = tmp_path / "out"
    assert main(finetune_words(talker, out, "--train.max_steps", "2")) == 0
    for steps, last in ((2, True), (3, False)):
        capsys.readouterr()
        assert main(["finetune", "lora", "--resume", "--out_dir", str(out), "--train.max_steps", str(steps)]) == 0
        assert ("nothing is left to do" in capsys.readouterr().err) == last


def test_a_directory_that_holds_a_run_is_not_overwritten(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DESIGN section 3; and a resumed run must be the same run (YARDSTICK R04)."""
    out = tmp_path / "out"
    assert main(finetune_words(talker, out, "--train.max_steps", "2")) == 0
    before = (out / "step-2" / names.ADAPTER_WEIGHTS).read_bytes()
    assert "--resume" in refused(finetune_words(talker, out, "--train.max_steps", "2"), capsys)
    shown = refused(["finetune", "lora", "--resume", "--out_dir", str(out), "--lora.r", "4", "--train.max_steps", "3"], capsys)
    assert "lora.r: 16 then, 4 now" in shown
    assert (out / "step-2" / names.ADAPTER_WEIGHTS).read_bytes() == before
    assert main(["finetune", "lora", "--resume", "--out_dir", str(out), "--train.lr", "1e-5", "--train.max_steps", "3"]) == 0
    assert main(finetune_words(talker, out, "--train.max_steps", "1", "--overwrite")) == 0
    assert not (out / "step-2").exists()


def test_an_adapter_is_refused_on_another_base_and_without_its_own(
    talker: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YARDSTICK A02: both fingerprints are shown; a moved base is found with --base_dir."""
    _, rows = talker
    base = make_talker(tmp_path / "base")
    out = tmp_path / "out"
    assert main(finetune_words((base, rows), out, "--train.max_steps", "1")) == 0
    base.rename(tmp_path / "moved")
    asked = ["generate", str(out / "step-1"), "--prompt", "a", "--max_new_tokens", "2"]
    assert "holds no base weights" in refused(asked, capsys)
    assert main([*asked, "--base_dir", str(tmp_path / "moved")]) == 0
    capsys.readouterr()
    other = make_talker(tmp_path / "other", seed=1)
    assert refused([*asked, "--base_dir", str(other)], capsys).count("xxh3:") == 2
    assert refused(["merge_lora", str(out / "step-1"), "--base_dir", str(other)], capsys).count("xxh3:") == 2
