"""`litlora chat`, driven as people drive it: lines on a pipe, and keys at a terminal (a pty)."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from talkers import make_step, make_talker

from litlora import cpu
from litlora.__main__ import main
from litlora.checkpoint import names, weights
from litlora.commands.chat.session import Session
from litlora.commands.chat.terminal import Lines, message, unfinished
from litlora.commands.generate import open_model
from litlora.data.formats import to_messages
from litlora.data.rows import read_rows
from litlora.errors import UserError, WorkError
from litlora.generation import Conversation
from litlora.methods.attach import as_base, linears
from litlora.options import Chat, SamplingOptions
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
BRIEF = ["--max_new_tokens", "12", "--temperature", "0"]
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("chat") / "base", ends=False)


@pytest.fixture(scope="module")
def step(base: Path) -> Path:
    return make_step(base.parent / "out", 200, base)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Chat with lines on a pipe; (exit code, standard output, standard error)."""

    def run(path: Path, text: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        code = main(["chat", str(path), *BRIEF, *options])
        return code, *capsys.readouterr()

    return run


def said_by(path: Path, *turns: str, system: str | None = None, n: int = 12) -> list[str]:
    """What a chat's replies must be, each prompt computed afresh."""
    opened = open_model(Chat(), str(path), None, [])
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    replies = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        conversation = Conversation(opened.model, opened.prompts.tokenizer, opened.prompts.stop_ids)
        sampling = SamplingOptions(temperature=0.0, max_new_tokens=n)
        replies.append(conversation.ask(opened.prompts.prompt_ids(messages), sampling).all())
        messages.append({"role": "assistant", "content": replies[-1]})
    return replies


@pytest.fixture
def session(base: Path) -> Session:
    return session_on(base)


def session_on(path: Path, *adapters: str, **options: Any) -> Session:
    chosen = Chat(**{"temperature": 0.0, "max_new_tokens": 12, **options})
    return Session(open_model(chosen, str(path), None, adapters), chosen, interactive=True)


# ---- on a pipe -------------------------------------------------------------------------------------------------------


def test_on_a_pipe_each_line_is_a_turn_and_nothing_but_replies_is_printed(base: Path) -> None:
    """The real process; it imports no more than it needs (C6) and ends with 0 at the end of the input."""
    code = """
import sys
from litlora.__main__ import main
code = main(sys.argv[1:])
loaded = {"lightning_fabric", "transformers", "prompt_toolkit", "rich", "pandas"} & set(sys.modules)
assert not loaded, loaded
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, "chat", str(base), *BRIEF], input=b"hello\n\nagain\n", capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "".join(f"{reply}\n" for reply in said_by(base, "hello", "again"))
    assert str(base) in done.stderr.decode()
    assert "tok/s" not in done.stderr.decode()


def test_the_banner_says_what_was_chosen_and_why(step: Path, talk: Talk) -> None:
    _, _, notes = talk(step.parent, "")
    assert str(step) in notes
    assert "newest" in notes
    assert re.search(r"base +.*/base", notes)
    assert "256 tokens" in notes


def test_the_demo_says_that_it_is_a_toy(base: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DESIGN section 7: every use of the demo says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "DEMO_BASE", base)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "toy" in talk(Path("demo"), "")[2]
    assert "toy" not in talk(base.parent / "base/../base", "")[2]


def test_a_block_and_a_backslash_make_one_turn_of_several_lines(base: Path, talk: Talk) -> None:
    code, out, _ = talk(base, '"""\none\n\ntwo\n"""\nthree\\\nfour\n"""five"""\nsix\\')
    assert (code, out) == (0, "".join(f"{reply}\n" for reply in said_by(base, "one\n\ntwo", "three\nfour", "five", "six\\")))


@given(st.text(alphabet='ab\n"\\ ', max_size=12))
def test_any_text_can_be_said_in_a_block(text: str) -> None:
    """Everything but three quotes at a line's end, which end it."""
    if '"""' not in text:
        [said] = iter(Lines(io.StringIO(f'"""\n{text}\n"""\n')).read, None) if text.strip() else [text]
        assert said == text


def test_what_is_typed_goes_on_only_where_it_says_so() -> None:
    assert [unfinished(text) for text in ("a", "a\\", '"""', '"""a', '"""a"""', '""""', '"""\na\n""" ')] == [0, 1, 1, 1, 0, 1, 0]
    assert message('"""a\\"""') == "a\\"
    assert message("a\n") == "a"


def test_input_that_is_no_text_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert main(["chat", str(base), *BRIEF]) == 2
    assert "standard input:1: not UTF-8" in capsys.readouterr().err


def test_a_refused_line_is_named_the_others_are_answered_and_the_exit_code_tells(base: Path, talk: Talk) -> None:
    code, out, notes = talk(base, "/sytem hi\n" + "x" * 300 + "\nhello\n")
    assert code == 1
    assert "no command /sytem\nhint: did you mean /system?" in notes
    assert "no room for an answer" in notes
    assert "2 of the lines on standard input were refused" in notes
    assert out == said_by(base, "hello")[0] + "\n"


def test_two_slashes_send_one(base: Path, talk: Talk) -> None:
    code, out, _ = talk(base, "//etc is a directory\n")
    assert (code, out) == (0, said_by(base, "/etc is a directory")[0] + "\n")


# ---- what the model is asked -----------------------------------------------------------------------------------------


def test_chat_asks_with_the_ids_that_training_has(base: Path, talk: Talk) -> None:
    """D02, D04, D05: one BOS, the same ids, control strings of the user as text."""
    prompts = Prompts(Tokenizer(base))
    text = "</s> é <|end|>"
    messages = [{"role": "system", "content": "<s>"}, {"role": "user", "content": text}]
    _, out, _ = talk(base, f"{text}\n/tokens\n", "--system", "<s>")
    shown = re.search(r"^(\d+) tokens\n(\[.*\])\n(.*)", out, re.MULTILINE)
    assert shown is not None
    ids = json.loads(shown[2])
    assert ids == prompts.prompt_ids(messages)
    assert prompts.sample_ids([*messages, {"role": "assistant", "content": "ok"}])[0][: len(ids)] == ids
    assert ids.count(256) == 1
    assert ids.count(258) == 2
    assert int(shown[1]) == len(ids)
    assert shown[3] == "<s>s:<s><|end|>u:</s> é <|end|><|end|>a:"


def test_only_what_is_new_is_computed_in_the_next_turn(session: Session) -> None:
    session.handle("hello there")
    prompt = list(session.prompt)
    session.handle("and again")
    assert session.tuned.reused >= len(prompt)


def test_on_a_full_context_the_oldest_turns_go_and_that_is_said(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    """The system prompt stays; all turns stay in what /save writes."""
    session.handle("/system S")
    for n in range(6):
        session.handle(f"{n} " + "word " * 8)
        assert len(session.prompt) + 12 <= 256
    notes = capsys.readouterr().err
    assert re.search(r"oldest turns? no longer fits? in the context of 256 tokens", notes)
    assert session.first > 0
    heard = session.heard(session.first)
    assert heard[0] == {"role": "system", "content": "S"}
    assert heard[1]["role"] == "user"
    assert session.prompt == session.opened.prompts.prompt_ids(heard[:-1])
    assert len(session.messages) == 12


def test_a_reply_that_reaches_the_end_of_the_context_says_so(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = session_on(base, max_new_tokens=None)
    session.handle("hello")
    assert "cut off: the context of 256 tokens is full" in capsys.readouterr().err


# ---- breaking off ----------------------------------------------------------------------------------------------------


def break_after(session: Session, tokens: int) -> Any:
    """Ctrl-C in the middle of the forward pass after so many tokens."""
    calls = iter(range(10**6))

    def press(*_: object) -> None:
        if next(calls) == tokens:
            raise KeyboardInterrupt

    return session.opened.model.model.layers[1].register_forward_hook(press)


def test_ctrl_c_in_a_reply_keeps_what_was_said(session: Session, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = break_after(session, 5)
    session.handle("hello")
    hook.remove()
    [whole] = said_by(base, "hello")
    part = session.messages[-1]["content"]
    assert part
    assert whole.startswith(part)
    assert whole != part
    session.handle("go on")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": part}, {"role": "user", "content": "go on"}]
    assert session.prompt == session.opened.prompts.prompt_ids(messages)


def test_ctrl_c_before_the_first_word_takes_the_message_back(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    hook = break_after(session, 0)
    session.handle("hello")
    hook.remove()
    assert session.messages == []
    assert "taken back" in capsys.readouterr().err
    session.handle("hello")
    kept = list(session.messages)
    hook = break_after(session, 0)
    session.handle("/retry")
    hook.remove()
    assert session.messages == kept


def test_a_reply_that_fails_leaves_the_chat_as_it_was(session: Session) -> None:
    """Mutation seen: the message kept without a reply, so that two of the user's follow each other."""
    session.handle("hello")
    kept = list(session.messages)
    with torch.no_grad():
        session.opened.model.model.norm.weight[0] = torch.nan
    for said in ("more", "/retry"):
        with pytest.raises(WorkError, match="not finite"):
            session.handle(said)
        assert session.messages == kept
    with pytest.raises(UserError, match="no room"):
        session.handle("x" * 300)
    assert session.messages == kept


def test_ctrl_c_on_a_pipe_ends_the_command(session: Session) -> None:
    session.interactive = False
    hook = break_after(session, 3)
    with pytest.raises(KeyboardInterrupt):
        session.handle("hello")
    hook.remove()


# ---- slash commands --------------------------------------------------------------------------------------------------


def test_retry_says_something_else_and_undo_takes_a_turn_back(base: Path) -> None:
    session = session_on(base, temperature=1.5)
    session.handle("hello")
    first = session.messages[-1]["content"]
    session.handle("/retry")
    assert len(session.messages) == 2
    assert session.messages[-1]["content"] != first
    session.handle("more")
    session.handle("/undo")
    assert [message["content"] for message in session.messages][::2] == ["hello"]
    session.handle("/undo")
    for command in ("/undo", "/retry", "/save x"):
        with pytest.raises(UserError, match="nothing"):
            session.handle(command)


def test_clear_and_system_change_what_the_model_hears(session: Session) -> None:
    session.handle("hello")
    session.handle("/clear")
    session.handle("/system be brief")
    session.handle("bye")
    assert session.opened.prompts.tokenizer.decode(session.prompt, skip_special=False) == "<s>s:be brief<|end|>u:bye<|end|>a:"
    session.handle("/system off")
    session.handle("/clear")
    session.handle("bye")
    assert session.opened.prompts.tokenizer.decode(session.prompt, skip_special=False) == "<s>u:bye<|end|>a:"


def test_set_takes_every_sampling_option_and_refuses_what_the_command_line_refuses(session: Session) -> None:
    for command, name, value in (
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set top_k 7", "top_k", 7),
        ("/set max_new_tokens off", "max_new_tokens", None),
        ("/set max_new_tokens 9", "max_new_tokens", 9),
        ("/set stop two words", "stop", ["two words"]),
        (r'/set stop "\n\n"', "stop", ["\n\n"]),
        ("/set stop off", "stop", []),
        ("/set top_p=0.3", "top_p", 0.3),
        ("/set --top-p 0.4", "top_p", 0.4),
        ("/set --min_p=0.1", "min_p", 0.1),
        ("/set seed = -7", "seed", -7),
        ("/set stop a=b", "stop", ["a=b"]),
        ("/set stop null", "stop", ["null"]),
        ("/set stop --help", "stop", ["--help"]),
        ("/set stop off", "stop", []),
    ):
        session.handle(command)
        assert getattr(session.sampling, name) == value
    for wrong, said in (
        ("temperature -1", "at least 0"),
        ("temperatur 1", "temperatur"),
        ("top_k x", "whole number"),
        ("seed", "value"),
        ("top_k=", "value"),
    ):
        with pytest.raises(UserError, match=said):
            session.handle(f"/set {wrong}")
    assert session.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "name", ["help", "--help", "-h", "print_config", "--print_config", "config x.yaml", "--", "=", "=1", "precision fp32"]
)
def test_set_takes_sampling_options_alone(session: Session, name: str) -> None:
    """What means something else to a parser leaves the chat as it is. Caught: SystemExit, AttributeError."""
    before = replace(session.sampling)
    with pytest.raises(UserError, match="no option"):
        session.handle(f"/set {name}")
    assert session.sampling == before


def test_set_knows_what_was_meant_and_alone_shows_all(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, meant in (("temperatur=1", "temperature"), ("max_tokens 5", "max_new_tokens")):
        with pytest.raises(UserError) as refusal:
            session.handle(f"/set {wrong}")
        assert refusal.value.hint == f"did you mean {meant}?"
    session.handle("/set")
    shown = capsys.readouterr().err
    assert all(f"{field.name} {getattr(session.sampling, field.name)}" in shown for field in fields(SamplingOptions))


def test_a_saved_chat_is_a_row_to_train_on_and_loads_again(session: Session, tmp_path: Path) -> None:
    """Also behind a line that somebody left without its end."""
    path = tmp_path / "my chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    session.handle("/system S")
    session.handle("héllo 🙂")
    session.handle(f"/save {path}")
    saved = list(session.messages)
    rows = [to_messages(row) for row in read_rows(path)]
    assert rows == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "system", "content": "S"}, *saved],
    ]
    session.handle("/clear")
    session.handle("/system off")
    session.handle(f"/load {path}")
    assert (session.messages, session.system) == (saved, "S")
    for wrong in ("/load", "/load nowhere.jsonl", f"/save {tmp_path}", "/save"):
        with pytest.raises(UserError):
            session.handle(wrong)
    assert session.messages == saved


def test_compare_answers_with_the_base_and_the_tuned_model(base: Path, step: Path, talk: Talk) -> None:
    """Same weights in memory; the conversation goes on with the tuned reply."""
    plain, tuned = said_by(base, "hello")[0], said_by(step, "hello", "more")
    assert plain != tuned[0]
    code, out, _ = talk(step, "hello\n/compare off\nmore\n", "--compare")
    assert (code, out) == (0, f"[base]\n{plain}\n[tuned]\n{tuned[0]}\n{tuned[1]}\n")
    code, _, notes = talk(base, "hello\n", "--compare")
    assert code == 2
    assert "nothing to compare" in notes


def test_an_adapter_is_switched_without_loading_the_base_again(base: Path, step: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "peft", str(base), seed=5)
    session = session_on(base)
    weights = session.opened.model.lm_head.weight.data_ptr()
    replies = {}
    for words in ("off", f"{step}", f"{step}:0.5", f"{other}", "off"):
        session.handle(f"/adapter {words}")
        session.handle("/clear")
        session.handle("hello")
        replies.setdefault(words, session.messages[-1]["content"])
        assert session.messages[-1]["content"] == replies[words]
    assert session.opened.model.lm_head.weight.data_ptr() == weights
    assert len(set(replies.values())) == 4
    assert replies["off"] == said_by(base, "hello")[0]
    assert replies[str(step)] == said_by(step, "hello")[0]


def test_an_adapter_that_cannot_go_on_leaves_the_old_one_on(base: Path, step: Path, tmp_path: Path) -> None:
    """A02. Mutation seen: the old adapter taken off before the new one was known to fit."""
    stranger = make_step(tmp_path / "out", 100, make_talker(tmp_path / "other", seed=1))
    broken = make_adapter(tmp_path / "broken", str(base), r=4)
    (broken / "adapter_config.json").write_text((broken / "adapter_config.json").read_text().replace('"r": 4', '"r": 2'))
    session = session_on(step)
    for path in (stranger, broken, tmp_path / "nowhere", base, f"{step}:heavy"):
        with pytest.raises(UserError):
            session.handle(f"/adapter {path}")
    session.handle("hello")
    assert session.messages[-1]["content"] == said_by(step, "hello")[0]


@pytest.fixture(scope="module")
def stored_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its weights in bf16, as most are published, and one in fp32 among them; a width of an MLP that no kernel reads."""
    path = make_talker(tmp_path_factory.mktemp("bf16") / "base", ends=False, hidden_size=48, intermediate_size=40)
    tensors = load_file(path / names.WEIGHTS)
    narrow = {name: tensor if "layers.0.self_attn.q_proj" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(narrow, path / names.WEIGHTS, {"format": "pt"})
    return path


@pytest.mark.skipif(cpu.working() is None, reason="no kernels for this CPU: no C compiler at installation, or no AVX2")
def test_weights_stay_as_they_are_stored_and_give_way_to_what_was_trained_whole(
    stored_in_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C2, where kernels of ours read bf16: those in bf16 stay in their file's map, one in fp32 stays exact, answers are those of wide
    weights, an adapter may replace a weight, and DoRA measures wide ones. Caught: every weight rounded to bf16; a weight that is not made
    wide, and refused; a failure after which the model is not as it was, or no longer knows its base; weights that stay wide, or are
    not made so where a step of DoRA is loaded; a head that is wide beside few bits, or in bf16 where none are asked for, or where nothing
    is to be answered."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "output": f"it is {n}"}) + "\n" for n in range(40)))
    typed = ["--checkpoint_dir", str(stored_in_bf16), "--data", str(rows), "--train.max_steps", "2", "--train.lr", "0.1", "--out_dir"]
    steps = {}
    more = {"lora": [], "freeze": ["--freeze.layers", "last:1"], "dora": ["--lora.use_dora", "true"]}
    more["ends"] = ["--lora.modules_to_save", "embed_tokens", "lm_head"]
    for method, options in more.items():
        command = method if method == "freeze" else "lora"
        assert main(["finetune", command, *typed, str(tmp_path / method), *options]) == 0
        steps[method] = str(tmp_path / method / "step-2")
    chosen = Chat(max_new_tokens=12, temperature=0.0)
    session = Session(open_model(chosen, str(stored_in_bf16), None, [], None, "auto"), chosen, interactive=True)

    def wide() -> set[str]:
        return {name for name, host in linears(session.opened.model).items() if host.quantized is None}

    narrow = {f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)}  # not of whole registers
    as_loaded, tokens = wide(), torch.arange(9)[None]
    with torch.inference_mode():
        plain = session.opened.model(tokens)
    assert as_loaded == {"lm_head", "model.layers.0.self_attn.q_proj", *narrow}
    head, words = session.opened.model.lm_head.weight, {"none": torch.float32, "int8": torch.bfloat16, "bf16": torch.bfloat16}
    for word, dtype in words.items():
        assert open_model(chosen, str(stored_in_bf16), None, [], None, word).model.lm_head.weight.dtype == dtype, word
    assert open_model(chosen, str(stored_in_bf16), None, [], None, "auto", answers=False).model.lm_head.weight.dtype == torch.float32
    measured = linears(open_model(chosen, steps["dora"], None, [], None, "auto").model)
    assert all(host.quantized is None for host in measured.values() if host.adapter is not None)

    def said() -> str:
        session.handle("/clear")
        session.handle("hello")
        return str(session.messages[-1]["content"])

    def broken(*of: Any) -> None:
        raise UserError("does not fit")

    right = {method: said_by(Path(step), "hello")[0] for method, step in steps.items()} | {"off": said_by(stored_in_bf16, "hello")[0]}
    assert len(set(right.values())) == 5
    for method in ("off", "lora", "freeze", "ends", "off", "dora", "freeze", "lora", "off"):
        session.handle(f"/adapter {steps.get(method, method)}")
        assert said() == right[method], method
        assert (len(wide()) > len(as_loaded)) == (method in ("freeze", "dora"))
        with monkeypatch.context() as patch:
            patch.setattr(weights, "put_on", broken)
            with pytest.raises(UserError, match="does not fit"):
                session.handle(f"/adapter {steps['freeze']}")
        assert said() == right[method], method
        with torch.inference_mode(), as_base(session.opened.model):
            assert torch.allclose(session.opened.model(tokens), plain, rtol=1e-4, atol=1e-4), method
    assert wide() == as_loaded and session.opened.model.lm_head.weight is head and head.dtype == torch.bfloat16


def test_stats_can_be_turned_off_and_on(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.handle("hello")
    assert re.search(r"12 tokens · \d+ tok/s · first token \d+\.\d\d s · context \d+/256", capsys.readouterr().err)
    session.handle("/set prompt_lookup 8")
    session.handle("hello")
    assert re.search(r"12 tokens · \d+ looked up · \d+ tok/s", capsys.readouterr().err)
    session.handle("/stats off")
    session.handle("hello")
    assert "tok/s" not in capsys.readouterr().err
    with pytest.raises(UserError):
        session.handle("/stats perhaps")


def test_help_names_every_command(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.handle("/help")
    shown = capsys.readouterr().out
    commands = ("help", "exit", "clear", "system", "set", "retry", "undo", "compare", "adapter", "tokens", "save", "load", "stats")
    assert all(f"/{name}" in shown for name in commands)
    assert not session.handle("/exit")
    assert not session.handle("/quit")


# ---- at a terminal ---------------------------------------------------------------------------------------------------


class Keyboard:
    """A person at a terminal: types, and waits for what should appear."""

    def __init__(self, words: list[str], home: Path) -> None:
        main_end, their_end = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(home), "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
        self.end, self.shown = main_end, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "litlora", "chat", *words],
            stdin=their_end, stdout=their_end, stderr=their_end, cwd=ROOT, env=environment, start_new_session=True,
            preexec_fn=lambda: take_terminal(their_end),
        )  # fmt: skip
        os.close(their_end)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def see(self, pattern: str, seconds: float = 120) -> str:
        """Wait for a text, without its colours, and forget all up to it."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, plain(self.shown), re.DOTALL)):
            left = until - time.monotonic()
            ready = select.select([self.end], [], [], max(0, left))[0]
            assert ready, f"{pattern!r} did not appear in {plain(self.shown)!r}"
            with contextlib.suppress(OSError):  # Linux's word for: the other end is closed
                self.shown += os.read(self.end, 65536).decode(errors="replace")
            assert left > 0, f"{pattern!r} did not appear in {plain(self.shown)!r}"
        self.shown = ""
        return found[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


def take_terminal(end: int) -> None:
    """Make the pty the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(end, termios.TIOCSCTTY, 0)


def plain(shown: str) -> str:
    """Without colours and cursor movements; <ready> where the prompt waits (it then asks for pasted text to be marked)."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", shown.replace("\x1b[?2004h", "<ready>"))


@pytest.fixture
def keyboard(base: Path, tmp_path: Path) -> Iterator[Keyboard]:
    person = Keyboard([str(make_talker(tmp_path / "talker", ends=False, context=6000)), *BRIEF], tmp_path / "state")
    yield person
    person.close()


def test_a_chat_at_a_terminal(keyboard: Keyboard, tmp_path: Path) -> None:
    """Enter, a paste of two lines, Alt-Enter, a backslash, a block, Tab, Ctrl-C at the prompt and in a reply, Ctrl-D."""
    keyboard.see(r"/help lists the commands.*<ready>")
    keyboard.type("hello\r")
    keyboard.see(r"12 tokens · \d+ tok/s · first token [\d.]+ s · context \d+/6000.*<ready>")
    for keys, text in (
        ("\x1b[200~pasted one\rpasted two\x1b[201~\r", "u:pasted one\npasted two<|end|>a:"),
        ("alt one\x1b\ralt two\r", "u:alt one\nalt two<|end|>a:"),
        ("slash one\\\rslash two\r", "u:slash one\nslash two<|end|>a:"),
        ('"""block one\rblock two"""\r', "u:block one\nblock two<|end|>a:"),
    ):
        keyboard.type(keys)
        keyboard.see(r"tok/s.*<ready>")
        keyboard.type("/tokens\r")
        keyboard.see(re.escape(text) + r"\n.*<ready>")
    keyboard.type("/sta\t")
    keyboard.see("/stats")
    keyboard.type("off\r")
    keyboard.see(r"stats are off.*<ready>")
    keyboard.type("never sent\x03")
    keyboard.see("<ready>")
    keyboard.type("/set max_new_tokens 5000\r")
    keyboard.see(r"max_new_tokens 5000.*<ready>")
    keyboard.type("go on for long\r")
    keyboard.see(r"go on for long.*\n.{20}")
    keyboard.type("\x03")
    keyboard.see("<ready>")
    keyboard.type(f"/save {tmp_path}/said.jsonl\r")
    keyboard.see(r"saved as one row.*<ready>")
    keyboard.type("\x04")
    assert keyboard.process.wait(timeout=60) == 0
    [row] = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert row["messages"][-2]["content"] == "go on for long"
    assert 0 < len(row["messages"][-1]["content"]) < 5000
    history = (tmp_path / "state" / "litlora" / "history").read_text()
    assert "+pasted one\n+pasted two\n" in history
    assert "never sent" not in history


def test_what_cannot_be_remembered_is_said_once(base: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in the way")
    person = Keyboard([str(base), *BRIEF], tmp_path / "state")
    person.see(r"will not be remembered.*<ready>")
    person.type("/exit\r")
    assert person.process.wait(timeout=60) == 0
    person.close()
