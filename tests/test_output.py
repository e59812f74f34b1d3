"""Results on standard output: what programs read, and what is said where they cannot be written."""

import dataclasses
import errno
import gc
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from talkers import make_step, make_talker

from litlora import console, options
from litlora.__main__ import main, share_cores
from litlora.commands import COMMANDS, Command, Commands
from litlora.errors import UserError, printable
from litlora.generation import room
from litlora.importing import import_whole

NASTY = "r\x9b31m\x7f\u202e\U000e0041é好\u2028"  # a terminal's command, delete, right to left, a tag, letters, a line's end
JSON = {  # every command with --json
    "inspect": "RUN/step-9",
    "list": "RUN",
    "verify": "RUN",
    "diff": "RUN/step-9 RUN/step-10",
    "data inspect": "ROWS --checkpoint_dir RUN/step-9 --number 1",
    "data validate": "ROWS",
    "generate": "RUN/step-9 --prompt NASTY --max_new_tokens 2",
    "evaluate": "RUN/step-9 --data ROWS --max_new_tokens 2",
}
TEXT = [f"{name} {rest}" for name, rest in JSON.items()]
OTHERS = [
    "",
    "--help",
    "--version",
    "list --help",
    "finetune lora --print_config",
    "note RUN/step-9",
    "estimate lora BASE --data ROWS --eval.fraction 0",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("places") / NASTY
    place.mkdir()
    base = make_talker(place / "base")
    for step in (9, 10):
        make_step(place / "run", step, base, val_loss=1.0 / step)
    rows = place / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": NASTY}, {"role": "assistant", "content": NASTY}]}
    rows.write_text(f"{json.dumps(row)}\n" * 4)
    return {"RUN": str(place / "run"), "BASE": str(base), "ROWS": str(rows), "NASTY": NASTY}


def filled(command: str, words: dict[str, str]) -> list[str]:
    return [next((word.replace(name, value) for name, value in words.items() if word.startswith(name)), word) for word in command.split()]


def texts(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for each in inner for text in texts(each)]


def leaves(table: Commands, before: str = "") -> dict[str, Command]:
    found: dict[str, Command] = {}
    for word, inside in table.items():
        found |= {before + word: inside} if isinstance(inside, Command) else leaves(inside, f"{before}{word} ")
    return found


def test_one_of_a_thing_is_said_as_one() -> None:
    """Caught: `1 rows`, `1 steps (1 epochs)`."""
    said = [console.counted(number, "row") for number in (0, 1, 2, 1600, 1.0, 0.5, 1234567.0)]
    assert said == ["0 rows", "1 row", "2 rows", "1,600 rows", "1 row", "0.5 rows", "1,234,567 rows"]
    assert [console.counted(number, "row was", "rows were") for number in (1, 3)] == ["1 row was", "3 rows were"]
    assert [console.counted(number, "epoch") for number in (math.inf, math.nan)] == ["inf epochs", "nan epochs"]  # of a run.yaml
    assert (console.amount(1), console.amount(12)) == ("1 byte", "12 bytes")


def test_a_large_count_has_its_commas() -> None:
    """Caught: `the prompt has 140000 tokens and the model's context 131072`."""
    with pytest.raises(UserError, match="has 140,000 tokens and the model's context 131,072") as refused:
        room(140_000, 131_072)
    assert refused.value.hint == "shorten it to fewer than 131,072 tokens"


def test_every_command_that_writes_json_is_tried_here() -> None:
    with_json = {
        name
        for name, leaf in leaves(COMMANDS).items()
        if any(field.name == "json" for field in dataclasses.fields(getattr(options, leaf.options)))
    }
    assert with_json == set(JSON)


@pytest.mark.parametrize("command", JSON)
def test_json_holds_what_a_terminal_would_obey_as_escapes(command: str, words: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Names and texts of somebody else's come back as they are; nothing in what is printed is a command, or hides. Letters stay letters.

    Caught: ASCII or not, everything written as `json.dumps` gives it; `harmless` text, which is no JSON.
    """
    main([*filled(f"{command} {JSON[command]}", words), "--json"])
    out = capsys.readouterr().out
    assert out and all(printable(letter) == letter for letter in out.replace("\n", ""))
    assert "é好" in out or command == "evaluate"
    assert command == "evaluate" or "\\u009b31m\\u007f\\u202e\\udb40\\udc41" in out
    assert command == "evaluate" or any(NASTY in text for text in texts(json.loads(out)))


@example("\x7f", None)
@settings(max_examples=50, deadline=None)
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.sampled_from([None, 2]))
def test_what_is_escaped_is_read_back_as_it_was(value: object, indent: int | None) -> None:
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "put", written.append)
        console.put_json(value, indent)
    assert json.loads(written[0]) == value
    assert all(printable(letter, keep="\n") == letter for letter in written[0])
    written[0].encode()  # a lone surrogate is no text, but its escape is


class Full(io.StringIO):
    """A file on a disk without room."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", [*TEXT, *(f"{line} --json" for line in TEXT), *OTHERS])
def test_a_result_that_cannot_be_written_is_said(
    command: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F07: exit code 1, and what it was that could not be written. Caught: a plain `print` in place of `put`."""
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(filled(command, words)) == 1
    assert "error: standard output: cannot be written: No space left on device\nhint: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"), [(errno.EPIPE, 0, ""), (errno.ENOSPC, 1, "error: standard output: cannot be written: ")]
)
def test_a_table_on_a_terminal_that_cannot_be_written_is_as_any_result(
    error: int, code: int, said: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """F07: a reader that went away is no error, a full disk is said. Caught: rich's own writing, which ends the process with 1, or says
    neither where nor what to do."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(filled("list RUN", words)) == code
    shown = capsys.readouterr().err
    assert shown.startswith(said) if said else "error" not in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_process_whose_output_is_full_says_it_once(unbuffered: str) -> None:
    """F07: nothing more is said at its end, and the exit code stays 1. Caught: what was left in the buffer written again
    (exit code 120)."""
    command = [sys.executable, "-m", "litlora", "--help"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: standard output: cannot be written") and done.stderr.count(b"\n") == 2


@pytest.mark.parametrize(("command", "code"), [("--version", 0), ("fine_tune", 2)])
def test_a_process_that_ends_at_once_has_said_and_done_everything(command: str, code: int) -> None:
    """C7: torch is not taken apart at the end; what is still in a buffer, or left for the end, is not lost by it.

    Caught: no flush; no call of what is registered; 0 whatever happened.
    """
    script = f"""
import atexit, sys
atexit.register(sys.stdout.write, "the last word")  # first registered, last called: who comes between may flush
import torch
from litlora.__main__ import main
sys.stdout.write("the first word, ")
sys.argv = ["litlora", "{command}"]
sys.exit(main())
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("the first word, ") and done.stdout.endswith("the last word")


def test_garbage_is_collected_again_after_an_import_that_fails() -> None:
    """C7: nothing is collected while torch is imported, and everything is afterwards. Caught: enabled only where the import succeeds."""
    with pytest.raises(ModuleNotFoundError):
        import_whole("no_such_module")
    assert gc.isenabled()


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a�]0;x�\n\té🙂\u200d�"), (False, "a\x1b]0;x\x07\n\té🙂\u200d\x9b")])
@pytest.mark.parametrize("command", ["generate RUN/step-9 --prompt x", "generate RUN/step-9 --prompts LINES", "chat RUN/step-9"])
def test_a_model_s_words_cannot_take_a_terminal_over(
    command: str, terminal: bool, shown: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere than on one they are as they came. Caught: `put` instead of `put_words`, in each of the three places."""
    lines = Path(words["ROWS"]).with_name("lines.txt")
    lines.write_text("x\n")
    monkeypatch.setattr("litlora.generation.Answer.push", nasty_push)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main([*filled(command, words | {"LINES": str(lines)}), "--max_new_tokens", "1"]) == 0
    assert shown in capsys.readouterr().out


def nasty_push(answer: Any, token_id: int) -> str:
    answer.ids.append(token_id)
    answer.text, answer.finish_reason = "a\x1b]0;x\x07\n\té🙂\u200d\x9b", "length"
    return str(answer.text)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_progress_line_is_never_cut_short(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught at 80 columns: `step 3… ━━ loss`, the step and the times cut for a bar."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in (("TERM", "xterm"), ("COLUMNS", str(columns)), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.Progress(30_000, "step") as progress:
        progress.update(29_999, loss="0.0379", val="0.0327", lr="2.9e-08", **{"tok/s": "7.5k"}, memory="10.4 GB")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "29999/30000" in shown and "loss 0.0379" in shown and "…" not in shown
    assert ("memory 10.4 GB" in shown, "━" in shown) == (columns == 200, columns == 200)


def test_a_log_has_few_lines_of_progress_and_always_the_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where each state is a line for ever: one in ten seconds, and how far it came. Caught: a line a second; none of where it stopped."""
    clock = [0.0]
    monkeypatch.setattr("litlora.console.time.monotonic", lambda: clock[0])
    with console.Progress(100, "step") as progress:
        for step in range(1, 26):
            clock[0] += 1.0
            progress.update(step, loss="0.5")
    assert capsys.readouterr().err.splitlines() == [f"step={step}/100 loss=0.5" for step in (10, 20, 25)]
    with console.Progress(3, "step") as progress:
        for step in (1, 2, 3):
            progress.update(step)
    assert capsys.readouterr().err == "step=3/3\n"


@pytest.mark.parametrize("said", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_threads_wait_as_who_runs_it_says(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught: a word of the user's replaced."""
    monkeypatch.setattr(os, "environ", dict(said))
    share_cores()
    assert os.environ == (said or {"GOMP_SPINCOUNT": "10000"})
