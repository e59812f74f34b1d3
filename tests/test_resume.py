"""Going on: what may be set anew and where it is recorded, what is refused, and early stopping (YARDSTICK R04, N14, R01)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talkers import make_talker
from test_saving import weights_of, words

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.history import options_of
from litlora.checkpoint.manifest import read_manifest
from litlora.checkpoint.resolve import list_steps
from litlora.options import EvalOptions, FinetuneLoRA, Pretrain
from litlora.train import loop
from litlora.train.metrics import read
from litlora.train.paths import absolute

Talker = tuple[Path, Path]


@pytest.fixture
def talker(tmp_path: Path) -> Talker:
    """(base, rows), which a test may change."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Name a colour, {n}.", "output": "blue" * (n % 4 + 1)}) + "\n" for n in range(24)))
    return make_talker(tmp_path / "base"), rows


def resumed(out: Path, more: str = "") -> int:
    return main(["finetune", "lora", "--resume", "--out_dir", str(out), *more.split()])


def lineage_of(step: Path) -> list[dict[str, Any]]:
    return list(read_manifest(step).lineage)


# ---- what may change -------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_sets_anew_is_said_and_recorded_in_every_later_step(
    talker: Talker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R04: rate, schedule and length may change. The record goes on through a second resuming, and into a run begun from a step."""
    out, more = tmp_path / "out", tmp_path / "more"
    assert main(words(talker, out, more="--train.max_steps 4")) == 0
    assert lineage_of(out / "step-4") == []
    capsys.readouterr()
    assert resumed(out, "--train.lr 2e-3 --train.lr_schedule linear --train.max_steps 8") == 0
    said = capsys.readouterr().err
    assert "train.lr: 0.001 until now, 0.002 from here on" in said and "train.max_steps: 4 until now, 8 from here on" in said
    first = {
        "event": "resumed",
        "from": str(out / "step-4"),
        "step": 4,
        "changed": {"train.max_steps": [4, 8], "train.lr": [0.001, 0.002], "train.lr_schedule": ["cosine", "linear"]},
    }
    assert lineage_of(out / "step-4") == [] and lineage_of(out / "step-8") == [first]
    assert resumed(out, "--train.max_steps 12") == 0
    second = {"event": "resumed", "from": str(out / "step-8"), "step": 8, "changed": {"train.max_steps": [8, 12]}}
    assert lineage_of(out / "step-12") == [first, second]
    start = words((out / "step-12", talker[1]), more, more="--train.max_steps 2")
    assert main(start) == 0
    assert lineage_of(more / "step-2") == [first, second]
    assert read_manifest(more / "step-2").parent == str(out / "step-12")


def test_a_resuming_that_changes_nothing_is_recorded_as_that(talker: Talker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(words(talker, out)) == 0
    shutil.rmtree(out / "step-12")
    capsys.readouterr()
    assert resumed(out) == 0
    assert "until now" not in capsys.readouterr().err
    assert lineage_of(out / "step-12") == [{"event": "resumed", "from": str(out / "step-8"), "step": 8, "changed": {}}]


# ---- where what it reads lies ----------------------------------------------------------------------------------------


def test_a_run_is_resumed_where_its_base_moved(talker: Talker, tmp_path: Path) -> None:
    """--base_dir says where it is now, once: it is written down. Caught: looked for at its old place, whatever --base_dir said."""
    out = tmp_path / "out"
    assert main(words(talker, out, more="--train.max_steps 4")) == 0
    there = talker[0].rename(tmp_path / "there")
    assert resumed(out, "--train.max_steps 5") == 2
    assert resumed(out, f"--train.max_steps 5 --base_dir {there}") == 0
    assert resumed(out, "--train.max_steps 6") == 0
    assert (out / "step-6").is_dir()


@pytest.mark.parametrize("moved", [False, True], ids=["", "moved"])
def test_a_run_is_resumed_and_evaluated_from_any_directory(
    moved: bool, talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun with relative paths; and where it moved together with what it reads. Caught: looked for in the directory of the day."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for place in (home, elsewhere):
        place.mkdir()
    for path in talker:
        path.rename(home / path.name)
    shutil.copyfile(home / "rows.jsonl", home / "val.jsonl")
    (home / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    monkeypatch.chdir(home)
    more = "--train.max_steps 4 --eval.data val.jsonl --chat_template mine.jinja"
    assert main(words((Path("base"), Path("rows.jsonl:2")), Path("out"), more=more)) == 0
    if moved:
        home = home.rename(tmp_path / "away")
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert resumed(home / "out", "--train.max_steps 8") == 0, capsys.readouterr().err
    assert main(["evaluate", str(home / "out"), "--exact_match", "false", "--threads", "1"]) == 0
    assert f"24 samples that the run {home / 'out'} held out of {home / 'val.jsonl'}" in capsys.readouterr().err
    options = options_of(home / "out")
    assert (options["data"], options["checkpoint_dir"]) == ([f"{home / 'rows.jsonl'}:2"], str(home / "base"))
    assert main(["finetune", "lora", "--config", str(home / "out" / names.RUN_YAML), "--out_dir", "again", "--train.max_steps", "4"]) == 0
    assert weights_of(elsewhere / "again" / "step-4") == weights_of(home / "out" / "step-4")


def test_only_paths_are_written_as_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` and its parts, a template's name and weights stay what they are; a link stays a link. Caught: a way up through a directory
    that may be gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").symlink_to(__file__)
    data = ["demo", "demo:2", "demo:text", "rows.jsonl", "rows.jsonl:0.5", "a:2", "/x/rows.jsonl:3", "../up.jsonl"]
    options = FinetuneLoRA(data=data, checkpoint_dir="demo", chat_template="alpaca", base_dir="b")
    here = absolute(options, template_is_file=False)
    assert here.data == [
        *("demo", "demo:2", "demo:text", f"{tmp_path}/rows.jsonl", f"{tmp_path}/rows.jsonl:0.5"),
        *(f"{tmp_path}/a:2", "/x/rows.jsonl:3", f"{tmp_path.parent}/up.jsonl"),
    ]
    assert (here.checkpoint_dir, here.chat_template, here.base_dir, here.eval.data) == ("demo", "alpaca", f"{tmp_path}/b", None)
    assert here.out_dir == f"{tmp_path}/out"
    (tmp_path / "demo").mkdir()  # which is then what is meant
    assert absolute(options, template_is_file=True).checkpoint_dir == f"{tmp_path}/demo"
    fresh = absolute(Pretrain(tokenizer_dir="t", eval=EvalOptions(data="v.jsonl:2")), template_is_file=False)
    assert (fresh.tokenizer_dir, fresh.checkpoint_dir, fresh.eval.data) == (f"{tmp_path}/t", None, f"{tmp_path}/v.jsonl:2")


# ---- what may not ----------------------------------------------------------------------------------------------------


def another_row(base: Path, rows: Path) -> None:
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0].replace("colour", "color"), *lines[1:]]) + "\n")


def another_template(base: Path, rows: Path) -> None:
    path = base / names.TOKENIZER_CONFIG
    path.write_text(path.read_text().replace("{{ message.content }}", "{{ message.content }} "))


def another_token(base: Path, rows: Path) -> None:
    path = base / names.TOKENIZER
    values = json.loads(path.read_text())
    values["added_tokens"][-1]["content"] = "<|fin|>"
    path.write_text(json.dumps(values))


def another_base(base: Path, rows: Path) -> None:
    make_talker(base.parent / "other", seed=1)
    shutil.copy(base.parent / "other" / names.WEIGHTS, base / names.WEIGHTS)


REFUSED: dict[str, tuple[Callable[[Path, Path], None] | None, str, str]] = {
    "rank": (None, "--lora.r 8", "lora.r: 4 then, 8 now"),
    "targets": (None, "--lora.target_modules q_proj", "lora.target_modules"),
    "seed": (None, "--seed 5", "seed: 1234 then, 5 now"),
    "batch": (None, "--train.global_batch_size 3", "train.global_batch_size: 2 then, 3 now"),
    "rows": (another_row, "", "data: "),
    "template": (another_template, "", "chat template: "),
    "chosen template": (None, "--chat_template alpaca", "chat template: "),
    "tokenizer": (another_token, "", "tokenizer: "),
    "base": (another_base, "", "base: xxh3:"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused_with_the_difference(talker: Talker, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """R04: exit code 2, both values shown, and nothing in the directory is touched."""
    change, more, shown = REFUSED[case]
    out = tmp_path / "out"
    assert main(words(talker, out, more="--train.max_steps 2")) == 0
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    if change:
        change(*talker)
    capsys.readouterr()
    assert resumed(out, f"{more} --train.max_steps 4") == 2
    said = capsys.readouterr().err
    assert "cannot be resumed" in said and shown in said and said.count("error:") == 1
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("case", ["--lora.r 8 --lora.target_modules q_proj --seed 5 --train.packing false", "a GPU's batches"])
def test_what_another_run_is_refused_with_says_what_to_type(
    talker: Talker, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R04: with these words it goes on; also where nobody typed what differs, as on a GPU, which takes larger micro-batches.

    Caught: `run with the same settings` alone; a truth value as Python writes it.
    """
    out = tmp_path / "out"
    assert main(words(talker, out, more="--train.max_steps 2 --lora.target_modules q_proj v_proj")) == 0
    if gpu := not case.startswith("--"):
        monkeypatch.setattr(loop, "CPU_TOKENS", 8 * loop.CPU_TOKENS)
    capsys.readouterr()
    assert resumed(out, f"{'' if gpu else case} --train.max_steps 4") == 2
    typed = capsys.readouterr().err.partition("hint: run with the same settings (")[2].partition(")")[0]
    rows = "--lora.r 4 --lora.target_modules q_proj v_proj --seed 1234 --train.packing true"
    assert typed == ("--train.micro_batch_tokens 1024" if gpu else rows)
    assert resumed(out, f"{typed} --train.max_steps 4") == 0


# ---- early stopping --------------------------------------------------------------------------------------------------


def losses_from(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation finds these, by how many updates were made."""
    step = 0

    def found(fabric: Any, model: Any, *more: Any) -> tuple[float, int]:
        return losses[step], 10

    def stepped(*args: Any, **more: Any) -> Any:
        nonlocal step
        step = round(step_of(args[2])) + 1
        return train_step(*args, **more)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "evaluate", found)
    monkeypatch.setattr(loop, "train_step", stepped)


def step_of(optimizer: Any) -> float:
    """How many updates an optimizer has made: its own state says."""
    return max((float(state["step"]) for state in optimizer.optimizer.state.values()), default=0.0)


LOSSES = {0: 9.0, 1: 3.0, 2: 2.0, 3: 2.5, 4: 1.5, 5: 1.5, 6: 1.6, 7: 1.7, 8: 1.0, 9: 2.0, 10: 2.0, 11: 2.0, 12: 2.0}
PATIENT = "--train.patience 3 --eval.interval 1 --train.save_interval 5"


def test_training_stops_where_patience_is_at_its_end(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third validation that is not below the lowest: step 7, which is committed though none was due. An equal loss is no lower one.

    Each new lowest loss is committed too: what patience waited for must be there. Mutation: only every fifth step.
    """
    losses_from(monkeypatch, LOSSES)
    assert main(words(talker, tmp_path / "out", more=PATIENT)) == 0
    said = capsys.readouterr()
    assert "stopped: 3 validations brought no loss below 1.5000" in said.err
    assert said.out == f"{tmp_path / 'out' / 'step-7'}\n"
    assert [step.number for step in list_steps(tmp_path / "out")] == [1, 2, 4, 5, 7]
    assert resumed(tmp_path / "out") == 0  # it is over, and stays so
    assert [step.number for step in list_steps(tmp_path / "out")] == [1, 2, 4, 5, 7]
    assert resumed(tmp_path / "out", "--train.patience 4") == 0  # unless more patience is asked for
    assert [step.number for step in list_steps(tmp_path / "out")] == [1, 2, 4, 5, 7, 8, 10, 12]
    assert lineage_of(tmp_path / "out" / "step-12")[-1]["changed"] == {"train.patience": [3, 4]}


def test_a_resumed_run_has_as_much_patience_left_as_the_uninterrupted_one(
    talker: Talker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R01: stopped at step 5, one validation after the lowest loss. Mutation: keeping the lowest loss but not how long ago it was."""
    losses_from(monkeypatch, LOSSES)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(talker, whole, more=PATIENT)) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "step-7")
    assert resumed(broken) == 0
    assert [step.number for step in list_steps(broken)] == [1, 2, 4, 5, 7]
    assert weights_of(broken / "step-7") == weights_of(whole / "step-7")
    assert [row["step"] for row in read(broken / names.METRICS)] == [row["step"] for row in read(whole / names.METRICS)]


@pytest.mark.parametrize("more", ["--eval.interval 0", "--eval.fraction 0"])
def test_patience_without_validation_is_refused(talker: Talker, tmp_path: Path, more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(talker, tmp_path / "out", more=f"{PATIENT} {more}")) == 2
    assert "--train.patience" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
